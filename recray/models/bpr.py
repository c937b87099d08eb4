"""Matrix factorization by Bayesian personalized ranking (Rendle et al. 2009, arXiv 1205.2618).

With S the set of observed pairs, w_u a user's and h_i an item's vector, b_i its bias, j an item that u
has not taken, x_uij = <w_u, h_i - h_j> + b_i - b_j, r = `reg`:

    L = sum_{(u,i) in S} E_j[ -ln sigmoid(x_uij) ] + r/2 (|w_u|^2 + |h_i|^2 + |h_j|^2 + b_i^2 + b_j^2)

Training draws j and steps on a batch of triples, by AdaGrad with one number a row. Of `draws` items j the
one with the highest score is taken, which is the best sampler where items are many (Zhang et al. 2013).
With `adversarial` a batch's loss is the mean of L and of L where its vectors are moved against it, by that
share of their length (see fgsm.py; r counts once). That both spreads less over noise and resists an attack.

Users are vectors while they are trained and are then forgotten: whoever asks is her history S_u, folded
in against the frozen items, so that known and new users are treated alike. The expectation is then over
`anchors` fixed rows j. Since the curvature of -ln sigmoid is at most 1/4, each step minimizes a quadratic
function that lies above the loss and touches it (Boehning & Lindsay 1988):

    A_u = 1/4 (sum_{i in S_u} (h_i - m)(h_i - m)^T + |S_u| C) + r |S_u| I      m, C: mean, covariance of h_j
    w_u = w_u - A_u^-1 grad_u

The first step from w = 0 is the minimizer of the second-order expansion, a ridge regression. With several
`draws` the anchors weigh as often as each would be the hardest of so many, at the scores of the step.

Shapes: U users, N items, D dims, B users asked or triples, n items of a history, J anchors, X draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.data.batches import generator
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.embeddings import DenseTable
from recray.models.fgsm import fgsm
from recray.models.ials_solve import groups

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio (Knuth 1998, section 6.4)
_PAIRS = 1 << 22  # pairs of a history's item and an anchor in memory at a time


class BPR(Retriever):
    """Matrix factorization that learns an order and not a value."""

    name = "bpr"
    gradient = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 64
        epochs: int = 60
        batch: int = 2048  # triples a step
        lr: float = 0.1
        reg: float = 0.01
        draws: int = 1  # items that the negative is the hardest of
        std: float = 0.1  # of the first vectors, divided by sqrt(dim)
        anchors: int = 1024  # negatives of the fold-in
        steps: int = 8  # of the fold-in
        adversarial: float = 0.0  # a perturbation in training, as a share of a vector's length; 0 = none

    config: BPR.Config
    anchors: Tensor  # int64[J]

    def __init__(self, catalogue: Catalogue, config: BPR.Config) -> None:
        super().__init__(catalogue, config)
        for name in ("dim", "epochs", "batch", "draws", "anchors", "steps"):
            if getattr(config, name) < 1:
                raise ConfigError(f"options.{name} is {getattr(config, name)}", fix="it must be 1 or more")
        if not (config.reg > 0 and config.lr > 0 and config.std >= 0):
            raise ConfigError("lr and reg must be above 0, std at least 0", where="options")
        if not 0 <= config.adversarial < 1:
            raise ConfigError(
                f"options.adversarial is {config.adversarial}", fix="it must be from 0 to below 1"
            )
        # the last dimension is the bias
        self.tables["item"] = DenseTable(catalogue.n_items, config.dim + 1, std=config.std * config.dim**-0.5)
        self.register_buffer(
            "anchors", torch.zeros(min(config.anchors, catalogue.n_items), dtype=torch.int64)
        )

    # -- training --------------------------------------------------------------------------------
    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        """Learn users and items, and keep the items."""
        c, rng = self.config, generator(seed, 11)
        pairs = Pairs(data.histories("train"), self.n_items)
        users = Rows(rng.standard_normal((data.n_users, c.dim + 1), np.float32) * (c.std * c.dim**-0.5), c)
        users.values[:, -1] = 1  # what an item's bias is multiplied with
        items = Rows(rng.standard_normal((self.n_items, c.dim + 1), np.float32) * (c.std * c.dim**-0.5), c)
        items.values[:, -1] = 0
        loss = 0.0
        for _ in range(c.epochs):
            loss = 0.0
            for some in np.array_split(rng.permutation(len(pairs)), len(pairs) // c.batch + 1):
                loss += step(users, items, pairs, some, c.draws, rng)
        self.tables["item"].weight.data.copy_(torch.from_numpy(items.values))  # type: ignore[operator]
        self.anchors.copy_(torch.from_numpy(np.sort(rng.permutation(self.n_items)[: len(self.anchors)])))
        return {"pairs": len(pairs), "loss": loss / max(len(pairs), 1)}

    # -- answering -------------------------------------------------------------------------------
    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        """Fold raw histories in, float32[B, 1, D + 1]; an empty one gets the items' biases for scores."""
        made = torch.zeros(len(histories), self.config.dim + 1)
        made[:, -1] = 1
        for users, rows_Bn in self._parts(histories, len(self.anchors)):
            made[users, :-1] = self._folded(rows_Bn.to(self.device)).cpu()
        return made.unsqueeze(1).to(self.device)

    @torch.inference_mode()
    def gradients(self, histories: Histories, w_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the summed loss of users at w float32[B, D + 1], with all items for anchors, without `reg`.

        By the users, [B, D + 1], of which the constant has none, and by the items, [N, D + 1].
        """
        all_N = torch.arange(self.n_items, device=self.device)
        table, h_ND = self.tables["item"], self.tables["item"](all_N)
        by_user_BD, by_item_ND = torch.zeros_like(w_BD), torch.zeros_like(h_ND)
        for users, rows_Bn in self._parts(histories, self.n_items):
            rows_Bn, w = rows_Bn.to(self.device), w_BD[users]
            h_BnD, taken_BN = table(rows_Bn), self._taken(rows_Bn, all_N)
            s_Bn, s_BN = (h_BnD @ w.unsqueeze(2)).squeeze(2), w @ h_ND.T
            fall_Bn, rise_BN = self._slopes(s_Bn, s_BN, (rows_Bn >= 0).float(), taken_BN)
            by_user_BD[users] = rise_BN @ h_ND - (fall_Bn.unsqueeze(1) @ h_BnD).squeeze(1)
            by_item_ND += rise_BN.T @ w
            falls_BnD = fall_Bn.unsqueeze(2) * w.unsqueeze(1)
            by_item_ND.index_add_(0, rows_Bn.clamp(min=0).flatten(), -falls_BnD.flatten(0, 1))
        by_user_BD[:, -1] = 0
        return by_user_BD, by_item_ND

    def _parts(self, histories: Histories, anchors: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(users int64[B], their rows int64[B, n], padded with -1) of near length, as memory bears."""
        pairs = histories.known().to_csr(self.n_items)
        for users, at, real in groups(pairs.indptr, self.config.dim):
            rows_Bn = torch.from_numpy(np.where(real, pairs.indices[at], -1).astype(np.int64))
            size = max(1, _PAIRS // (rows_Bn.shape[1] * anchors))
            yield from zip(
                torch.split(torch.from_numpy(users), size), torch.split(rows_Bn, size), strict=True
            )

    def _folded(self, rows_Bn: Tensor) -> Tensor:
        """w [B, D] of histories of near length, padded with -1."""
        table, real_Bn = self.tables["item"], (rows_Bn >= 0).float()
        h_BnD, b_Bn = _split(table(rows_Bn))
        h_JD, b_J = _split(table(self.anchors))
        taken_BJ = self._taken(rows_Bn, self.anchors)
        n_B11 = real_Bn.sum(1).view(-1, 1, 1)
        away_BnD, away_JD = (h_BnD - h_JD.mean(0)) * real_Bn.unsqueeze(2), h_JD - h_JD.mean(0)
        ridge_DD = self.config.reg * torch.eye(h_JD.shape[1], device=h_JD.device)
        shared_DD = away_JD.T @ away_JD / (4 * len(h_JD)) + ridge_DD
        system = away_BnD.transpose(1, 2) @ away_BnD / 4 + n_B11 * shared_DD
        factor = torch.linalg.cholesky_ex(system).L
        w_BD = torch.zeros_like(h_BnD[:, 0])
        for _ in range(self.config.steps):
            s_Bn = (h_BnD @ w_BD.unsqueeze(2)).squeeze(2) + b_Bn
            s_BJ = w_BD @ h_JD.T + b_J
            fall_Bn, rise_BJ = self._slopes(s_Bn, s_BJ, real_Bn, taken_BJ)
            up_BD = (fall_Bn.unsqueeze(1) @ h_BnD).squeeze(1) - rise_BJ @ h_JD
            up_BD -= self.config.reg * n_B11.squeeze(2) * w_BD
            w_BD = w_BD + torch.cholesky_solve(up_BD.unsqueeze(2), factor).squeeze(2)
        return w_BD

    def _slopes(self, s_Bn: Tensor, s_BJ: Tensor, real_Bn: Tensor, taken_BJ: Tensor) -> tuple[Tensor, Tensor]:
        """How the loss falls by scores of a history's items, [B, n], and rises by the anchors', [B, J]."""
        drawn_BJ = self.chances(s_BJ.masked_fill(taken_BJ, -torch.inf)) * ~taken_BJ
        wrong_BnJ = torch.sigmoid(s_BJ.unsqueeze(1) - s_Bn.unsqueeze(2)) * real_Bn.unsqueeze(2)
        wrong_BnJ = wrong_BnJ * drawn_BJ.unsqueeze(1)
        return wrong_BnJ.sum(2), wrong_BnJ.sum(1)

    def _taken(self, rows_Bn: Tensor, anchors_J: Tensor) -> Tensor:
        """Which anchors a history holds, bool[B, J]: they are no negatives of it."""
        at_Bn = torch.searchsorted(anchors_J, rows_Bn.clamp(min=0)).clamp(max=len(anchors_J) - 1)
        hit_Bn = anchors_J[at_Bn] == rows_Bn
        taken_BJ = torch.zeros(len(rows_Bn), len(anchors_J), device=rows_Bn.device)
        return taken_BJ.scatter_add(1, at_Bn, hit_Bn.float()) > 0

    def chances(self, s_BJ: Tensor) -> Tensor:
        """How likely each anchor is the one of the highest score among `draws` of them, [B, J]."""
        if self.config.draws == 1:
            return torch.full_like(s_BJ, 1 / s_BJ.shape[1])
        rank_BJ = s_BJ.argsort(dim=1).argsort(dim=1) / s_BJ.shape[1]
        return (rank_BJ + 1 / s_BJ.shape[1]) ** self.config.draws - rank_BJ**self.config.draws


def _split(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(vectors, biases) of rows [..., D + 1]"""
    return rows[..., :-1], rows[..., -1]


class Pairs:
    """The distinct pairs of a log: users int64[n], items int64[n], and which ones there are."""

    def __init__(self, histories: Histories, n_items: int) -> None:
        held = histories.known().to_csr(n_items)
        held.sort_indices()
        self.n_items = n_items
        self.users = np.repeat(np.arange(held.shape[0]), np.diff(held.indptr))
        self.items = held.indices.astype(np.int64)
        self.keys = self.users * n_items + self.items  # ascending
        # most keys are none of the log's: one look into eight bytes a pair tells, where a search takes twenty
        self._bits = max(8 * len(self.keys), 2).bit_length()
        self._maybe = np.zeros(1 << self._bits, np.bool_)
        self._maybe[self._places(self.keys)] = True

    def __len__(self) -> int:
        return len(self.keys)

    def taken(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether these are pairs of the log; users and items of one shape."""
        wanted = users * self.n_items + items
        found = self._maybe[self._places(wanted)]
        some = wanted[found]
        at = np.minimum(np.searchsorted(self.keys, some), len(self.keys) - 1)
        found[found] = self.keys[at] == some
        return found

    def _places(self, keys: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Where keys lie among the 2^bits, by multiplicative hashing."""
        return (keys.astype(np.uint64) * _GOLDEN) >> np.uint64(64 - self._bits)


class Rows:
    """Vectors float32[n, D + 1] that are stepped on by AdaGrad, with one number of state a row."""

    def __init__(self, values: NDArray[np.float32], c: BPR.Config) -> None:
        self.values, self.c = values, c
        self.squares = np.zeros(len(values), np.float32)

    def step(self, rows: NDArray[np.int64], grad: NDArray[np.float32]) -> None:
        """Distinct rows [m], their summed gradients [m, D + 1]."""
        self.squares[rows] += (grad * grad).mean(1)
        self.values[rows] -= self.c.lr * grad / (np.sqrt(self.squares[rows]) + 1e-8)[:, None]


def step(
    users: Rows, items: Rows, pairs: Pairs, some: NDArray[np.int64], draws: int, rng: np.random.Generator
) -> float:
    """Draw a negative for some pairs and step on their vectors; the summed loss before it."""
    u_B, i_B = pairs.users[some], pairs.items[some]
    j_BX = rng.integers(pairs.n_items, size=(len(some), draws))
    w_BD, h_BD = users.values[u_B], items.values[i_B]
    s_BX = np.einsum("bd,bxd->bx", w_BD, items.values[j_BX])
    s_BX[pairs.taken(u_B[:, None], j_BX)] = -np.inf
    hardest = s_BX.argmax(1)
    j_B, s_B = j_BX[np.arange(len(some)), hardest], s_BX.max(1)
    x_B = np.einsum("bd,bd->b", w_BD, h_BD) - s_B  # infinite, and without a slope, where all were taken
    loss, wrong_B = float(np.logaddexp(0, -x_B[np.isfinite(x_B)]).sum()), _wrong(x_B)
    distinct_u, at_u = np.unique(u_B, return_inverse=True)
    distinct_i, at_i = np.unique(np.concatenate([i_B, j_B]), return_inverse=True)
    w, h = users.values[distinct_u], items.values[distinct_i]
    grad_u, grad_i = _gradients(w, h, at_u, at_i, wrong_B)
    if size := users.c.adversarial:
        far_w, far_h = _moved(w, grad_u, size), _moved(h, grad_i, size)
        far_B = np.where(np.isfinite(x_B), _differences(far_w, far_h, at_u, at_i), np.inf)
        for grad, more in zip((grad_u, grad_i), _gradients(far_w, far_h, at_u, at_i, _wrong(far_B))):
            grad += more
            grad /= 2
    grad_u += users.c.reg * np.bincount(at_u)[:, None].astype(np.float32) * w
    grad_i += items.c.reg * np.bincount(at_i)[:, None].astype(np.float32) * h
    grad_u[:, -1] = 0
    users.step(distinct_u, grad_u)
    items.step(distinct_i, grad_i)
    return loss


def _gradients(
    w_UD: NDArray[np.float32],
    h_ID: NDArray[np.float32],
    at_u: NDArray[np.int64],
    at_i: NDArray[np.int64],
    wrong_B: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the summed loss by users [U, D + 1], of which the constant has none, and by items [I, D + 1].

    at_u [B], at_i [2 B]: where each triple's user, its items and then its negatives are; `reg` left out.
    """
    from scipy import sparse

    # slopes of the loss by the scores, as a matrix of users and items: its products are the gradients
    shape = (len(w_UD), len(h_ID))
    slopes = sparse.csr_matrix((np.concatenate([-wrong_B, wrong_B]), (np.tile(at_u, 2), at_i)), shape)
    by_user = slopes @ h_ID
    by_user[:, -1] = 0
    return by_user, slopes.T.tocsr() @ w_UD


def _differences(
    w_UD: NDArray[np.float32], h_ID: NDArray[np.float32], at_u: NDArray[np.int64], at_i: NDArray[np.int64]
) -> NDArray[np.float32]:
    """x_uij of each triple."""
    i_B, j_B = np.split(at_i, 2)
    found: NDArray[np.float32] = np.einsum("bd,bd->b", w_UD[at_u], h_ID[i_B] - h_ID[j_B])
    return found


def _wrong(x_B: NDArray[Any]) -> NDArray[np.float32]:
    """How steeply the loss of a triple falls with its x."""
    return np.asarray(1 / (1 + np.exp(np.minimum(x_B, 80))), np.float32)


def _moved(rows: NDArray[np.float32], grad: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    return np.asarray(fgsm(torch.from_numpy(rows), torch.from_numpy(grad), size))

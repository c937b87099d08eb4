"""Neural matrix factorization (He et al. 2017, arXiv 1708.05031) over the history: the first ranker.

The paper's user embeddings are replaced by a pooled history, as in FISM (Kabbur et al. 2013) and NAIS
(He et al. 2018), so that a user never seen in training gets an answer. With x_k the history's vectors,
newest first (k = 0, 1, ...), q the candidate's and G pooling groups of the dimensions:

    p[g] = p_0[g] + sum_k exp(a[g, k]) x_k[g] / (sum_k exp(a[g, k]))^(1/2)    learned forgetting
    score = <w, p_gmf * q_gmf> + MLP([p_mlp; q_mlp; context])

`p_0` is what an empty history gets and lets `q_gmf` hold an item bias. Each branch has its own tables.
In training a target sees only the interactions before it, never itself. Where a log has no order that means
anything, a random `half` of the user's window tells all of it, as in a denoising autoencoder (Liang et al.
2018, arXiv 1802.05814): no forgetting is learned, and a user is pooled once and not once a target.

Shapes: B users, L history items, C candidates, D dims, G groups, T positions of a sequence, S negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, Context, seeded
from recray.models.embeddings import DenseTable, normal
from recray.models.fields import GROUPS, Pool
from recray.models.losses import window_softmax
from recray.models.rankers import RankerBatch, TrainedRanker, newest_first

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class Scorer(nn.Module):
    """The dense part of NeuMF: vectors of histories, candidates and context -> scores."""

    def __init__(
        self,
        dim: int,
        context: int,
        hidden: tuple[int, ...],
        max_len: int,
        *,
        fading: bool = True,
    ) -> None:
        super().__init__()
        self.pool_gmf, self.pool_mlp = (Pool(dim, max_len, fading=fading) for _ in range(2))
        self.gmf = nn.Parameter(torch.ones(dim))
        self.from_user = nn.Linear(dim + context, hidden[0])
        self.from_item = nn.Linear(dim, hidden[0], bias=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(hidden))
        self.out = nn.Linear(hidden[-1], 1)
        self.out.weight = normal(1, hidden[-1], std=0.01)  # starts near GMF, which learns quicker

    def forward(
        self,
        history_gmf_BLD: Tensor,
        history_mlp_BLD: Tensor,
        mask_BL: Tensor,
        item_gmf_BCD: Tensor,
        item_mlp_BCD: Tensor,
        context_BX: Tensor,
    ) -> Tensor:
        """Scores float32[B, C]. Histories newest first, mask 1.0 where real; X may be 0."""
        p_gmf, p_mlp = self.pool_gmf(history_gmf_BLD, mask_BL), self.pool_mlp(history_mlp_BLD, mask_BL)
        return self.pairs(p_gmf, torch.cat([p_mlp, context_BX], dim=-1), item_gmf_BCD, item_mlp_BCD)

    def pairs(
        self, p_gmf_BD: Tensor, p_mlp_BE: Tensor, gmf_BCD: Tensor, mlp_BCD: Tensor, *, deep: bool = True
    ) -> Tensor:
        """Scores [B, C] of pooled users and candidates; candidates may be [C, D], shared by all.

        deep: whether the MLP adds to them.
        """
        linear = (gmf_BCD @ (p_gmf_BD * self.gmf).unsqueeze(-1)).squeeze(-1)
        if not deep:
            return linear
        # the first layer of an MLP over [user; item] is a sum: computed once a user and once an item
        hidden = self.from_user(p_mlp_BE).unsqueeze(-2) + self.from_item(mlp_BCD)
        for layer in self.layers:
            hidden = layer(nn.functional.relu(hidden))
        added: Tensor = self.out(nn.functional.relu(hidden)).squeeze(-1)
        return linear + added


class NeuMF(TrainedRanker):
    """GMF and an MLP over pooled histories and candidates."""

    name = "neumf"

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainedRanker.Config):
        dim: int = 32
        hidden: tuple[int, ...] = (32, 16)  # after the sum of the two sides: halves, as in the paper
        context_dim: int = 8
        dropout: float = 0.2  # of the pooled history; the pairs' hidden layers are too many to draw for
        loss: Literal["sampled", "bce", "bpr"] = "sampled"
        negatives: int = 256
        pretrain: int = 0  # first epochs of GMF alone, from which the paper goes on, too
        history: Literal["before", "half"] = "before"  # what a target is told from in training

    config: NeuMF.Config
    network: Scorer

    def __init__(self, catalogue: Catalogue, config: NeuMF.Config) -> None:
        super().__init__(catalogue, config)
        self.ordered = config.history == "before"
        if config.dim < 1 or config.dim % GROUPS:
            raise ConfigError(f"options.dim {config.dim} is not a multiple of {GROUPS}")
        if config.pretrain < 0:
            raise ConfigError("options.pretrain is a number of epochs, 0 or more")
        if config.context_dim < 1 or not config.hidden or min(config.hidden) < 1:
            raise ConfigError("context_dim and hidden must be at least 1", where="options")
        for name in ("history_gmf", "item_gmf", "history_mlp", "item_mlp"):
            self.tables[name] = DenseTable(catalogue.n_items, config.dim, std=0.05)
        for i, column in enumerate(self.columns):
            self.tables[f"context_{i}"] = DenseTable(catalogue.context[column], config.context_dim, std=0.1)
        self.network = Scorer(
            config.dim,
            config.context_dim * len(self.columns),
            config.hidden,
            config.max_len,
            fading=self.ordered,
        )

    def batches(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[tuple[RankerBatch, NDArray[np.int64]]]:
        """Batches of windows, each with the context of its targets, int64[B, T, columns]."""
        return self.drawn(
            data, batch_size=batch_size, epoch=epoch, seed=seed, rank=rank, world=world, skip=skip
        )

    def lookups(self, batch: tuple[RankerBatch, NDArray[np.int64]]) -> dict[str, list[Tensor]]:
        history = [torch.from_numpy(batch[0].inputs)]
        items = [torch.from_numpy(_own(batch[0])), torch.from_numpy(batch[0].negatives)]
        return {"history_gmf": history, "history_mlp": history, "item_gmf": items, "item_mlp": items}

    def loss(self, batch: tuple[RankerBatch, NDArray[np.int64]]) -> Tensor:
        sequence, context = batch
        device, net = self.device, self.network
        read_BL = torch.from_numpy(sequence.inputs).to(device)
        own_PC = torch.from_numpy(_own(sequence)).to(device)
        shared_S = torch.from_numpy(sequence.negatives).to(device)
        real = torch.from_numpy(sequence.targets >= 0).to(device)
        told_P = slice(None) if self.ordered else real.nonzero()[:, 0]  # which user each target is told from
        with seeded(sequence.seed):
            p_gmf = self._pooled(net.pool_gmf, self.tables["history_gmf"](read_BL), read_BL, real)
            p_mlp = self._pooled(net.pool_mlp, self.tables["history_mlp"](read_BL), read_BL, real)
        if self.columns:  # each target has its own context
            added_PX = self._context(torch.from_numpy(context).to(device)[real])
            p_gmf, p_mlp, told_P = p_gmf[told_P], torch.cat([p_mlp[told_P], added_PX], -1), slice(None)
        gmf, mlp = self.tables["item_gmf"], self.tables["item_mlp"]
        deep = not self.training or sequence.epoch > self.config.pretrain  # the first is 1
        own = net.pairs(p_gmf[told_P], p_mlp[told_P], gmf(own_PC), mlp(own_PC), deep=deep)
        shared = net.pairs(p_gmf, p_mlp, gmf(shared_S), mlp(shared_S), deep=deep)
        if self.by_window:
            own_BL = own.new_full(real.shape, -torch.inf).masked_scatter(real, own[:, 0])
            losses_P = window_softmax(own_BL, shared - torch.from_numpy(sequence.log_q).to(device))[real]
            return (losses_P * torch.from_numpy(sequence.weights).to(device)).sum() / sequence.positions
        negatives = torch.cat([shared[told_P], own[:, 1:]], 1)
        return self.contrast(own[:, 0], negatives, sequence.log_q, sequence.weights, sequence.positions)

    def _pooled(self, pool: Pool, x_BLD: Tensor, read_BL: Tensor, real_BT: Tensor) -> Tensor:
        """What each real target is told from, [P, D]; without an order what each window is, [B, D]."""
        if self.ordered:
            return self._drop(pool.prefixes(x_BLD)[real_BT])
        pooled_BD = pool(x_BLD, (read_BL >= 0).to(x_BLD.dtype))
        return pool.empty + self._drop(pooled_BD - pool.empty)  # what is popular stays

    def inputs(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> tuple[Tensor, ...]:
        device = self.device
        rows_BL = torch.from_numpy(newest_first(histories, self.config.max_len)).to(device)
        rows_BC = torch.from_numpy(candidates).to(device)
        given = torch.from_numpy(self.given_context(context, len(histories))).to(device)
        t: Any = self.tables
        return (
            t["history_gmf"](rows_BL),
            t["history_mlp"](rows_BL),
            (rows_BL >= 0).float(),
            t["item_gmf"](rows_BC),
            t["item_mlp"](rows_BC),
            self._context(given),
        )

    def _context(self, rows: Tensor) -> Tensor:
        """Context vectors float32[..., X] of value rows int64[..., columns]; out of range is unknown."""
        parts = []
        for i in range(len(self.columns)):
            table: Any = self.tables[f"context_{i}"]
            column = rows[..., i]
            parts.append(table(torch.where((column >= 0) & (column < table.num_rows), column, 0)))
        return torch.cat(parts, -1) if parts else rows.new_zeros((*rows.shape[:-1], 0), dtype=torch.float32)

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.config.dropout, self.training)


def _own(batch: RankerBatch) -> NDArray[np.int64]:
    """Each real position's target, then its own negatives: int64[P, 1 + H]."""
    return np.concatenate([batch.targets[batch.targets >= 0][:, None], batch.hard], axis=1)

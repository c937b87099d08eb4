"""Neural matrix factorization (He et al. 2017, arXiv 1708.05031) over the history: the first ranker.

The paper's user embeddings are replaced by a pooled history, as in FISM (Kabbur et al. 2013) and NAIS
(He et al. 2018), so that a user never seen in training gets an answer. With x_k the history's vectors,
newest first (k = 0, 1, ...), q the candidate's and G pooling groups of the dimensions:

    p[g] = p_0[g] + sum_k exp(a[g, k]) x_k[g] / (sum_k exp(a[g, k]))^(1/2)    learned forgetting
    score = <w, p_gmf * q_gmf> + MLP([p_mlp; q_mlp; context])

`p_0` is what an empty history gets and lets `q_gmf` hold an item bias. Each branch has its own tables.
In training a target sees only the interactions before it, never itself.

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

from recray.data import feed
from recray.data.batches import Negatives, SequenceBatch, chances, sequence_batches
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, Context, ModelConfig, Ranker, seeded
from recray.models.embeddings import DenseTable
from recray.models.losses import bce, bpr, sampled_softmax

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_FORGET = (0.0, 0.03, 0.1, 0.5)  # first rates of the groups: from all of the history to the newest few
_UNKNOWN = 0.1  # share of training contexts that are hidden, so that 'unknown' is learned too


class Pool(nn.Module):
    """Weighted sum of a history, by the age of its interactions, in G groups of dimensions."""

    def __init__(self, dim: int, max_len: int) -> None:
        super().__init__()
        self.max_len = max_len
        fading = -np.outer(_FORGET, np.arange(max_len)).astype(np.float32)
        self.log_weights = nn.Parameter(torch.from_numpy(fading))  # [G, max_len]
        self.empty = nn.Parameter(torch.ones(dim))  # so that an item's bias is learned fast

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """x newest first, mask 1.0 where real -> [B, D]."""
        b, length, dim = x_BLD.shape
        ages = torch.arange(length, device=x_BLD.device)
        weights_LG = nn.functional.embedding(ages, self.log_weights.T).exp()
        weights_BLG = mask_BL.unsqueeze(2) * weights_LG
        total_BG = weights_BLG.sum(dim=1).clamp(min=1e-6)
        x_BLGd = x_BLD.reshape(b, length, len(_FORGET), dim // len(_FORGET))
        summed_BGd = (x_BLGd * weights_BLG.unsqueeze(3)).sum(dim=1)
        return self.empty + (summed_BGd / total_BG.sqrt().unsqueeze(2)).reshape(b, dim)

    def prefixes(self, x_BTD: Tensor) -> Tensor:
        """What `forward` gives for every prefix x[:, : t + 1] (oldest first), [B, T, D]."""
        b, length, dim = x_BTD.shape
        steps = torch.arange(length, device=x_BTD.device)
        age_TT = steps.unsqueeze(1) - steps.unsqueeze(0)
        weights_GTT = self.log_weights.exp()[:, age_TT.clamp(min=0)] * (age_TT >= 0)
        x_BGTd = x_BTD.reshape(b, length, len(_FORGET), dim // len(_FORGET)).transpose(1, 2)
        summed_BGTd = weights_GTT @ x_BGTd / weights_GTT.sum(dim=2, keepdim=True).sqrt()
        return self.empty + summed_BGTd.transpose(1, 2).reshape(b, length, dim)


class Scorer(nn.Module):
    """The dense part of NeuMF: vectors of histories, candidates and context -> scores."""

    def __init__(self, dim: int, context: int, hidden: tuple[int, ...], max_len: int) -> None:
        super().__init__()
        self.pool_gmf, self.pool_mlp = Pool(dim, max_len), Pool(dim, max_len)
        self.gmf = nn.Parameter(torch.ones(dim))
        self.from_user = nn.Linear(dim + context, hidden[0])
        self.from_item = nn.Linear(dim, hidden[0], bias=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(hidden))
        self.out = nn.Linear(hidden[-1], 1)

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

    def pairs(self, p_gmf_BD: Tensor, p_mlp_BE: Tensor, gmf_BCD: Tensor, mlp_BCD: Tensor) -> Tensor:
        """Scores [B, C] of pooled users and candidates; candidates may be [C, D], shared by all."""
        linear = (gmf_BCD @ (p_gmf_BD * self.gmf).unsqueeze(-1)).squeeze(-1)
        # the first layer of an MLP over [user; item] is a sum: computed once a user and once an item
        hidden = self.from_user(p_mlp_BE).unsqueeze(-2) + self.from_item(mlp_BCD)
        for layer in self.layers:
            hidden = layer(nn.functional.relu(hidden))
        deep: Tensor = self.out(nn.functional.relu(hidden)).squeeze(-1)
        return linear + deep


class NeuMF(Ranker):
    """GMF and an MLP over pooled histories and candidates."""

    name = "neumf"
    gradient = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 32
        hidden: tuple[int, ...] = (32, 16)  # after the sum of the two sides: halves, as in the paper
        context_dim: int = 8
        max_len: int = 50
        dropout: float = 0.2  # of the pooled history; the pairs' hidden layers are too many to draw for
        loss: Literal["sampled", "bce", "bpr"] = "sampled"
        negatives: int = 256  # shared by the positions of a step
        power: float = 0.5  # negatives are drawn by frequency ** power ...
        uniform_share: float = 0.2  # ... this share of them uniformly

    config: NeuMF.Config
    network: Scorer

    def __init__(self, catalogue: Catalogue, config: NeuMF.Config) -> None:
        super().__init__(catalogue, config)
        if config.dim < 1 or config.dim % len(_FORGET):
            raise ConfigError(f"options.dim {config.dim} is not a multiple of {len(_FORGET)}")
        if min(config.max_len, config.negatives, config.context_dim, *config.hidden, len(config.hidden)) < 1:
            raise ConfigError(
                "max_len, negatives, context_dim and hidden must be at least 1", where="options"
            )
        for name in ("history_gmf", "item_gmf", "history_mlp", "item_mlp"):
            self.tables[name] = DenseTable(catalogue.n_items, config.dim, std=0.05)
        self.columns = sorted(catalogue.context)  # a manifest does not keep their order
        for i, column in enumerate(self.columns):
            self.tables[f"context_{i}"] = DenseTable(catalogue.context[column], config.context_dim, std=0.1)
        self.network = Scorer(
            config.dim,
            config.context_dim * len(self.columns),
            config.hidden,
            config.max_len,
        )

    def batches(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[tuple[SequenceBatch, NDArray[np.int64]]]:
        """Batches of sequences, each with the context of its targets, int64[B, T, columns]."""
        c = self.config
        context = feed.context(data, "train", self.columns)
        for batch in sequence_batches(
            feed.histories(data),
            self.n_items,
            max_len=c.max_len,
            batch_size=batch_size,
            epoch=epoch,
            seed=seed,
            rank=rank,
            world=world,
            negatives=Negatives(c.negatives, "popularity", c.power, c.uniform_share),
            skip=skip,
        ):
            at = np.maximum(batch.at, 0)
            rows = np.zeros((*at.shape, len(self.columns)), dtype=np.int64)
            for i, column in enumerate(self.columns):
                hidden = chances(at, seed, epoch, 5, i) < _UNKNOWN  # by its place: alike at any world size
                rows[..., i] = np.where(hidden, 0, context[column][at])
            yield batch, rows

    def lookups(self, batch: tuple[SequenceBatch, NDArray[np.int64]]) -> dict[str, list[Tensor]]:
        history = [torch.from_numpy(batch[0].inputs)]
        targets, negatives = batch[0].targets, torch.from_numpy(batch[0].negatives)
        items = [torch.from_numpy(targets[targets >= 0]).unsqueeze(1), negatives]
        return {"history_gmf": history, "history_mlp": history, "item_gmf": items, "item_mlp": items}

    def loss(self, batch: tuple[SequenceBatch, NDArray[np.int64]]) -> Tensor:
        sequence, context = batch
        device, net = self.device, self.network
        inputs_BT = torch.from_numpy(sequence.inputs).to(device)
        targets_BT = torch.from_numpy(sequence.targets).to(device)
        negatives_S = torch.from_numpy(sequence.negatives).to(device)
        real = targets_BT >= 0
        targets_P = targets_BT[real]
        with seeded(sequence.seed):
            p_gmf_PD = self._drop(net.pool_gmf.prefixes(self.tables["history_gmf"](inputs_BT))[real])
            p_mlp_PD = self._drop(net.pool_mlp.prefixes(self.tables["history_mlp"](inputs_BT))[real])
            p_mlp_PE = torch.cat([p_mlp_PD, self._context(torch.from_numpy(context).to(device)[real])], -1)
            gmf, mlp = self.tables["item_gmf"], self.tables["item_mlp"]
            positive_P = net.pairs(
                p_gmf_PD, p_mlp_PE, gmf(targets_P.unsqueeze(1)), mlp(targets_P.unsqueeze(1))
            ).squeeze(1)
            negative_PS = net.pairs(p_gmf_PD, p_mlp_PE, gmf(negatives_S), mlp(negatives_S))
        if self.config.loss == "sampled":
            log_q_S = torch.from_numpy(sequence.log_q).to(device)
            summed = sampled_softmax(positive_P, negative_PS, targets_P, negatives_S, log_q_S)
        else:
            by_pairs = {"bce": bce, "bpr": bpr}[self.config.loss]
            summed = by_pairs(positive_P, negative_PS, targets_P, negatives_S)
        return summed / sequence.positions

    def inputs(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> tuple[Tensor, ...]:
        histories = histories.known()
        longest = int(histories.lengths.max(initial=0))
        rows, lengths = histories.padded(max(1, min(longest, self.config.max_len)))
        at = lengths[:, None] - 1 - np.arange(rows.shape[1])  # newest first
        newest = np.where(at >= 0, np.take_along_axis(rows, np.maximum(at, 0), axis=1), -1)
        rows_BL = torch.from_numpy(newest).to(self.device)
        rows_BC = torch.from_numpy(candidates).to(self.device)
        given = np.zeros((len(histories), len(self.columns)), dtype=np.int64)
        for i, column in enumerate(self.columns):
            if context is not None and column in context:
                given[:, i] = context[column]
        t: Any = self.tables
        return (
            t["history_gmf"](rows_BL),
            t["history_mlp"](rows_BL),
            (rows_BL >= 0).float(),
            t["item_gmf"](rows_BC),
            t["item_mlp"](rows_BC),
            self._context(torch.from_numpy(given).to(self.device)),
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

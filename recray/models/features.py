"""Rankers over mixed features: what DLRM and DCN-V2 share is everything but how vectors are crossed.

A user is her contexts and her history; a candidate its id, its categories and its numbers; each becomes
a vector of D floats, the history one or two (`fields.py`).

Trained on histories against negatives (`rankers.py`), or with `loss="labels"` on a log that says what
was not taken, too: each interaction is an example, its label whether its weight is above `label_above`,
and only what was taken is history.

Shapes: P examples (or B users), X context columns, L history items, C candidates, D dims, F category
columns of V vocabularies, G numbers, H own negatives, S shared ones, U vectors of a user, I of an item,
R of a candidate: its own and its share of the history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data import feed
from recray.data.batches import generator
from recray.data.item_features import item_features, vocabulary_of
from recray.data.sequences import PAD, Histories, append
from recray.errors import ConfigError, InputError
from recray.models.base import Catalogue, Context, seeded
from recray.models.embeddings import DenseTable
from recray.models.fields import GROUPS
from recray.models.rankers import TrainedRanker, before, newest_first

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_SCORED = 1 << 12  # examples scored at a time


@dataclass(frozen=True, eq=False)
class Examples:
    """P examples of a step: who was asked about what, and what it is told apart from, or its label."""

    history: NDArray[np.int64]  # [P, L] newest first, PAD where there is none
    context: NDArray[np.int64]  # [P, X]
    own: NDArray[np.int64]  # [P, 1 + H] the item, then negatives of its own
    shared: NDArray[np.int64]  # [S]
    log_q: NDArray[np.float32]  # [P, S + H], see `RankerBatch`
    labels: NDArray[np.float32] | None  # [P] 1 taken, 0 not; None: all were taken
    weights: NDArray[np.float32]  # [P]
    positions: float  # examples of the whole step over `world`
    seed: int  # of this batch on this rank, for dropout


class FeatureRanker(TrainedRanker):
    """Base of the rankers over mixed features; a subclass sets `network` after this `__init__`.

    The network takes what `Fields` takes and gives scores float32[B, C].
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(TrainedRanker.Config):
        dim: int = 32
        hidden: tuple[int, ...] = (64, 32)
        history: Literal["attention", "pool", "off"] = "attention"  # attention has the pool, too
        heads: int = 2
        init: float = 0.05  # deviation of the first vectors
        norm: Literal["each", "pair", "off"] = "each"  # of the vectors that are crossed, see `Fields`
        loss: Literal["sampled", "bce", "bpr", "labels"] = "sampled"
        label_above: float = 0.0  # of labels: the weight above which an interaction was wanted

    config: FeatureRanker.Config
    item_rows: Tensor
    item_numbers: Tensor

    def __init__(self, catalogue: Catalogue, config: FeatureRanker.Config) -> None:
        super().__init__(catalogue, config)
        if min(config.dim, config.heads) < 1 or config.dim % GROUPS or config.dim % config.heads:
            raise ConfigError(f"options.dim {config.dim} is not a multiple of {GROUPS} and of the heads")
        if not config.hidden or min(config.hidden) < 1:
            raise ConfigError("options.hidden must be at least 1")
        if not config.init > 0:
            raise ConfigError(f"options.init is {config.init}", fix="it must be above 0")
        n, names = catalogue.n_items, sorted(catalogue.item_values)
        words = [vocabulary_of(name) for name in names]
        sizes = {word: catalogue.item_values[name] for word, name in zip(words, names)}
        self._groups = [[f for f, word in enumerate(words) if word == mine] for mine in sizes]
        self._value_starts = _starts(sizes.values())
        self._context_starts = _starts(catalogue.context[column] for column in self.columns)
        rows = {
            "item": n,
            "history": 0 if config.history == "off" else n,
            "value": self._value_starts[-1],
            "context": self._context_starts[-1],
        }
        for name, count in rows.items():
            if count:
                self.tables[name] = DenseTable(count, config.dim, std=config.init)
        # where an item's values lie in the table of all vocabularies, -1 for none; filled by `see`
        self.register_buffer("item_rows", torch.full((n, len(names)), PAD, dtype=torch.int32))
        self.register_buffer("item_numbers", torch.zeros(n, catalogue.item_numbers))

    @property
    def widths(self) -> tuple[int, int]:
        """(U, R): how many vectors a user and a candidate have."""
        own = 1 + len(self._groups) + (self.config.history == "attention")
        return len(self.columns) + 1, own + bool(self.catalogue.item_numbers)

    def see(self, data: Dataset) -> None:
        """Take the items' categories and numbers into the buffers."""
        if not (self.catalogue.item_values or self.catalogue.item_numbers):
            return
        found = item_features(data)
        rows = found.categories.copy()
        for group, start in zip(self._groups, self._value_starts):
            for f in group[1:]:
                rows[rows[:, f] == 0, f] = PAD - start  # only the first place has a row for 'unknown'
            rows[:, group] += start
        self.item_rows.copy_(torch.from_numpy(rows))
        self.item_numbers.copy_(torch.from_numpy(found.numbers))

    def batches(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[Examples]:
        share = {"epoch": epoch, "seed": seed, "rank": rank, "world": world, "skip": skip}
        if self.config.loss == "labels":
            yield from self._labelled(data, batch_size=batch_size, **share)
            return
        past = feed.histories(data)
        for batch, context in self.drawn(data, batch_size=batch_size, **share):
            real = batch.at >= 0
            targets = batch.targets[real][:, None]
            yield Examples(
                history=self._before(past, batch.at[real]),
                context=context[real],
                own=np.concatenate([targets, batch.hard], axis=1),
                shared=batch.negatives,
                log_q=batch.log_q,
                labels=None,
                weights=batch.weights,
                positions=batch.positions,
                seed=batch.seed,
            )

    def _labelled(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int
    ) -> Iterator[Examples]:
        """The train interactions in random order, a step's strided over the ranks."""
        log = feed.histories(data, whole=True)
        wanted = self._wanted(log)
        if wanted.all():
            raise InputError(
                f"every interaction weighs more than {self.config.label_above:g}: nothing to tell apart from",
                where=data.artefact.place,
                fix="prepare the log with its rows of weight 0 (--min-weight 0), or set options.label_above",
            )
        context, weigh = feed.context(data, "train", self.columns), self._weights(data)
        taken, places = _only(log, wanted), np.concatenate([[0], np.cumsum(wanted)])
        order = generator(seed, epoch, 1).permutation(len(wanted))
        for number in range(skip, -(-len(order) // batch_size)):
            step = order[number * batch_size : (number + 1) * batch_size]
            whole = np.resize(step, max(len(step), world))  # no rank has an empty share
            at = whole[rank::world]
            user = np.searchsorted(log.offsets, at, side="right") - 1
            yield Examples(
                history=self._rows(taken.items, taken.offsets[user], places[at]),
                context=self.hidden_context(context, at, seed, epoch),
                own=log.items[at][:, None].astype(np.int64),
                shared=np.empty(0, np.int64),
                log_q=np.empty((len(at), 0), np.float32),
                labels=wanted[at].astype(np.float32),
                weights=weigh[at] if len(weigh) else np.ones(len(at), np.float32),
                positions=len(whole) / world,
                seed=int(generator(seed, epoch, 3, number, rank).integers(2**31)),
            )

    def lookups(self, batch: Examples) -> dict[str, list[Tensor]]:
        items = [torch.from_numpy(rows) for rows in (batch.own, batch.shared) if rows.size]
        asked = {
            "item": items,
            "value": [self._value_rows(rows.to(self.device)).cpu() for rows in items],
            "history": [torch.from_numpy(batch.history)],
            "context": [self._context_rows(torch.from_numpy(batch.context))],
        }
        return {name: rows for name, rows in asked.items() if name in self.tables}

    def loss(self, batch: Examples) -> Tensor:
        device = self.device
        own_PCID, own_PCG = self._items(torch.from_numpy(batch.own).to(device))
        if batch.shared.size:
            shared_SID, shared_SG = self._items(torch.from_numpy(batch.shared).to(device))
            p = len(batch.own)
            own_PCID = torch.cat([own_PCID, shared_SID.expand(p, *shared_SID.shape)], dim=1)
            own_PCG = torch.cat([own_PCG, shared_SG.expand(p, *shared_SG.shape)], dim=1)
        user = self._user(torch.from_numpy(batch.history).to(device), torch.from_numpy(batch.context))
        with seeded(batch.seed):
            scores_PC = self.network(*user, own_PCID, own_PCG)  # type: ignore[misc]
        if batch.labels is None:
            own = batch.own.shape[1]
            negatives_PM = torch.cat([scores_PC[:, own:], scores_PC[:, 1:own]], dim=1)
            return self.contrast(scores_PC[:, 0], negatives_PM, batch.log_q, batch.weights, batch.positions)
        labels_P, weights_P = (torch.from_numpy(x).to(device) for x in (batch.labels, batch.weights))
        losses_P = nn.functional.binary_cross_entropy_with_logits(
            scores_PC[:, 0], labels_P, weights_P, reduction="sum"
        )
        return losses_P / batch.positions

    def inputs(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> tuple[Tensor, ...]:
        if self.config.loss == "labels" and histories.weights is not None:
            histories = _only(histories, self._wanted(histories))
        rows = torch.from_numpy(newest_first(histories, self.config.max_len)).to(self.device)
        given = torch.from_numpy(self.given_context(context, len(histories)))
        return (*self._user(rows, given), *self._items(torch.from_numpy(candidates).to(self.device)))

    @torch.inference_mode()
    def labelled(self, data: Dataset, split: str) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Of all n interactions of a split: (whether each was wanted bool[n], its logit float32[n]).

        Each is asked with its own context, and with what its user took in the splits before.
        """
        log = data.interactions(split)
        past = data.histories("train")
        if split == "test" and data.has_split("valid"):
            past = append(past, data.histories("valid"))
        parts = [np.empty(0, np.float32)]
        for start in range(0, len(log.item_rows), _SCORED):
            some = slice(start, start + _SCORED)
            context = {name: rows[some] for name, rows in log.context.items()}
            candidates = log.item_rows[some, None].astype(np.int64)
            found = self.score(past.take(log.user_rows[some]), candidates, context)
            parts.append(found[:, 0].float().cpu().numpy())
        return log.weights > self.config.label_above, np.concatenate(parts)

    def _wanted(self, log: Histories) -> NDArray[np.bool_]:
        if log.weights is None:
            return np.ones(len(log.items), bool)
        return log.weights > self.config.label_above

    def _before(self, past: Histories, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """What came before the interactions at `at`, newest first, int64[P, L]."""
        user = np.searchsorted(past.offsets, at, side="right") - 1
        return self._rows(past.items, past.offsets[user], at)

    def _rows(
        self, items: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        longest = 0 if self.config.history == "off" else int((ends - starts).max(initial=0))
        return before(items, starts, ends, max(1, min(longest, self.config.max_len)))

    def _user(self, history_BL: Tensor, context_BX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(history [B, L, D], mask [B, L], context [B, X, D])."""
        dim = self.config.dim
        if "history" in self.tables:
            history_BLD = self.tables["history"](history_BL)
        else:
            history_BL = history_BL[:, :1] * 0 + PAD
            history_BLD = torch.zeros(*history_BL.shape, dim, device=self.device)
        if "context" in self.tables:
            context_BXD = self.tables["context"](self._context_rows(context_BX).to(self.device))
        else:
            context_BXD = torch.zeros(len(context_BX), 0, dim, device=self.device)
        return history_BLD, (history_BL >= 0).float(), context_BXD

    def _items(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors [..., I, D]: the id, then a vocabulary's mean each; numbers [..., G])."""
        vectors = [self.tables["item"](rows).unsqueeze(-2)]
        if self._groups:
            values = self._value_rows(rows)
            found = self.tables["value"](values)
            for group in self._groups:
                there = (values[..., group] >= 0).sum(-1, keepdim=True).clamp(min=1)
                vectors.append((found[..., group, :].sum(-2) / there).unsqueeze(-2))
        if not self.catalogue.item_numbers:
            return torch.cat(vectors, dim=-2), torch.zeros(*rows.shape, 0, device=rows.device)
        numbers = self.item_numbers[rows.clamp(min=0)] * (rows >= 0).unsqueeze(-1)
        return torch.cat(vectors, dim=-2), numbers

    def _value_rows(self, rows: Tensor) -> Tensor:
        """Rows int64[..., F] in the table of values; PAD where an item has none."""
        found = self.item_rows[rows.clamp(min=0)].long()
        return torch.where((rows >= 0).unsqueeze(-1), found, PAD)

    def _context_rows(self, context: Tensor) -> Tensor:
        """Rows int64[..., X] in the table of contexts; a value out of range is unknown."""
        starts = torch.tensor(self._context_starts)
        return torch.where((context >= 0) & (context < starts.diff()), context, 0) + starts[:-1]


def _starts(sizes: Any) -> list[int]:
    """Where each of several blocks of rows starts, and where the last one ends."""
    return [0, *np.cumsum([*sizes], dtype=np.int64).tolist()]


def _only(log: Histories, keep: NDArray[np.bool_]) -> Histories:
    """The interactions that are kept, without weights."""
    ends = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
    return Histories(log.items[keep], ends[log.offsets])

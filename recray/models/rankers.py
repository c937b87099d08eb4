"""What rankers share in training: contexts, what a position is told apart from, weights, histories.

A position is told apart from S negatives that the step shares and, where a retriever's candidates are
`mined`, from H of the position's own top C. Together they estimate the softmax over the whole catalogue
by strata: its top C from the H, the rest from those of the S that are not among them:

    Z = exp(s_target) + C / H sum_{h in top C} exp(s_h) + sum_{j not in top C} exp(s_j) / (S q_j)

so that a ranker learns most where it will be asked, and its scores still mean what they did without.
What was seen at places that few look at counts for more: weight 1 / propensity (inverse propensity
scores, Joachims et al. 2017, arXiv 1608.04468), scaled to a mean of 1.

Shapes: B windows, T positions of a window, P real positions of a batch (row-major), X context columns,
S shared negatives, H negatives of a position's own, M = S + H, C candidates, L history items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data import feed
from recray.data.batches import Negatives, SequenceBatch, chances, owned, sequence_batches
from recray.data.sequences import PAD, Histories
from recray.errors import ConfigError, InputError
from recray.models.base import Catalogue, Context, ModelConfig, Ranker

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_LEAST = 0.2  # propensities below count as this: none outweighs five, which would be mostly noise


@dataclass(frozen=True, eq=False)
class RankerBatch(SequenceBatch):
    """Windows of a step, and beside them, for its P real positions:"""

    hard: NDArray[np.int64]  # [P, H] negatives of each position's own, PAD where it has none
    log_q: NDArray[np.float32]  # [P, M] what to take off the negatives' scores; infinite: no negative.
    # [B, S] where a window's targets are told together
    weights: NDArray[np.float32]  # [P] of mean about 1


class TrainedRanker(Ranker):
    """A ranker trained by gradient on the windows of histories, with contexts."""

    gradient = True
    ordered = True  # whether a target is told from what came before it, and not from half of its window

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        max_len: int = 50
        loss: Any = "sampled"
        dropout: float = 0.1
        negatives: int = 64  # shared by the positions of a step
        power: float = 0.5  # they are drawn by frequency ** power ...
        uniform_share: float = 0.2  # ... this share of them uniformly
        hard: int = 16  # negatives of a position's own, where a retriever's candidates are given
        unknown: float = 0.1  # share of training contexts that are hidden, so that 'unknown' is learned too
        propensity: str = ""  # the context column with the chance of having been examined; it is no input

    config: TrainedRanker.Config

    def __init__(self, catalogue: Catalogue, config: TrainedRanker.Config) -> None:
        super().__init__(catalogue, config)
        if min(config.max_len, config.negatives) < 1 or config.hard < 0:
            raise ConfigError("max_len and negatives must be at least 1, hard at least 0", where="options")
        if not (0 <= config.unknown < 1 and 0 <= config.uniform_share <= 1):
            raise ConfigError("unknown and uniform_share are shares, within 0 and 1", where="options")
        if config.power < 0 or not 0 <= config.dropout < 1:
            raise ConfigError("power must be at least 0 and dropout lie in [0, 1)", where="options")
        if config.propensity and config.propensity not in catalogue.context:
            raise ConfigError(
                f"options.propensity is {config.propensity!r}, which is no context column of the dataset",
                fix=f"prepare it with --context {config.propensity}",
            )
        # a manifest does not keep their order
        self.columns = sorted(set(catalogue.context) - {config.propensity})

    @property
    def by_window(self) -> bool:
        """Whether nothing distinguishes what the targets of a window are told from and apart from."""
        return not (self.ordered or self.columns) and self.mined is None and self.config.loss == "sampled"

    def drawn(
        self, data: Dataset, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int
    ) -> Iterator[tuple[RankerBatch, NDArray[np.int64]]]:
        """Batches of windows with their negatives, each with its targets' context, int64[B, T, X]."""
        c = self.config
        context, weigh = feed.context(data, "train", self.columns), self._weights(data)
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
            ordered=self.ordered,
        ):
            at_P = batch.at[batch.at >= 0]
            if self.by_window:
                hard_PH = np.empty((len(at_P), 0), np.int64)
                log_q = np.where(owned(batch), np.float32(np.inf), batch.log_q)
            else:
                hard_PH, log_q = self._told_apart(batch, at_P, seed, epoch)
            told = RankerBatch(
                **{field.name: getattr(batch, field.name) for field in dataclasses.fields(SequenceBatch)}
                | {"hard": hard_PH, "log_q": log_q, "weights": weigh[at_P] if len(weigh) else _ones(at_P)}
            )
            yield told, self.hidden_context(context, np.maximum(batch.at, 0), seed, epoch)

    def hidden_context(
        self, context: Context, at: NDArray[np.int64], seed: int, epoch: int
    ) -> NDArray[np.int64]:
        """Context rows int64[..., X] of the interactions at `at`, a share of them 0, the unknown.

        Which ones follows from their place, so they are the same at any world size.
        """
        rows = np.zeros((*at.shape, len(self.columns)), dtype=np.int64)
        for i, column in enumerate(self.columns):
            hidden = chances(at, seed, epoch, 5, i) < self.config.unknown
            rows[..., i] = np.where(hidden, 0, context[column][at])
        return rows

    def given_context(self, context: Context | None, count: int) -> NDArray[np.int64]:
        """Context rows int64[count, X] as they are asked with; 0 where a column is not given."""
        rows = np.zeros((count, len(self.columns)), dtype=np.int64)
        for i, column in enumerate(self.columns):
            if context is not None and column in context:
                rows[:, i] = context[column]
        return rows

    def contrast(
        self,
        positive_P: Tensor,
        negative_PM: Tensor,
        log_q_PM: NDArray[np.float32],
        weights_P: NDArray[np.float32],
        positions: float,
    ) -> Tensor:
        """The mean loss of a step's positions, a scalar; as `RankerBatch` has the last three.

        negative_PM: scores of the shared negatives, then of each position's own.
        """
        log_q, weights = (torch.from_numpy(x).to(self.device) for x in (log_q_PM, weights_P))
        return (losses_of(self.config.loss, positive_P, negative_PM, log_q) * weights).sum() / positions

    def _told_apart(
        self, batch: SequenceBatch, at_P: NDArray[np.int64], seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(own negatives int64[P, H], log_q float32[P, M]) of the real positions."""
        targets_P = batch.targets[batch.at >= 0]
        shut_PS = targets_P[:, None] == batch.negatives
        count = 0 if self.mined is None else self.config.hard
        hard_PH = np.empty((len(at_P), count), np.int64)
        log_hard_P = np.empty(len(at_P), np.float32)
        if count:
            assert self.mined is not None
            top_PC = self.mined[at_P] - 1
            there_P = (top_PC >= 0).sum(axis=1)  # the first so many
            draws = chances(at_P[:, None] * count + np.arange(count), seed, epoch, 6)
            picked = (draws * there_P[:, None]).astype(np.int64)
            hard_PH = np.take_along_axis(top_PC, picked, axis=1).astype(np.int64)
            log_hard_P = np.log(count / np.maximum(there_P, 1)).astype(np.float32)
            for c in range(top_PC.shape[1]):
                shut_PS |= top_PC[:, c : c + 1] == batch.negatives
        log_q_PS = np.where(shut_PS, np.float32(np.inf), batch.log_q)
        log_q_PH = np.where(hard_PH < 0, np.float32(np.inf), log_hard_P[:, None])
        return hard_PH, np.concatenate([log_q_PS, log_q_PH], axis=1).astype(np.float32)

    def _weights(self, data: Dataset) -> NDArray[np.float32]:
        """float32[n] weights of the train interactions; empty where all are alike."""
        column = self.config.propensity
        if not column:
            return np.empty(0, np.float32)
        rows = feed.context(data, "train", [column])[column]
        return inverse_propensities(data.context_values[column], np.bincount(rows))[rows]


def inverse_propensities(values: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """Weight of each value row, float32[R]: 1 / propensity over their mean; 1 where it is no number.

    counts: int64[<= R], how often each row is there. Raises InputError where none is a number in (0, 1].
    """
    p = np.array([_number(value) for value in values])
    known = (p > 0) & (p <= 1)
    counts = np.pad(counts, (0, len(p) - len(counts)))
    inverse = 1 / np.maximum(np.where(known, p, 1.0), _LEAST)
    seen = counts[known].sum()
    if not seen:
        raise InputError("the column of propensities holds no number above 0 and up to 1")
    mean = (inverse * counts)[known].sum() / seen
    return np.where(known, inverse / mean, 1.0).astype(np.float32)


def losses_of(
    kind: Literal["sampled", "bce", "bpr"], positive_P: Tensor, negative_PM: Tensor, log_q_PM: Tensor
) -> Tensor:
    """The loss of each position, float32[P].

    sampled: softmax with the log-Q correction (Bengio & Senecal 2008); bce: binary cross-entropy, all
    negatives weighing as much as the positive; bpr: Rendle et al. 2009, a mean over the negatives.
    """
    if kind == "sampled":
        logits = torch.cat([positive_P.unsqueeze(1), negative_PM - log_q_PM], dim=1)
        return logits.float().logsumexp(1) - positive_P
    wrong = negative_PM if kind == "bce" else negative_PM - positive_P.unsqueeze(1)
    pairs_P = nn.functional.softplus(wrong).masked_fill(torch.isinf(log_q_PM), 0.0).mean(dim=1)
    return pairs_P + nn.functional.softplus(-positive_P) if kind == "bce" else pairs_P


def newest_first(histories: Histories, max_len: int) -> NDArray[np.int64]:
    """Known item rows int64[B, L], newest first, right-padded with PAD; 1 <= L <= max_len."""
    histories = histories.known()
    ends = histories.offsets[1:]
    longest = int(histories.lengths.max(initial=0))
    return before(histories.items, histories.offsets[:-1], ends, max(1, min(longest, max_len)))


def before(
    items: NDArray[np.int32], starts: NDArray[np.int64], ends: NDArray[np.int64], length: int
) -> NDArray[np.int64]:
    """The rows in items[starts[p] : ends[p]], newest (last) first, the newest `length`: int64[P, length]."""
    at = ends[:, None] - 1 - np.arange(length)
    if not len(items):
        return np.full(at.shape, PAD, np.int64)
    return np.where(at >= starts[:, None], items[np.maximum(at, 0)], PAD).astype(np.int64)


def _ones(at_P: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.ones(len(at_P), np.float32)


def _number(value: str) -> float:
    try:
        return float(value)
    except ValueError:
        return float("nan")

"""Batches of histories for gradient training, the same for the same (epoch, seed, rank, world).

Histories are cut into windows, and shuffled windows into steps. Within a step they are sorted by length
and handed to a model in `parts` of near length, so that little is padding. Steps are any windows:
a mean over the positions of a step of short windows would give each of them more weight than
one of a step of long windows has (measured in benchmarks/LOG.md).

Every rank works out the same steps and takes its strided share of each: a step has the same windows and
negatives at every world size, and the ranks have equally many batches. Histories may lie in mapped
files: only what a batch holds is read of them.

Shapes: U users, W windows of the epoch, P windows of a step, B of them this rank's, L their longest,
S negatives, N items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from recray.data.sequences import PAD, Histories

Sampling = Literal["uniform", "popularity", "in-batch"]

_GROWTH = 1.5  # of the longest window of a part over its shortest
_TOLD = 0.5  # of a window without an order: what its user is told from
_COUNTED = 1 << 20  # items counted at a time: numpy counts int64 and would copy the whole log


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """This rank's windows of one step, shifted by one: `targets[b, t]` follows `inputs[b, :t + 1]`.

    Without an order `inputs` holds a random half of a window, at its places, and `targets` all of it.

    The shortest window comes first.
    """

    inputs: NDArray[np.int64]  # [B, L] item rows, right-padded with PAD
    targets: NDArray[np.int64]  # [B, L]
    lengths: NDArray[np.int64]  # [B] real positions
    at: NDArray[np.int64]  # [B, L] where each target lies in the histories' flat arrays, PAD as above
    negatives: NDArray[np.int64]  # [S] item rows shared by all positions; empty when none were asked for
    log_q: NDArray[np.float32]  # [S] log of the expected number of times each was drawn
    positions: float  # real positions of the whole step over `world`: divide a summed loss by it
    seed: int  # of this batch on this rank, for dropout
    epoch: int

    def parts(self) -> Iterator[SequenceBatch]:
        """The same windows some at a time, each part padded to its own longest; in the same order."""
        start = 0
        while start < len(self.lengths):
            most = int(self.lengths[start] * _GROWTH) + 1
            stop = int(np.searchsorted(self.lengths, most, side="right"))
            rows, longest = slice(start, stop), int(self.lengths[stop - 1])
            yield replace(
                self,
                inputs=self.inputs[rows, :longest],
                targets=self.targets[rows, :longest],
                lengths=self.lengths[rows],
                at=self.at[rows, :longest],
            )
            start = stop


@dataclass(frozen=True, eq=False)
class Negatives:
    """How negatives are drawn: `count` rows a step, alike on every rank; all items once from N on.

    'popularity' draws by frequency ** power, 'in-batch' takes the step's own targets (of all ranks),
    which is drawing by frequency. With both, `uniform_share` of the draws are uniform, so that no item
    has probability zero (Yang et al. 2020, "Mixed negative sampling").
    """

    count: int
    sampling: Sampling = "uniform"
    power: float = 1.0
    uniform_share: float = 0.0


def owned(batch: SequenceBatch) -> NDArray[np.bool_]:
    """Which negatives lie in each window, bool[B, S]."""
    distinct, places_S = np.unique(batch.negatives, return_inverse=True)
    found_BL = np.searchsorted(distinct, batch.targets)
    found_BL[found_BL == len(distinct)] = 0
    there = distinct[found_BL] == batch.targets
    marks = np.zeros((len(batch.targets), len(distinct)), bool)
    marks[np.nonzero(there)[0], found_BL[there]] = True
    return marks[:, places_S]


def generator(*words: int) -> np.random.Generator:
    """A generator that depends on these whole numbers and nothing else."""
    return np.random.default_rng(np.random.SeedSequence([w & 0xFFFFFFFF for w in words]))


def chances(at: NDArray[np.int64], *words: int) -> NDArray[np.float64]:
    """A uniform number in [0, 1) for each place, float64 of the same shape: the same wherever it is asked.

    The mixing function of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA) over a seed from `words`.
    """
    with np.errstate(over="ignore"):
        key = generator(*words).integers(2**64, dtype=np.uint64)
        z = (at.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    made: NDArray[np.float64] = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return made


@dataclass(frozen=True, eq=False)
class Windows:
    """The W windows of histories, worked out when asked for: only 8 bytes a user are held.

    Consecutive windows share one interaction, so every interaction but a user's first is the target
    of exactly one position. Cut from the newest backwards: only a user's oldest window may be short.
    Without an order nothing is shared, a user's windows are of nearly one size, and every interaction is a
    target, also the first: in a file sorted by item that would be the same few for everybody.
    """

    offsets: NDArray[np.int64]  # [U + 1] of the histories
    first: NDArray[np.int64]  # [U + 1] the number of each user's first (newest) window, then W
    max_len: int
    ordered: bool = True

    def __len__(self) -> int:
        return int(self.first[-1])

    def spans(self, which: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(starts, lengths), int64 like `which`, in the flat arrays.

        2 to max_len + 1 interactions each, or without an order up to max_len.
        """
        user = np.searchsorted(self.first, which, side="right") - 1
        nth = which - self.first[user]
        if not self.ordered:
            size = self.offsets[user + 1] - self.offsets[user]
            count = self.first[user + 1] - self.first[user]
            starts, ends = (self.offsets[user] + size * n // count for n in (nth, nth + 1))
            return starts, ends - starts
        ends = self.offsets[user + 1] - nth * self.max_len
        starts = np.maximum(ends - self.max_len - 1, self.offsets[user])
        return starts, ends - starts


def windows(histories: Histories, max_len: int, *, ordered: bool = True) -> Windows:
    """Cut histories into windows of at most max_len + 1 interactions, or without an order max_len.

    Who has one interaction has none: there is nothing to tell it from.
    """
    sizes, first = histories.lengths, np.zeros(len(histories.offsets), np.int64)
    read = np.maximum(sizes - 1, 0) if ordered else np.where(sizes > 1, sizes, 0)
    np.cumsum(-(-read // max_len), out=first[1:])
    return Windows(histories.offsets, first, max_len, ordered)


@dataclass(frozen=True, eq=False)
class Step:
    """The windows of one step over all ranks, the shortest first, by their places in the flat arrays."""

    number: int  # of the epoch, from 0
    starts: NDArray[np.int64]  # [P]
    lengths: NDArray[np.int64]  # [P]
    first: int  # place of a window's first target: 1, or 0 without an order


def steps(cut: Windows, batch_size: int, *, epoch: int, seed: int, skip: int = 0) -> Iterator[Step]:
    """The epoch's ceil(W / batch_size) steps from number `skip` on; those before are not worked out."""
    if not len(cut):
        return
    order = np.arange(len(cut), dtype=np.uint32 if len(cut) < 2**32 else np.int64)
    generator(seed, epoch, 1).shuffle(order)
    count = -(-len(order) // batch_size)
    for number in range(skip, count):  # of nearly equal size: no small rest
        some = order[number * len(order) // count : (number + 1) * len(order) // count]
        starts, lengths = cut.spans(some.astype(np.int64))
        by_length = np.argsort(lengths, kind="stable")
        yield Step(number, starts[by_length], lengths[by_length], int(cut.ordered))


def sequence_batches(
    histories: Histories,
    n_items: int,
    *,
    max_len: int,
    batch_size: int,
    epoch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    negatives: Negatives | None = None,
    skip: int = 0,
    ordered: bool = True,
) -> Iterator[SequenceBatch]:
    """This rank's share of one epoch over the windows of all histories, without its first `skip` steps.

    ordered: a target follows its inputs; else all of a window is to be told from a random half of it.
    """
    drawer = None if negatives is None else _Drawer(negatives, histories, n_items, ordered)
    cut = windows(histories, max_len, ordered=ordered)
    for step in steps(cut, batch_size, epoch=epoch, seed=seed, skip=skip):
        # repeated where a step has fewer windows than ranks, so that no rank has an empty share
        whole = np.resize(np.arange(len(step.starts)), max(len(step.starts), world))
        starts, sizes = step.starts[whole[rank::world]], step.lengths[whole[rank::world]]
        columns = np.arange(sizes.max())
        at = np.where(columns < sizes[:, None], starts[:, None] + columns, PAD)
        tokens = np.where(at >= 0, histories.items[at], PAD).astype(np.int64)
        drawn, log_q = np.empty(0, np.int64), np.empty(0, np.float32)
        if drawer is not None:
            drawn, log_q = drawer(step, generator(seed, epoch, 2, step.number))
        # an input is what has a target after it: the newest interaction of a window only is a target
        first, lengths = step.first, sizes - step.first
        places = columns[: len(columns) - first]
        read = places < lengths[:, None]
        if not ordered:
            read &= chances(at, seed, epoch, 7) < _TOLD
        yield SequenceBatch(
            inputs=np.where(read, tokens[:, : len(places)], PAD),
            targets=tokens[:, first:],
            lengths=lengths,
            at=at[:, first:],
            negatives=drawn,
            log_q=log_q,
            positions=float((step.lengths[whole] - first).sum()) / world,
            seed=int(generator(seed, epoch, 3, step.number, rank).integers(2**31)),
            epoch=epoch,
        )


class _Drawer:
    """Draws negatives. Holds the cumulative law of one draw, float64[N], unless it is uniform."""

    def __init__(self, how: Negatives, histories: Histories, n_items: int, ordered: bool) -> None:
        self.how, self.items, self.n_items = how, histories.items, n_items
        self.law: NDArray[np.float64] | None = None
        if how.sampling != "uniform":
            counts = frequencies(histories.items, n_items)
            if how.sampling == "in-batch":  # what is drawn from is targets: see `Windows`
                never = histories.offsets[:-1][histories.lengths > 0 if ordered else histories.lengths == 1]
                counts -= np.bincount(histories.items[never], minlength=n_items)
            power = 1.0 if how.sampling == "in-batch" else how.power
            self.law = _cumulative(counts, power, how.uniform_share)

    def __call__(self, step: Step, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(rows int64[S], log of how often each is expected among them float32[S])"""
        count = self.how.count
        if count >= self.n_items:
            return np.arange(self.n_items), np.zeros(self.n_items, np.float32)
        if self.law is None:
            return rng.integers(self.n_items, size=count), np.full(count, np.log(count / self.n_items), "f4")
        if self.how.sampling == "in-batch":
            drawn = self._targets(step, rng)
            if self.how.uniform_share:
                any_item = rng.random(count) < self.how.uniform_share
                drawn[any_item] = rng.integers(self.n_items, size=int(any_item.sum()))
        else:
            drawn = np.searchsorted(self.law, rng.random(count), side="right")
        q = self.law[drawn] - np.where(drawn > 0, self.law[drawn - 1], 0)
        return drawn, np.log(q * count).astype(np.float32)

    def _targets(self, step: Step, rng: np.random.Generator) -> NDArray[np.int64]:
        """Any of the step's targets, each alike; only those drawn are read."""
        targets = step.lengths - step.first
        ends = np.cumsum(targets)
        nth = rng.integers(ends[-1], size=self.how.count)
        w = np.searchsorted(ends, nth, side="right")
        return self.items[step.starts[w] + step.first + nth - (ends - targets)[w]].astype(np.int64)


def frequencies(items: NDArray[np.int32], n_items: int) -> NDArray[np.int64]:
    """int64[N]: how often each item is there, without a copy of the log."""
    made = np.zeros(n_items, np.int64)
    some = max(_COUNTED, n_items)
    for start in range(0, len(items), some):
        made += np.bincount(items[start : start + some], minlength=n_items)
    return made


def _cumulative(counts: NDArray[np.int64], power: float, uniform: float) -> NDArray[np.float64]:
    """float64[N]: how likely one draw is an item up to each, by counts ** power mixed with uniform."""
    law: NDArray[np.float64] = counts / max(counts.max(initial=0), 1)  # no power of it overflows
    law **= power
    law *= (1 - uniform) / max(law.sum(), 1e-12)
    law += uniform / len(law)
    np.cumsum(law, out=law)
    law /= law[-1] or 1.0  # of an empty log
    return law

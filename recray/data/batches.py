"""Batches of histories for gradient training, the same for the same (epoch, seed, rank, world).

Histories are cut into windows; a chunk of shuffled windows is sorted by length and split into steps,
so that a step pads only to its own longest window. Every rank works out the same steps and takes its
strided share of each: the union over ranks is the epoch, and the ranks have equally many batches.

Shapes: W windows of the epoch, B windows of this rank's batch, L their longest, S negatives, N items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recray.data.sequences import PAD, Histories

Sampling = Literal["uniform", "popularity", "in-batch"]

_CHUNK = 32  # steps whose windows are sorted by length together


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """This rank's windows of one step, shifted by one: `targets[b, t]` follows `inputs[b, :t + 1]`."""

    inputs: NDArray[np.int64]  # [B, L] item rows, right-padded with PAD
    targets: NDArray[np.int64]  # [B, L]
    lengths: NDArray[np.int64]  # [B] real positions
    at: NDArray[np.int64]  # [B, L] where each target lies in the histories' flat arrays, PAD as above
    negatives: NDArray[np.int64]  # [S] item rows shared by all positions; empty when none were asked for
    log_q: NDArray[np.float32]  # [S] log of the expected number of times each was drawn
    positions: float  # real positions of the whole step over `world`: divide a summed loss by it
    seed: int  # of this batch on this rank, for dropout


@dataclass(frozen=True, eq=False)
class Negatives:
    """How negatives are drawn: `count` rows a step, alike on every rank unless 'in-batch'.

    'popularity' draws by frequency ** power, mixed with `uniform_share` of uniform draws so that no
    item has probability zero; 'in-batch' takes the step's own targets, which is drawing by frequency.
    """

    count: int
    sampling: Sampling = "uniform"
    power: float = 1.0
    uniform_share: float = 0.0


def generator(*words: int) -> np.random.Generator:
    """A generator that depends on these whole numbers and nothing else."""
    return np.random.default_rng(np.random.SeedSequence([w & 0xFFFFFFFF for w in words]))


def windows(histories: Histories, max_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cut histories into (starts int64[W], lengths int64[W]) of at most max_len + 1 interactions.

    Consecutive windows share one interaction, so every interaction but a user's first is the target
    of exactly one position. Cut from the newest backwards: only a user's oldest window may be short.
    """
    targets = np.maximum(histories.lengths - 1, 0)
    counts = -(-targets // max_len)
    user = np.repeat(np.arange(len(histories)), counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # 0 = the newest
    ends = histories.offsets[1:][user] - nth * max_len
    starts = np.maximum(ends - max_len - 1, histories.offsets[:-1][user])
    return starts, ends - starts


def steps(lengths: NDArray[np.int64], batch_size: int, *, epoch: int, seed: int) -> list[NDArray[np.int64]]:
    """The epoch's steps over all ranks: index arrays into `lengths` of about equal, near-sorted length."""
    if not len(lengths):
        return []
    rng = generator(seed, epoch, 1)
    order = rng.permutation(len(lengths))
    made: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_size * _CHUNK):
        chunk = order[start : start + batch_size * _CHUNK]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        made += np.array_split(chunk, -(-len(chunk) // batch_size))
    return [made[i] for i in rng.permutation(len(made))]


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
) -> Iterator[SequenceBatch]:
    """This rank's share of one epoch over the windows of all histories."""
    starts, sizes = windows(histories, max_len)
    q_N = None if negatives is None else _probabilities(histories, n_items, negatives)
    for number, step in enumerate(steps(sizes, batch_size, epoch=epoch, seed=seed)):
        if len(step) < world:
            step = np.resize(step, world)  # repeated, so that no rank has an empty share
        mine = step[rank::world]
        width = int(sizes[mine].max())
        columns = np.arange(width)
        at = np.where(columns < sizes[mine, None], starts[mine, None] + columns, PAD)
        tokens = np.where(at >= 0, histories.items[at], PAD).astype(np.int64)
        drawn, log_q = np.empty(0, np.int64), np.empty(0, np.float32)
        if negatives is not None and q_N is not None:
            drawn = _draw(negatives, q_N, tokens[:, 1:], generator(seed, epoch, 2, number))
            log_q = np.log(q_N[drawn] * len(drawn)).astype(np.float32)
        lengths = sizes[mine] - 1
        # an input is what has a target after it: the newest interaction of a window only is a target
        inputs = np.where(np.arange(width - 1) < lengths[:, None], tokens[:, :-1], PAD)
        yield SequenceBatch(
            inputs=inputs,
            targets=tokens[:, 1:],
            lengths=lengths,
            at=at[:, 1:],
            negatives=drawn,
            log_q=log_q,
            positions=float((sizes[step] - 1).sum()) / world,
            seed=int(generator(seed, epoch, 3, number, rank).integers(2**31)),
        )


def _probabilities(histories: Histories, n_items: int, how: Negatives) -> NDArray[np.float64]:
    """How likely one draw is each item, float64[N]."""
    if how.sampling == "uniform":
        return np.full(n_items, 1 / n_items)
    power, uniform = (1.0, 0.0) if how.sampling == "in-batch" else (how.power, how.uniform_share)
    mass = np.bincount(histories.items, minlength=n_items).astype(np.float64) ** power
    mass /= max(mass.sum(), 1e-12)
    return (1 - uniform) * mass + uniform / n_items


def _draw(
    how: Negatives, q_N: NDArray[np.float64], targets: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    if how.sampling == "in-batch":
        return rng.choice(targets[targets >= 0], how.count)
    if how.sampling == "uniform":
        return rng.integers(len(q_N), size=how.count)
    return rng.choice(len(q_N), how.count, p=q_N).astype(np.int64)

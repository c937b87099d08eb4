"""Histories: one sequence of item rows per user, ragged, oldest first.

Shapes: B users, N their interactions together, L the longest (or the cut) length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAD = -1  # what `padded` puts where a history has no item


@dataclass(frozen=True, eq=False)
class Histories:
    """B ragged sequences in CSR form: user b's items are `items[offsets[b]:offsets[b + 1]]`.

    items: int32[N] item rows, oldest first; offsets: int64[B + 1];
    weights: float32[N] or None; times: int64[N] unix seconds or None.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32] | None = None
    times: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64[B]"""
        return self.offsets[1:] - self.offsets[:-1]

    def __getitem__(self, b: int) -> NDArray[np.int32]:
        """The item rows of one user."""
        return self.items[self.offsets[b] : self.offsets[b + 1]]

    @staticmethod
    def of(sequences: Iterable[Sequence[int] | NDArray[Any]]) -> Histories:
        """From Python lists of item rows."""
        parts = [np.asarray(s, dtype=np.int32) for s in sequences]
        offsets = np.array([0, *itertools.accumulate(map(len, parts))], dtype=np.int64)
        return Histories(np.concatenate(parts) if parts else np.empty(0, np.int32), offsets)

    def take(self, users: Any) -> Histories:
        """The histories of some users, in the given order: int array, bool mask or slice over B."""
        picked = np.arange(len(self))[users]
        lengths = self.lengths[picked]
        return self._gather(self.offsets[:-1][picked], lengths)

    def last(self, n: int) -> Histories:
        """At most the n newest interactions of each user."""
        lengths = np.minimum(self.lengths, n)
        return self._gather(self.offsets[1:] - lengths, lengths)

    def without_last(self, n: int = 1) -> Histories:
        """Each history with its n newest interactions cut off."""
        lengths = np.maximum(self.lengths - n, 0)
        return self._gather(self.offsets[:-1], lengths)

    def known(self) -> Histories:
        """Each history without what is no item row of ours (PAD): an unknown item is as if not there."""
        if self._all_known:
            return self
        keep = self.items >= 0
        kept = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
        return Histories(
            self.items[keep],
            kept[self.offsets],
            None if self.weights is None else self.weights[keep],
            None if self.times is None else self.times[keep],
        )

    @cached_property
    def _all_known(self) -> bool:
        """Asked several times of what is answered."""
        return bool((self.items >= 0).all())

    def padded(self, length: int | None = None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows int64[B, L] right-padded with PAD, lengths int64[B]); keeps the newest `length`."""
        lengths = self.lengths
        width = int(lengths.max(initial=0)) if length is None else length
        lengths = np.minimum(lengths, width)
        places = np.arange(width)
        rows = np.full((len(self), width), PAD, dtype=np.int64)
        if len(self.items):
            at = (self.offsets[1:] - lengths)[:, None] + places
            np.copyto(rows, self.items.take(at, mode="clip"), where=places < lengths[:, None])
        return rows, lengths

    def to_csr(self, n_items: int, *, weighted: bool = False) -> Any:
        """scipy.sparse.csr_matrix float32[B, n_items]; repeated items are summed (counted)."""
        from scipy import sparse

        values = (
            self.weights if weighted and self.weights is not None else np.ones(len(self.items), np.float32)
        )
        shape = (len(self), n_items)
        made = sparse.csr_matrix((values, self.items, self.offsets), shape=shape, copy=True)
        made.sum_duplicates()  # in place, hence the copy: the histories keep their order
        return made

    def _gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Histories:
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        at = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Histories(
            self.items[at],
            offsets,
            None if self.weights is None else self.weights[at],
            None if self.times is None else self.times[at],
        )


def concat(parts: Sequence[Histories]) -> Histories:
    """Histories of several groups of users, one after the other."""
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))]).astype(np.int64)
    weights = [p.weights for p in parts]
    times = [p.times for p in parts]
    return Histories(
        np.concatenate([p.items for p in parts]),
        offsets,
        None if any(w is None for w in weights) else np.concatenate(weights),  # type: ignore[arg-type]
        None if any(t is None for t in times) else np.concatenate(times),  # type: ignore[arg-type]
    )


def append(first: Histories, then: Histories) -> Histories:
    """User by user, `then`'s interactions after `first`'s (both of B users)."""
    if len(first) != len(then):
        raise ValueError(f"{len(first)} and {len(then)} users")
    both = concat([first, then])
    b = len(first)
    order = np.arange(2 * b).reshape(2, b).T.reshape(-1)
    mixed = both.take(order)
    return Histories(mixed.items, mixed.offsets[::2].copy(), mixed.weights, mixed.times)

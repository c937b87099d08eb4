"""The order of one list beyond its scores: pins, caps and diversity, as pure functions of rows.

Pinned items have their places from the start, and count for the caps and for what is alike. Then place
after place takes the best item that is left and that the caps let in, where best is by maximal marginal
relevance (Carbonell & Goldstein 1998, with lambda = 1 - diversity):

    (1 - diversity) * relevance(i) - diversity * max over chosen j of cosine(i, j)

relevance is the score, taken to 0..1 over the pool; of nothing chosen the maximum is 0. Equal values go by
the pool's order, so without diversity that order stays.

Shapes: P items of the pool, best first; D dims; N items of the catalogue; k places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recray.data.sequences import Histories

WIDER = 4  # items a place that diversity may choose from, at least
GROW = 8  # how many times more is looked through where the caps want more

Groups = Mapping[str, Histories]  # column -> the value rows of each item, maybe none
Find = Callable[[NDArray[np.bool_], int], NDArray[np.int64]]
"""(allowed bool[N], count) -> the rows of one user's best of them, best first, -1 where there are no more."""


@dataclass(frozen=True)
class Rules:
    """How the k places of a list are given away besides by score.

    pins: (place from 0, or -1 for the first that is free; item row). caps: (column, at most so many items
    of each of its values). diversity: 0 = the order as it is .. 1 = as unlike as can be.
    """

    k: int
    pins: tuple[tuple[int, int], ...] = ()
    caps: tuple[tuple[str, int], ...] = ()
    diversity: float = 0.0

    def pool(self, depth: int) -> int:
        """How many items to choose from where `depth` would be retrieved without rules."""
        return max(depth, WIDER * self.k) if self.diversity else depth

    @property
    def extra(self) -> int:
        """How many items may be added to the pool: pins that are not in it, and what the caps want more."""
        return len(self.pins) + (self.k if self.caps else 0)


class Room:
    """Counts what was taken of each value, and says what else fits under the caps."""

    def __init__(self, caps: Sequence[tuple[str, int]], groups: Groups) -> None:
        self._caps = [(groups[column], most, dict[int, int]()) for column, most in caps]

    def has(self, row: int) -> bool:
        """Whether one more such item keeps every cap."""
        return all(count.get(v, 0) < most for of, most, count in self._caps for v in of[row].tolist())

    def take(self, row: int) -> None:
        """Count an item, whether it fits or not."""
        for of, _, count in self._caps:
            for value in of[row].tolist():
                count[value] = count.get(value, 0) + 1

    def open(self) -> NDArray[np.bool_]:
        """bool[N]: the items that still fit."""
        made: NDArray[np.bool_] | None = None
        for of, most, count in self._caps:
            full = np.isin(of.items, [value for value, held in count.items() if held >= most])
            owner = np.repeat(np.arange(len(of)), of.lengths)
            left = np.bincount(owner, full, minlength=len(of)) == 0
            made = left if made is None else made & left
        assert made is not None
        return made


def fill(
    rows_P: NDArray[np.int64], pinned: Sequence[int], rules: Rules, groups: Groups, find: Find
) -> list[int]:
    """Items beyond a pool, best first, with which the caps can be kept and k places be given away.

    pinned: rows that have a place in any case. None where the pool will do; fewer than are missing where
    the catalogue has no more.
    """
    given = rows_P[rows_P >= 0].tolist()
    room, taken, more = Room(rules.caps, groups), set(pinned), list[int]()
    for row in taken:
        room.take(row)

    def look(rows: Sequence[int]) -> list[int]:
        found = []
        for row in rows:
            if len(taken) >= rules.k:
                break
            if row not in taken and room.has(row):
                room.take(row)
                taken.add(row)
                found.append(row)
        return found

    look(given)
    count = len(rows_P)
    while len(taken) < rules.k and count == len(given):
        allowed = room.open()
        count = min(count * GROW, int(allowed.sum()))
        rows = find(allowed, count) if count else rows_P[:0]
        given = rows[rows >= 0].tolist()
        more += look(given)
        if count == int(allowed.sum()):
            break
    return more


def arranged(
    scores_P: NDArray[np.float32],
    rows_P: NDArray[np.int64],
    rules: Rules,
    groups: Groups | None = None,
    vectors_PD: NDArray[np.float32] | None = None,
) -> NDArray[np.int64]:
    """Where in the pool the items of the list lie, place by place, int64[at most k].

    scores_P fall; rows_P are -1 where there is no item. A pin that is not in the pool is left out.
    vectors_PD: what diversity compares, by cosine; wanted only where the rules ask for it.
    """
    at = {row: place for place, row in enumerate(rows_P.tolist()) if row >= 0}
    fixed = _fixed(rules, at)
    room, open_P = Room(rules.caps, groups or {}), rows_P >= 0
    open_P[list(fixed.values())] = False  # and no measure of the others
    apart = _Apart(scores_P, open_P, vectors_PD, rules.diversity) if rules.diversity else None
    for pin in fixed.values():
        room.take(int(rows_P[pin]))
        if apart is not None:
            apart.take(pin)
    made: list[int] = []
    for place in range(rules.k):
        if place in fixed:
            made.append(fixed[place])
            continue
        while open_P.any():
            best = int(open_P.argmax()) if apart is None else apart.best(open_P)
            open_P[best] = False
            if room.has(int(rows_P[best])):
                room.take(int(rows_P[best]))
                if apart is not None:
                    apart.take(best)
                made.append(best)
                break
    return np.array(made, np.int64)


def reaching(
    places: NDArray[np.int64],
    order_P: NDArray[np.int64],
    scores_P: NDArray[np.float32],
    rows_P: NDArray[np.int64],
    rules: Rules,
    groups: Groups | None = None,
    vectors_PD: NDArray[np.float32] | None = None,
) -> NDArray[np.int64]:
    """The places of `arranged`, or more where caps left some empty: one greedy order may fill fewer than
    another, and `fill` has seen to it that `order_P`, rows as they were retrieved, does."""
    if not rules.caps or len(places) >= rules.k:
        return places
    falling = -np.arange(len(order_P), dtype=np.float32)
    others = order_P[arranged(falling, order_P, replace(rules, diversity=0.0), groups)]
    if len(others) <= len(places):
        return places
    some_P = np.where(np.isin(rows_P, others), rows_P, -1)
    return arranged(scores_P, some_P, rules, groups, vectors_PD)


def _fixed(rules: Rules, at: Mapping[int, int]) -> dict[int, int]:
    """Place -> where its pin lies in the pool: named places first, the others in turn where it is free."""
    found = {place: at[row] for place, row in rules.pins if place >= 0 and row in at}
    free = (place for place in range(rules.k) if place not in found)
    floating = [at[row] for place, row in rules.pins if place < 0 and row in at]
    return found | dict(zip(free, floating))


class _Apart:
    """Maximal marginal relevance of what is left, item by item that is chosen."""

    def __init__(
        self,
        scores_P: NDArray[np.float32],
        given_P: NDArray[np.bool_],
        vectors_PD: NDArray[np.float32] | None,
        diversity: float,
    ) -> None:
        assert vectors_PD is not None
        held = scores_P[given_P].astype(np.float64)
        low, high = (held.min(), held.max()) if len(held) else (0.0, 0.0)
        scaled = (np.where(given_P, scores_P, low).astype(np.float64) - low) / max(high - low, 1e-30)
        self._relevance_P = (1 - diversity) * scaled
        lengths = np.linalg.norm(vectors_PD.astype(np.float64), axis=1, keepdims=True)
        self._unit_PD = vectors_PD / np.maximum(lengths, 1e-30)
        self._diversity, self._near_P = diversity, np.full(len(scores_P), -np.inf)

    def take(self, at: int) -> None:
        self._near_P = np.maximum(self._near_P, self._unit_PD @ self._unit_PD[at])

    def best(self, open_P: NDArray[np.bool_]) -> int:
        near_P = np.where(np.isneginf(self._near_P), 0, self._near_P)
        return int(np.where(open_P, self._relevance_P - self._diversity * near_P, -np.inf).argmax())

"""A request as rows, and an answer as ids; what travels between the stages is the former."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from recray.bundles.filters import Filter
from recray.data.sequences import Histories
from recray.retrieval.arrange import Rules


@dataclass(frozen=True)
class Item:
    """One recommended item: its id, its score and which part of the path gave it."""

    item: str
    score: float
    source: str  # retriever, ranker, popular or pin


@dataclass(frozen=True)
class Reason:
    """One reason: what it adds to the score, the item of the history it is ("" for a user like this
    one, who is not named), and the features it has in common with the item asked about."""

    weight: float
    item: str
    shared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Why:
    """Why an item has its score: the strongest reasons first.

    Where `additive` holds, base plus the weights of all reasons is the score; else a weight is what the
    score would lose without that item in the history.
    """

    item: str
    score: float
    base: float
    additive: bool
    reasons: list[Reason]
    generation: str


@dataclass(frozen=True)
class Answer:
    """Items best first, the bundle they came from, what could not be done as asked, and, if it was
    asked for, why each item is there."""

    items: list[Item]
    generation: str
    degraded: list[str] = field(default_factory=list)
    why: list[Why] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request. history, exclude: item rows int32[L] and int32[X]; k is at most N.

    weights: of the history, float32[L], or None for 1 each.
    filter: what features must hold, the bundle's own filter included; context: column -> value row;
    rules: pins, caps and diversity, None where none is asked for.
    """

    history: NDArray[np.int32]
    exclude: NDArray[np.int32]
    k: int
    filter: Filter
    context: Mapping[str, int]
    degraded: tuple[str, ...] = ()
    rules: Rules | None = None
    weights: NDArray[np.float32] | None = None

    @property
    def pinned(self) -> frozenset[int]:
        """The rows that are pinned."""
        return frozenset() if self.rules is None else frozenset(row for _, row in self.rules.pins)


def histories_of(requests: Sequence[Request]) -> Histories:
    """The histories of requests, with weights where one has them."""
    made = Histories.of([request.history for request in requests])
    if all(request.weights is None for request in requests):
        return made
    each = [np.ones(len(r.history), np.float32) if r.weights is None else r.weights for r in requests]
    return replace(made, weights=np.concatenate(each))

"""A request as rows, and an answer as ids; what travels between the stages is the former."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Item:
    """One recommended item: its id, its score and which part of the path gave it."""

    item: str
    score: float
    source: str  # retriever, ranker or popular


@dataclass(frozen=True)
class Answer:
    """Items best first, the bundle they came from, and what could not be done as asked."""

    items: list[Item]
    generation: str
    degraded: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Request:
    """A checked request. history, exclude: item rows int32[L] and int32[X]; k is at most N.

    filter: feature column -> accepted values, see `Bundle.allowed`; context: column -> value row.
    """

    history: NDArray[np.int32]
    exclude: NDArray[np.int32]
    k: int
    filter: Mapping[str, tuple[Any, ...]]
    context: Mapping[str, int]
    degraded: tuple[str, ...] = ()

"""Lists of found items, as they are proposed and as they are answered, and what is done to them.

Shapes: B users, C candidates, k places, N items, X barred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recray.retrieval.index import Found, ordered

Source = Literal["retriever", "ranker", "popular"]


@dataclass(frozen=True, eq=False)
class Candidates:
    """What retrieval proposes: rows int64[B, C] and scores float32[B, C], best first.

    Where fewer than C are left: row -1, score -inf. The last `extra` columns are what rules brought in.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    extra: int = 0

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Ranked:
    """The answer: rows int64[B, k] and scores float32[B, k], best first, and each user's source.

    Where fewer than k are left: row -1, score -inf.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    sources: Sequence[Source]


def merged(scores: NDArray[np.float32], rows: NDArray[np.int64]) -> Found:
    """One list from K lists a user: the best score of a row that several lists hold."""
    scores, rows = ordered(scores, rows, rows.shape[1])
    by_row = np.argsort(rows, axis=1, kind="stable")  # equal rows: best score first
    in_turn = np.take_along_axis(rows, by_row, 1)
    again = np.zeros_like(in_turn, dtype=bool)
    again[:, 1:] = in_turn[:, 1:] == in_turn[:, :-1]
    np.put_along_axis(scores, by_row, np.where(again, -np.inf, np.take_along_axis(scores, by_row, 1)), 1)
    return ordered(scores, rows, rows.shape[1])


def standard(
    scores_BC: NDArray[np.float32], given: NDArray[np.bool_], counted: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Each line less its mean and over its deviation, both of the places that count; a constant line to
    zeros. scores: [..., B, C]."""
    held = np.where(given, scores_BC, 0).astype(np.float64)
    n = np.maximum(counted.sum(axis=-1, keepdims=True), 1)
    away = np.where(given, held - np.where(counted, held, 0).sum(axis=-1, keepdims=True) / n, 0)
    spread = np.sqrt((np.where(counted, away, 0) ** 2).sum(axis=-1, keepdims=True) / n)
    made = np.divide(away, spread, out=np.zeros_like(away), where=spread > 1e-12)
    return np.asarray(made, np.float32)

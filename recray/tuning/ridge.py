"""A ridge regression over named features, which knows how far what it saw reaches.

A feature is a word (one column a word) or a number (one column, centred; 0 where a row has none). It shrinks
towards the mean of all rows, so that few rows say something already. Hoerl & Kennard 1970.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Features = Mapping[str, "float | str"]
BEYOND = 0.1  # share of the span seen that a number may lie outside of it


@dataclass(frozen=True)
class Ridge:
    """A fitted regression; `span` says which numbers were seen and `words` which words."""

    columns: Mapping[tuple[str, str], int]
    span: Mapping[str, tuple[float, float]]
    centre: Mapping[str, float]
    mean: float
    weights: NDArray[np.float64] = field(repr=False)

    @staticmethod
    def fit(rows: Sequence[Features], values: ArrayLike, strength: float = 0.05) -> Ridge:
        """Least squares of `values` float[n] on n rows, plus `strength` x the squared weights."""
        y = np.asarray(values, dtype=np.float64)
        if not len(rows):
            raise ValueError("there is nothing to learn from")
        columns: dict[tuple[str, str], int] = {}
        numbers: dict[str, list[float]] = {}
        for row in rows:
            for name, value in row.items():
                columns.setdefault((name, value if isinstance(value, str) else ""), len(columns))
                if not isinstance(value, str):
                    numbers.setdefault(name, []).append(float(value))
        span = {name: (min(seen), max(seen)) for name, seen in numbers.items()}
        centre = {name: sum(seen) / len(seen) for name, seen in numbers.items()}
        empty = Ridge(columns, span, centre, float(y.mean()), np.zeros(len(columns)))
        x = np.array([empty._line(row) for row in rows]).reshape(len(rows), len(columns))
        shift = x.mean(axis=0)
        x = x - shift
        weights = np.linalg.solve(x.T @ x + strength * np.eye(len(columns)), x.T @ (y - y.mean()))
        return Ridge(columns, span, centre, float(y.mean() - shift @ weights), weights)

    def predict(self, row: Features) -> float:
        """The value at a row; what was never seen counts nothing."""
        return self.mean + float(self._line(row) @ self.weights)

    def beyond(self, row: Features) -> list[str]:
        """What of a row lies outside of all that was seen, in words."""
        found = []
        for name, value in row.items():
            if isinstance(value, str):
                if (name, value) not in self.columns:
                    found.append(f"{name}={value} was not measured")
            elif name not in self.span:
                found.append(f"{name} was not measured")
            else:
                low, high = self.span[name]
                air = BEYOND * max(high - low, 1.0)
                if not low - air <= value <= high + air:
                    found.append(f"{name} was not measured so far out")
        return found

    def _line(self, row: Features) -> NDArray[np.float64]:
        line = np.zeros(len(self.columns))
        for name, value in row.items():
            at = self.columns.get((name, value if isinstance(value, str) else ""))
            if at is not None:
                line[at] = 1.0 if isinstance(value, str) else float(value) - self.centre[name]
        return line

"""How far predicted ratings lie from given ones. n ratings; both arrays float[n] in the same order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def errors(predicted: ArrayLike, given: ArrayLike) -> NDArray[np.float64]:
    """predicted - given, float64[n]. Raises ValueError for other shapes or a value that is not finite."""
    p, g = np.asarray(predicted, dtype=np.float64), np.asarray(given, dtype=np.float64)
    if p.shape != g.shape or p.ndim != 1:
        raise ValueError(f"predictions of shape {p.shape} for ratings of shape {g.shape}")
    if not (np.isfinite(p).all() and np.isfinite(g).all()):
        raise ValueError("a rating or a prediction is not a finite number")
    made: NDArray[np.float64] = p - g
    return made


def mse(predicted: ArrayLike, given: ArrayLike) -> float:
    """Mean squared error, in squared rating units; 0 is perfect."""
    return float(np.mean(errors(predicted, given) ** 2))


def rmse(predicted: ArrayLike, given: ArrayLike) -> float:
    """Root of the mean squared error, in rating units."""
    return float(np.sqrt(mse(predicted, given)))


def mae(predicted: ArrayLike, given: ArrayLike) -> float:
    """Mean absolute error, in rating units."""
    return float(np.mean(np.abs(errors(predicted, given))))

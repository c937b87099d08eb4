"""How sure a mean is, and whether one system is better than another on the same users."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean and its 95 % interval [low, high] over n users; of a difference or of one metric."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    def as_dict(self) -> dict[str, float | int | None]:
        """Plain JSON; a bound that one user alone cannot give is null."""
        return {
            "mean": self.mean,
            "low": self.low if math.isfinite(self.low) else None,
            "high": self.high if math.isfinite(self.high) else None,
            "n": self.n,
        }

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def mean_interval(values: ArrayLike) -> Difference:
    """Mean of float[n] with its Student interval: m ± t(.975, n - 1) · s / √n, s with n - 1.

    One value gives an unbounded interval; none raises ValueError.
    """
    from scipy.special import stdtrit

    x = np.asarray(values, dtype=np.float64)
    n = x.size
    if n == 0:
        raise ValueError("no values to take a mean of")
    mean = float(x.mean())
    if n == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(x.std(ddof=1)) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)


def paired(ours: ArrayLike, theirs: ArrayLike) -> Difference:
    """Mean of ours - theirs over the same n users: d ± t(.975, n - 1) · s_d / √n.

    Pairing takes the spread between users out, which is most of it. Raises ValueError when the two
    are not of the same users.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} values against {b.size}: not the same users")
    return mean_interval(a - b)


def by_user(values: ArrayLike, users: ArrayLike) -> NDArray[np.float64]:
    """One value a user, float64[U], of float[n] values of which a user has several, users int[n].

    Their mean is that of the n values, their spread is that between users: what one user does is not
    independent, so the interval of these is wider than that of n values each of its own user. User u's is
    m + (sum of its values - m · their number) · U / n, m the mean of all (the linearized ratio of sums).
    """
    x = np.asarray(values, dtype=np.float64)
    _, owner, counts = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    mean = x.mean()
    made: NDArray[np.float64] = mean + np.bincount(owner, x - mean) * (len(counts) / len(x))
    return made

"""What is better than what: the front, its hypervolume, and the choice under a budget.

A point has a quality (more is better), a p99 in seconds and a size in bytes (less is better).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recray.errors import ConfigError


@dataclass(frozen=True)
class Value:
    """What one trial is worth: quality (a ranking metric), p99 in seconds, bytes, money per 1,000 answers."""

    quality: float
    p99: float
    bytes: float
    cost: float = 0.0

    @property
    def costs(self) -> tuple[float, float, float]:
        """Three numbers, each better when smaller."""
        return (-self.quality, self.p99, self.bytes)


@dataclass(frozen=True)
class Budget:
    """Upper limits: p99 in seconds, size in bytes, cost of 1,000 recommendations (none by default).

    Zero, negative and NaN raise ConfigError.
    """

    p99: float
    size: float
    cost: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"a budget of {value:g} for {name} fits nothing", fix="give more than zero")

    def over(self, value: Value) -> dict[str, float]:
        """The terms that a value exceeds, and by which share of the limit: {'p99': 0.42}."""
        return {name: share - 1 for name, share in self.uses(value).items() if share > 1}

    def uses(self, value: Value) -> dict[str, float]:
        """Which share of each limit a value takes up: {'p99': 0.93, 'size': 0.4}."""
        shares = {"p99": value.p99 / self.p99, "size": value.bytes / self.size}
        return shares if math.isinf(self.cost) else {**shares, "cost": value.cost / self.cost}

    def words(self) -> str:
        """'p99 10 ms and size 64 MB'"""
        told = f"p99 {milliseconds(self.p99)} and size {megabytes(self.size)}"
        return told if math.isinf(self.cost) else f"{told} and cost {money(self.cost)} per 1,000"

    def fits(self, value: Value) -> bool:
        return not self.over(value)


@dataclass(frozen=True)
class Choice:
    """Which of the values was chosen; `fits` False: the nearest to a budget that nothing fits."""

    index: int
    fits: bool
    best: int  # the one of highest quality among those that fit (or the nearest)
    tied: tuple[int, ...]  # those that no measurement tells from `best`, it included


def dominated(costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool[n] of costs float64[n, m]: True where another row is no worse anywhere and better somewhere."""
    no_worse = (costs[None] <= costs[:, None]).all(axis=2)  # [i, j]: j is no worse than i
    better = (costs[None] < costs[:, None]).any(axis=2)
    beaten: NDArray[np.bool_] = np.any(no_worse & better, axis=1)
    return beaten


def hypervolume(costs: NDArray[np.float64], reference: Sequence[float] | NDArray[np.float64]) -> float:
    """The volume that costs float64[n, m] (m = 1, 2 or 3) dominate below the reference point.

    By sweeping the last coordinate: between two neighbours the slab's volume is its height times the
    hypervolume of the rest, taken over the points at or below it.
    """
    at = np.asarray(reference, dtype=np.float64)
    inside = costs[(costs < at).all(axis=1)]
    if not len(inside):
        return 0.0
    if len(at) == 1:
        return float(at[0] - inside.min())
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    heights = np.diff(np.append(inside[:, -1], at[-1]))
    return float(sum(h * hypervolume(inside[: i + 1, :-1], at[:-1]) for i, h in enumerate(heights) if h > 0))


def choose(values: Sequence[Value], budget: Budget, tied: Callable[[int, int], bool] | None = None) -> Choice:
    """The best quality that fits; what `tied(i, best)` cannot tell from it competes by p99 x bytes.

    Without `tied` only equal quality ties. Equal products go to the lower p99, then to fewer bytes.
    When nothing fits: the value whose worst term is over its limit by the smallest share.
    """
    fitting = [i for i, value in enumerate(values) if budget.fits(value)]
    if not fitting:
        shares = [list(budget.over(value).values()) for value in values]
        nearest = min(range(len(values)), key=lambda i: (max(shares[i]), sum(shares[i]), -values[i].quality))
        return Choice(nearest, False, nearest, (nearest,))
    best = min(fitting, key=lambda i: values[i].costs)
    same = tied or (lambda i, j: values[i].quality == values[j].quality)
    group = tuple(i for i in fitting if i == best or same(i, best))
    return Choice(
        min(group, key=lambda i: (values[i].p99 * values[i].bytes, values[i].p99, values[i].bytes)),
        True,
        best,
        group,
    )


def shortage(value: Value, budget: Budget) -> str:
    """Which terms a value exceeds, in words: 'p99 is 14.2 ms where 10 ms are allowed (42 % over)'."""
    over = budget.over(value)
    said = []
    if "p99" in over:
        said.append(
            f"p99 is {milliseconds(value.p99)} where {milliseconds(budget.p99)} are allowed "
            f"({over['p99']:.0%} over)"
        )
    if "size" in over:
        said.append(
            f"size is {megabytes(value.bytes)} where {megabytes(budget.size)} are allowed "
            f"({over['size']:.0%} over)"
        )
    if "cost" in over:
        said.append(
            f"cost is {money(value.cost)} per 1,000 where {money(budget.cost)} are allowed "
            f"({over['cost']:.0%} over)"
        )
    return " and ".join(said)


def money(amount: float) -> str:
    """0.00012345 -> '0.000123'"""
    return f"{amount:.3g}"


def milliseconds(seconds: float) -> str:
    """0.0123 -> '12.3 ms'"""
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def megabytes(count: float) -> str:
    """1234567 -> '1.23 MB'"""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:  # below it three digits suffice for the unit below
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"

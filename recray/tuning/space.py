"""What may vary: dimensions written as words, `lr=1e-4..1e-2@log`, `dim=32..256`, `codec=f32,int8`.

A point is a plain mapping from dimension names to JSON scalars.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from recray.config import guess
from recray.errors import ConfigError

Scalar = int | float | str | bool | None
Point = dict[str, Scalar]

FORMS = "write NAME=LOW..HIGH, NAME=LOW..HIGH@log or NAME=A,B,C"
DIGITS = 6  # significant digits kept of a float, so that a point means the same in every file


@dataclass(frozen=True)
class Dimension:
    """One thing that may vary: whole numbers or floats in [low, high], or one of `choices`."""

    name: str
    kind: Literal["int", "float", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Scalar, ...] = ()

    @property
    def count(self) -> int | None:
        """How many values there are; None for floats."""
        if self.kind == "choice":
            return len(self.choices)
        return int(self.high) - int(self.low) + 1 if self.kind == "int" else None

    def values(self) -> Sequence[Scalar]:
        """All values of a finite dimension, in order."""
        if self.kind == "choice":
            return self.choices
        if self.kind == "int":
            return range(int(self.low), int(self.high) + 1)
        raise ValueError(f"{self.name} has no end of values")

    def at(self, share: float) -> Scalar:
        """The value at `share` in [0, 1) of the way; the inverse of `share_of` up to rounding."""
        if self.kind == "choice":
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = (self.low, self.high) if self.kind == "float" else (self.low - 0.5, self.high + 0.5)
        if self.log:
            low = max(low, self.low / 2)
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        return self.tidy(value)

    def tidy(self, value: float) -> float:
        """A number of this dimension's kind, inside it, floats with DIGITS significant digits."""
        if self.kind == "int":
            return int(min(max(round(value), self.low), self.high))
        return min(max(float(f"{value:.{DIGITS}g}"), self.low), self.high)

    def share_of(self, value: Scalar) -> float:
        """Where a value of this dimension lies in [0, 1]."""
        if self.kind == "choice":
            return self.choices.index(value) / max(len(self.choices) - 1, 1)
        assert isinstance(value, (int, float))
        if self.high == self.low:
            return 0.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def holds(self, value: Scalar) -> bool:
        """Whether the value belongs to this dimension."""
        if self.kind == "choice":
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (self.kind == "float" or value == int(value))


class Space:
    """Some dimensions, each named once."""

    def __init__(self, dimensions: Iterable[Dimension]) -> None:
        self.dimensions: dict[str, Dimension] = {}
        for dimension in dimensions:
            if dimension.name in self.dimensions:
                raise ConfigError(f"{dimension.name!r} is given twice in the space", fix="name it once")
            self.dimensions[dimension.name] = dimension
        if not self.dimensions:
            raise ConfigError("the space is empty", fix=FORMS)

    @staticmethod
    def parse(words: Iterable[str]) -> Space:
        """From words like `lr=1e-4..1e-2@log`; ConfigError says which word cannot be read."""
        return Space(_dimension(word) for word in words)

    @property
    def size(self) -> int | None:
        """The number of points; None when a float makes it endless."""
        counts = [d.count for d in self.dimensions.values()]
        return None if None in counts else math.prod(c for c in counts if c is not None)

    def points(self) -> Iterator[Point]:
        """Every point of a finite space, the last dimension varying fastest."""
        names = list(self.dimensions)
        for values in itertools.product(*(d.values() for d in self.dimensions.values())):
            yield dict(zip(names, values))

    def sample(self, rng: np.random.Generator) -> Point:
        """One point, evenly (on the log scale where asked)."""
        return {name: d.at(rng.random()) for name, d in self.dimensions.items()}

    def encode(self, point: Mapping[str, Scalar]) -> NDArray[np.float64]:
        """float64[dimensions] in [0, 1]; distances between points are taken there."""
        return np.array([d.share_of(point[name]) for name, d in self.dimensions.items()])

    def holds(self, point: Mapping[str, Scalar]) -> bool:
        """Whether the point has exactly these names, each with a value of its dimension."""
        return set(point) == set(self.dimensions) and all(
            d.holds(point[name]) for name, d in self.dimensions.items()
        )


def _dimension(word: str) -> Dimension:
    name, equals, text = word.partition("=")
    name, text = name.strip(), text.strip()
    if not equals or not name or not text:
        raise ConfigError(f"cannot read {word!r} of the space", fix=FORMS)
    if ".." in text:
        return _range(word, name, text)
    choices = tuple(guess(part.strip()) for part in text.split(","))
    if any(choice == "" for choice in choices):
        raise ConfigError(f"{word!r} has an empty choice", fix=FORMS)
    if len({repr(choice) for choice in choices}) < len(choices):
        raise ConfigError(f"{word!r} names a choice twice", fix="name it once")
    return Dimension(name, "choice", choices=choices)


def _range(word: str, name: str, text: str) -> Dimension:
    span, at, scale = text.partition("@")
    if at and scale != "log":
        raise ConfigError(f"{word!r} has an unknown scale {scale!r}", fix="the only scale is @log")
    low_text, _, high_text = span.partition("..")
    low, high = guess(low_text.strip()), guess(high_text.strip())
    for value in (low, high):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{word!r} is not a range of numbers", fix=FORMS)
    if not low < high:
        raise ConfigError(f"{word!r} is empty: {low} is not below {high}", fix="write the lower end first")
    if at and low <= 0:
        raise ConfigError(f"{word!r} cannot be on a log scale", fix="the lower end must be above zero")
    kind: Literal["int", "float"] = "int" if isinstance(low, int) and isinstance(high, int) else "float"
    return Dimension(name, kind, float(low), float(high), bool(at))

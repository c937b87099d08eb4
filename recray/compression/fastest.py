"""Which of several forms of a network is kept: the fastest that was measured, of those that lose little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recray.errors import ConfigError


@dataclass(frozen=True)
class Form:
    """One form of a network, with what was measured of it.

    seconds: of a call, by how many users it has. loss: what is lost of a metric, as a share of its value in
    the form that is compared with; below 0 where something is gained. size: bytes.
    """

    name: str
    seconds: Mapping[int, float]
    loss: float
    size: int = 0


def fastest(forms: Sequence[Form], *, users: int, bound: float) -> Form:
    """The quickest at `users` a call of those that lose at most `bound`; of equal ones the smallest.

    Raises ConfigError where none does, naming the one that is nearest.
    """
    if not forms:
        raise ConfigError("no form of the network was measured")
    kept = [form for form in forms if form.loss <= bound]
    if not kept:
        least = min(forms, key=lambda form: form.loss)
        raise ConfigError(
            f"every form loses more than {bound:.2%}; the least, {least.name}, {least.loss:.2%}",
            fix="allow a larger loss, or train the smaller model for longer",
        )
    return min(kept, key=lambda form: (form.seconds[users], form.size))

"""Answers that were given, kept by who asked and how, to be given again.

An answer is decided by its generation, the history and all that was asked: with all of that the same, it is
the answer that the models would give, however old it is, so it is never stale. An event changes its user's
history, which every request reads, so the next request finds another one here and the models are asked.

An answer to the same ask of the same user from an earlier history is no longer that; only a request that has
no time for more is given it, without what she did or excluded since, and `degraded` says so.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

from recray.bundles.answer import Request
from recray.errors import ConfigError

ENTRY, ITEM = 900, 420  # bytes that an answer takes, and each of its items; measured


@dataclass(frozen=True, kw_only=True)
class Caching:
    """What each ingress replica keeps of its answers, a generation."""

    answers: int = 0  # 0 keeps none: to keep them costs each request a little, and pays where users ask again
    bytes: int = 64 << 20
    stale_s: float = 600.0  # how old an answer from an earlier history may be where there is no time for more

    def __post_init__(self) -> None:
        if self.answers < 0 or self.bytes < 0 or not self.stale_s >= 0:
            raise ConfigError(
                f"answers {self.answers}, bytes {self.bytes}, stale_s {self.stale_s} must be at least 0",
                where="cache",
            )


class Spot(NamedTuple):
    """Where an answer belongs: who asked how, and from which state."""

    ask: Hashable
    state: bytes


class _Kept(NamedTuple):
    state: bytes
    items: list[dict[str, Any]]
    at: float


def spot(user: str | None, request: Request) -> Spot:
    """user: None where the history came with the request, which then is a part of the ask."""
    history, exclude = request.history.tobytes(), request.exclude.tobytes()
    if request.weights is not None:
        history += request.weights.tobytes()
    asked = (
        history if user is None else user,
        request.k,
        repr(request.filter) if request.filter else "",  # tells 1 from 1.0 and True
        request.rules,
        tuple(request.context.values()),
    )
    return Spot(asked, history + exclude)


class Answers:
    """The newest answers of one generation, one for each ask of each user. One event loop owns it."""

    def __init__(self, plan: Caching, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._clock = plan, clock
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def same(self, spot: Spot) -> list[dict[str, Any]] | None:
        """The items of the very same ask from the very same state."""
        kept = self._kept.get(spot.ask)
        if kept is None or kept.state != spot.state:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(spot.ask)
        return kept.items

    def older(self, spot: Spot) -> list[dict[str, Any]] | None:
        """The items of the same ask from whatever state, not older than `stale_s`."""
        kept = self._kept.get(spot.ask)
        if kept is None or self._clock() - kept.at > self._plan.stale_s:
            return None
        return kept.items

    def keep(self, spot: Spot, items: list[dict[str, Any]]) -> None:
        """Keep an answer in place of an earlier one; the least lately used make room."""
        self._drop(spot.ask)
        self._kept[spot.ask] = _Kept(spot.state, items, self._clock())
        self.bytes += _bytes(self._kept[spot.ask])
        while self._kept and (len(self._kept) > self._plan.answers or self.bytes > self._plan.bytes):
            self._drop(next(iter(self._kept)))

    def _drop(self, ask: Hashable) -> None:
        kept = self._kept.pop(ask, None)
        if kept is not None:
            self.bytes -= _bytes(kept)


def _bytes(kept: _Kept) -> int:
    return ENTRY + 2 * len(kept.state) + ITEM * len(kept.items)

"""When a canary is rolled back: counts of two generations in the same time, and one verdict.

No number is taken at its word: a share is compared by the bound of its Wilson interval, SQUARED being the
square of z = 3, so that a sound canary is taken away about once in a thousand looks at most.
    Wilson, E. B. (1927), Probable inference, the law of succession, and statistical inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from recray.errors import ConfigError

SQUARED = 9.0
STEP = math.log(1.1)  # latencies are counted in buckets that are a tenth wide
LEAST_MS = 0.05
SLOW = 0.01  # of requests are slower than a p99


@dataclass(frozen=True, kw_only=True)
class Band:
    """What a canary may be worse by than the generation beside it."""

    errors: float = 0.01  # share of requests that fail, above the other's
    p99: float = 1.5  # times the other's p99
    slack_ms: float = 5.0  # above that
    clicks: float = 0.1  # share of the other's click-through that may be lost
    least: int = 100  # requests of the other before its p99 is believed

    def __post_init__(self) -> None:
        sound = 0 <= self.errors < 1 and self.p99 >= 1 and self.slack_ms >= 0 and 0 <= self.clicks <= 1
        if not sound or self.least < 1:
            raise ConfigError(f"{self} is no band", where="canary", fix="p99 from 1, shares within 0 and 1")


@dataclass
class Tally:
    """What happened to the requests of one generation: counts, and milliseconds by bucket."""

    requests: int = 0
    errors: int = 0
    clicks: int = 0
    refused: int = 0  # by a stage that did not hold it; answered from another
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, ms: float, *, failed: bool = False) -> None:
        """Count one request."""
        self.requests += 1
        self.errors += failed
        if not failed:
            at = max(0, math.ceil(math.log(max(ms, LEAST_MS) / LEAST_MS) / STEP))
            self.buckets[at] = self.buckets.get(at, 0) + 1

    def p99_ms(self) -> float | None:
        """The 99th percentile of those answered, at most a tenth too high; None without any."""
        left = math.ceil((1 - SLOW) * sum(self.buckets.values()))
        for at, count in sorted(self.buckets.items()):
            left -= count
            if left <= 0:
                return LEAST_MS * math.exp(at * STEP)
        return None

    def slower(self, ms: float) -> int:
        """How many took longer; those in the bucket of `ms` itself do not count."""
        edge = math.ceil(math.log(max(ms, LEAST_MS) / LEAST_MS) / STEP - 1e-9)
        return sum(count for at, count in self.buckets.items() if at > edge)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        p99 = self.p99_ms()
        told = {name: value for name, value in vars(self).items() if name != "buckets"}
        return {**told, "p99_ms": None if p99 is None else round(p99, 3)}


def merged(parts: Iterable[Mapping[str, Tally]]) -> dict[str, Tally]:
    """The tallies of all ingress replicas, by generation."""
    made: dict[str, Tally] = {}
    for part in parts:
        for name, one in part.items():
            whole = made.setdefault(name, Tally())
            whole.requests += one.requests
            whole.errors += one.errors
            whole.clicks += one.clicks
            whole.refused += one.refused
            for at, count in one.buckets.items():
                whole.buckets[at] = whole.buckets.get(at, 0) + count
    return made


Fate = Literal["wait", "keep", "roll back"]


@dataclass(frozen=True)
class Verdict:
    """What to do about a canary, and why."""

    fate: Fate
    why: str


def judge(canary: Tally, other: Tally, band: Band) -> Verdict:
    """Roll a canary back as soon as its errors, p99 or click-through are surely out of the band."""
    failed = at_least(canary.errors, canary.requests)
    expected = other.errors / other.requests if other.requests else 0.0
    if failed > expected + band.errors:
        words = f"{canary.errors} of {canary.requests} requests failed, against {expected:.2%}"
        return Verdict("roll back", words)
    if other.requests < band.least:
        return Verdict("wait", f"{other.requests} of {band.least} requests to compare with")
    p99 = other.p99_ms()
    if p99 is not None:
        limit = p99 * band.p99 + band.slack_ms
        answered = canary.requests - canary.errors
        slow = canary.slower(limit)
        if at_least(slow, answered) > SLOW:
            words = f"{slow} of {answered} requests took more than {limit:.1f} ms"
            return Verdict("roll back", f"{words}, of which a p99 allows {SLOW:.0%}")
    if other.clicks and canary.requests:
        usual = min(1.0, other.clicks / other.requests)
        hits = min(canary.clicks, canary.requests)  # one answer may be clicked at several times
        if at_most(hits, canary.requests) < usual * (1 - band.clicks):
            words = f"{hits / canary.requests:.2%} of answers were clicked, against {usual:.2%}"
            return Verdict("roll back", words)
    return Verdict("keep", f"{canary.requests} requests within the band")


def at_least(hits: int, of: int) -> float:
    """The lower bound of the share that `hits` of `of` stand for; 0 without any."""
    return _bound(hits, of, -1.0) if hits else 0.0


def at_most(hits: int, of: int) -> float:
    """The upper bound; 1 without any."""
    return _bound(hits, of, 1.0) if of else 1.0


def _bound(hits: int, of: int, sign: float) -> float:
    share = hits / of
    spread = math.sqrt(SQUARED * (share * (1 - share) / of + SQUARED / (4 * of * of)))
    return (share + SQUARED / (2 * of) + sign * spread) / (1 + SQUARED / of)

"""What is done for a request in the time it has left: measured times, and one decision that rests on them.

    full > light > retrieved > cached > popular

full: the ranker sees all candidates; light: a part of them; retrieved: nothing is ranked; cached: an older
answer; popular: what needs no model. The first that can be done in time is done, and the last always can.

A stage's time is its mean and twice its mean deviation, both moving averages, as TCP times its retries
(Jacobson 1988, Congestion avoidance and control, appendix A); by size, since a batch takes longer than a
request. A time that keeps work from being done is believed less each time it does, so that what once was
slow is tried again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from recray.errors import ConfigError

LIGHT = 4  # light ranking sees one in so many of the candidates
WARM = 1  # first times of a size that do not count: they are of what is made once
SHORTEST_S = 1e-6  # what is shorter is none, and nothing is divided by zero
GAIN, DEVIATIONS = 1 / 8, 2.0
JUMP = 4.0  # a time counts for no more than so many times what was expected: one pause is no rule
LEAST_S = 1e-3
DOUBT = 0.95  # of a time that keeps a batch from being done in full, each time it does
DOUBT_ONE = 0.99  # of one that keeps a request from its batch
RESERVE = 0.1  # of a deadline, kept to hand the answer over

OVERLOAD, TIME, LATE, AWAY = "overload", "deadline", "late", "unavailable"  # why; see `REASONS`
REASONS = {
    OVERLOAD: "more requests wait than can be answered in time",
    TIME: "what is left of the deadline is too short for more",
    LATE: "a stage did not answer in time",
    AWAY: "a stage does not answer now",
}


class Level(IntEnum):
    """What is done; the greater, the less."""

    FULL, LIGHT, RETRIEVED, CACHED, POPULAR = range(5)


NAMES = {
    Level.LIGHT: "light ranking",
    Level.RETRIEVED: "not ranked",
    Level.CACHED: "cached",
    Level.POPULAR: "popular",
}
MEANINGS = {
    Level.LIGHT: f"the ranker saw the best {LIGHT}th of the candidates",
    Level.RETRIEVED: "in the retriever's order",
    Level.CACHED: "an earlier answer to the same user, without what was done or excluded since",
    Level.POPULAR: "what is popular, within filters, exclusions and pins",
}


def told(level: Level, why: str) -> str:
    """The word in `degraded`: which, and why."""
    return f"{NAMES[level]}: {why}"


class TooLate(Exception):  # noqa: N818
    """No stage can answer in time; `why` is one of REASONS."""

    def __init__(self, why: str = LATE) -> None:
        super().__init__(why)
        self.why = why


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long answers of the models may take, waiting included."""

    default_ms: float = 5000.0  # of a request that says nothing
    max_ms: float = 60_000.0  # a request that asks for longer gets this

    def __post_init__(self) -> None:
        if not 0 < self.default_ms <= self.max_ms or not math.isfinite(self.max_ms):
            raise ConfigError(
                f"default_ms {self.default_ms} must be above 0 and at most max_ms {self.max_ms}",
                where="deadline",
            )

    def seconds(self, *asked_ms: float | None) -> float:
        """What a request has that names these times (None: not named): the shortest, within bounds."""
        named = [ms for ms in asked_ms if ms is not None]
        return max(SHORTEST_S, min([*named, self.max_ms]) / 1e3) if named else self.default_ms / 1e3


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Seconds that each step is expected to take; None for what cannot be done."""

    wait: float = 0.0
    retrieve: float = 0.0
    rank: float = 0.0
    light: float | None = None
    unranked: bool = False  # whether a retriever's list may be answered as it is
    cached: bool = False  # whether there is an older answer


def decide(left_s: float, needs: Needs) -> Level:
    """The best that is expected to be done in `left_s`: never less for more time, and never nothing."""
    found = needs.wait + needs.retrieve
    if found + needs.rank <= left_s:
        return Level.FULL
    if needs.light is not None and found + needs.light <= left_s:
        return Level.LIGHT
    if needs.unranked and found <= left_s:
        return Level.RETRIEVED
    return Level.CACHED if needs.cached else Level.POPULAR


def wait_s(waiting: int, busy: int, *, size: int, slots: int, batch_s: float) -> float:
    """How long an ask waits behind `waiting` others and `busy` batches: W = L / lambda (Little 1961), where
    `slots` batches of `size` are answered in `batch_s`."""
    return batch_s * (waiting / size + busy) / slots


@dataclass
class _Seen:
    """Times of one size: how many, mean, mean deviation, and how far that is still believed."""

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0
    belief: float = 1.0

    @property
    def value(self) -> float:
        return (self.mean + DEVIATIONS * self.deviation) * self.belief


class Pace:
    """How long one stage takes for so many, learned while it runs. Threads may share one: a time that is
    lost when two of them write at once does not matter."""

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}  # bits of a size -> its times
        self._told: dict[int, float] = {}  # bits -> what is expected, until something is learned

    def add(self, size: int, seconds: float) -> None:
        """Learn that `size` took `seconds`."""
        seen = self._seen.setdefault(size.bit_length(), _Seen())
        seen.count += 1
        if seen.count == WARM + 1:
            seen.mean, seen.deviation = seconds, seconds / 4
        elif seen.count > WARM:
            seconds = min(seconds, JUMP * max(seen.value, LEAST_S))
            gain = max(GAIN, 1 / (seen.count - WARM))
            seen.deviation += gain * (abs(seconds - seen.mean) - seen.deviation)
            seen.mean += gain * (seconds - seen.mean)
        seen.belief = 1.0
        self._told = {}

    def doubt(self, size: int, belief: float = DOUBT) -> None:
        """Believe a little less of what held `size` back, so that it is tried again now and then."""
        for bits, seen in list(self._seen.items()):
            if bits <= size.bit_length() or len(self._seen) == 1:
                seen.belief *= belief
        self._told = {}

    def seconds(self, size: int) -> float:
        """What `size` is expected to take: no less than what is smaller takes; 0 as long as nobody knows."""
        told, bits = self._told, size.bit_length()
        if bits not in told:
            told[bits] = self._expected(bits)
        return told[bits]

    def _expected(self, bits: int) -> float:
        known = sorted((bits, seen.value) for bits, seen in list(self._seen.items()) if seen.count > WARM)
        most = max((value for other, value in known if other <= bits), default=0.0)
        if most or not known:
            return most
        larger, value = known[0]
        return value / 2.0 ** (larger - bits)


class Paces:
    """The stages of one generation, and whole batches."""

    def __init__(self) -> None:
        self.retrieve, self.rank, self.batch = Pace(), Pace(), Pace()

    def found(self, dues: Sequence[float], now: float) -> list[int]:
        """The places of those who still have the time for a batch of all of them to be retrieved."""
        need = self.retrieve.seconds(len(dues))
        on = [place for place, due in enumerate(dues) if due - now >= need]
        if len(on) < len(dues):
            self.retrieve.doubt(len(dues))
        return on

    def levels(
        self, dues: Sequence[float], wants: Sequence[int], parts: Sequence[bool], now: float
    ) -> list[Level]:
        """What those who were retrieved have the time for. wants: candidates of each; parts: whether less
        than all of them may be ranked."""
        whole = sum(wants)
        rank_s = self.rank.seconds(whole)
        if min(dues, default=math.inf) - now >= rank_s:
            return [Level.FULL] * len(dues)
        self.rank.doubt(whole)
        some = Needs(rank=rank_s, light=self.rank.seconds(max(1, whole // LIGHT)), unranked=True)
        all_or_none = Needs(rank=rank_s)
        return [decide(due - now, some if part else all_or_none) for due, part in zip(dues, parts)]

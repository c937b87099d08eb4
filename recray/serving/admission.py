"""Who comes in: before a body is read, a request gets its deadline, or a 503 that says when to try again.

What waits for models is bounded where it waits (see `deadline.wait_s`): beyond that a request is answered by
what is at hand. What waits to be read is not seen, but felt: by how much the event loop is late, as the least
of some looks, since a queue stands and a pause does not (Nichols & Jacobson 2012, Controlling queue delay).
The later it is, the fewer requests go to the models, which take its core from it; and where that is not
enough, the fewer come in at all. Nor do more than can be answered in time, by Little's law: L = lambda W,
where lambda is what this thread can answer a second and W a part of the deadline. That bound is what keeps
answers whole where much is asked: with four times as many inside, nearly all got what is popular.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NamedTuple, TypeVar

from recray.serving.deadline import MEANINGS, NAMES, REASONS, RESERVE, Deadlines
from recray.serving.schema import ApiError, RecommendRequest

HEADER = b"x-deadline-ms"
MODELS = 0.04, 0.12  # of the deadline, by which the loop is late: from here on, up to all, models are spared
ALL = 0.12, 0.30  # and from here on, up to all, requests are refused
WAITS = (
    0.25  # of the deadline, for which what is inside may keep this thread: each has to wait for some turns
)
TICK_S, CALM_S = 0.01, 1.0  # how often the loop is looked at, and how long after the last request
STANDING = 4  # looks of which the least lateness counts: a pause is over when it is seen, a queue is not
GAIN, COUNTED = 0.1, 0.01  # of a new value in an average: of a tick's, of a request's
SPARED = 0.3  # of an answer, which sending a request away costs this thread
TRIES = 10  # that Retry-After reckons with at most
LONGEST_S = 60  # of Retry-After
Made = TypeVar("Made")


def most(within_s: float, each_s: float) -> float:
    """How many may be in at a time, where one is answered every `each_s`, to be answered `within_s`."""
    return within_s / each_s if each_s > 0 else math.inf


def passing(late: float, bounds: tuple[float, float]) -> float:
    """The share that goes on where the loop is late by a share of the deadline: all below the bounds, none
    above."""
    low, high = bounds
    return 1 - min(1.0, max(0.0, (late - low) / (high - low)))


def retry_after(within_s: float, refused: float, draw: float) -> int:
    """Whole seconds after which to ask again: about as long as the queue takes, times the tries that it takes
    on average where a share of `refused` (0 .. 1) is sent away, spread by `draw` (0 .. 1) so that who was
    sent away together does not return together."""
    tries = min(TRIES, 1 / max(1 - refused, 1e-9))
    return min(LONGEST_S, max(1, math.ceil(within_s * tries * (0.5 + draw))))


class Visit(NamedTuple):
    """A request that was let in: since when, and the deadline that its header names."""

    since: float
    header_ms: float | None


class Door:
    """Counts who is in, feels how late the loop is, and lets in who can be answered. One loop owns it."""

    def __init__(
        self,
        deadlines: Deadlines | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        worked: Callable[[], float] = time.thread_time,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """clock: as the loop's; worked: seconds of a core that this thread has used."""
        self._deadlines = deadlines or Deadlines()
        self._clock, self._worked, self._draw = clock, worked, draw
        self._loop: asyncio.AbstractEventLoop | None = None
        self._last = self._expected = 0.0  # when the newest request came, and the tick that is awaited
        self._done, self._then = 0.0, (0.0, 0.0)  # answers, and (answers, seconds of work) a tick ago
        self.inside = 0
        self._lates: deque[float] = deque(maxlen=STANDING)
        self.late_s = 0.0  # what the loop is late by, again and again
        self.each_s = 0.0  # what an answer costs this thread
        self.refused = 0.0  # share of the newest requests
        self._owed = [0.0, 0.0]  # parts of requests that may come in, and go to the models

    def enter(self, headers: Iterable[tuple[bytes, bytes]]) -> Visit:
        """Let a request in; `leave` must follow. Raises ApiError: 503, 422 for the header."""
        now = self._clock()
        named = next((asked_ms(value) for name, value in headers if name == HEADER), None)
        within_s = self._deadlines.seconds(named)
        self._watch(now)
        goes_on = self._next(0, passing(self.late_s / within_s, ALL))
        sent_away = not goes_on or self.inside >= most(WAITS * within_s, self.each_s)
        self.refused += COUNTED * (sent_away - self.refused)
        if sent_away:
            self._done += SPARED
            raise self._refusal()
        self.inside += 1
        return Visit(now, named)

    def leave(self) -> None:
        """A request that came in is answered, or was given up."""
        self.inside -= 1
        self._done += 1

    def limit(self, ask: RecommendRequest, visit: Visit) -> None:
        """Say by when an answer must be there; -inf where models are to be spared."""
        ask.limit(self._due(visit, ask.deadline_ms))

    async def in_time(self, visit: Visit, work: Coroutine[Any, Any, Made]) -> Made:
        """What `work` answers by the deadline, for a request that nothing less can answer. Raises ApiError
        (503) where it does not, or where models are to be spared."""
        try:
            return await asyncio.wait_for(work, self._due(visit) - self._clock())
        except asyncio.TimeoutError:
            raise self._refusal() from None

    def _due(self, visit: Visit, also_ms: float | None = None) -> float:
        """In time for an answer to be handed over by a loop as late as this one."""
        within_s = self._deadlines.seconds(visit.header_ms, also_ms)
        if not self._next(1, passing(self.late_s / within_s, MODELS)):
            return -math.inf
        return visit.since + within_s * (1 - RESERVE) - 2 * self.late_s

    def _refusal(self) -> ApiError:
        seconds = retry_after(max(self.late_s, self.inside * self.each_s), self.refused, self._draw())
        words = "more is asked than can be answered in time"
        return ApiError(503, "overloaded", words, retry_after_s=seconds)

    def _next(self, of: int, share: float) -> bool:
        """Whether the next one is among this share of them, evenly spread."""
        self._owed[of] = min(1.0, self._owed[of]) + share
        if self._owed[of] < 1.0:
            return False
        self._owed[of] -= 1.0
        return True

    def _watch(self, now: float) -> None:
        self._last = now
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # or nobody looks
            self._loop, self.late_s = loop, 0.0
            self._lates.clear()
            self._then = self._done, self._worked()
            self._await(loop, now)

    def _await(self, loop: asyncio.AbstractEventLoop, now: float) -> None:
        self._expected = now + TICK_S
        loop.call_later(TICK_S, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = self._clock()
        self.look(now)
        if now - self._last > CALM_S and not self.inside:
            self._loop, self.late_s = None, 0.0
        else:
            self._await(loop, now)

    def look(self, now: float) -> None:
        """Learn from one tick."""
        self._lates.append(max(0.0, now - self._expected))
        self.late_s = min(self._lates) if len(self._lates) == STANDING else 0.0
        done, worked = self._then
        if self._done > done:
            work = self._worked()
            each_s = (work - worked) / (self._done - done)
            self._then = self._done, work
            self.each_s += (GAIN if self.each_s else 1.0) * (each_s - self.each_s)


def asked_ms(value: bytes) -> float:
    """The milliseconds of a header. Raises ApiError (422)."""
    try:
        ms = float(value)
    except ValueError:
        ms = math.nan
    if not 0 < ms < math.inf:
        words = "must be a number of milliseconds above 0"
        raise ApiError(422, "invalid_value", words, "header.x-deadline-ms")
    return ms


def document(described: dict[str, Any]) -> None:
    """Add deadlines, the words of `degraded` and Retry-After to an OpenAPI document."""
    header = {
        "name": "X-Deadline-Ms",
        "in": "header",
        "required": False,
        "schema": {"type": "number", "exclusiveMinimum": 0},
        "description": "As `deadline_ms`; seen before the body is read. The shorter of the two counts.",
    }
    paths = described["paths"]
    for asked in (paths["/v1/recommend"]["post"], paths["/v1/items/{id}/similar"]["get"]):
        asked["parameters"] = [*asked.get("parameters", ()), header]
        refused = asked["responses"]["503"]
        refused["description"] = "more is asked than can be answered in time; ask again after Retry-After"
        refused["headers"] = {
            "Retry-After": {"description": "Whole seconds.", "schema": {"type": "integer", "minimum": 1}}
        }
    levels = "; ".join(f"'{NAMES[level]}': {words}" for level, words in MEANINGS.items())
    reasons = "; ".join(f"'{why}': {words}" for why, words in REASONS.items())
    told = described["components"]["schemas"]["RecommendResponse"]["properties"]["degraded"]
    told["description"] += (
        f" 'LEVEL: WHY' where time or a stage was missing. LEVEL is one of {levels}. WHY is one of {reasons}."
        " Other words: 'unknown user', 'unknown history', 'pin left out', 'state unavailable', 'state late'."
    )

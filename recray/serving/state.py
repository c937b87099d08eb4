"""Events and histories behind the event loop: a store on threads of its own, and the logs of feedback.

A read that fails makes an answer less than it could be; a write that fails is refused, so that the client
sends it again. What cannot be reached is left alone for a while: nobody waits for it in vain.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recray.errors import ConfigError
from recray.feedback.events import LATEST_S, Event, Kept
from recray.feedback.log import EVENTS, IMPRESSIONS, Limits, SegmentLog
from recray.feedback.store import REDIS, Store, StoreError, open_store
from recray.serving.answers import open_answers
from recray.serving.backlog import Backlog
from recray.serving.batching import Batcher
from recray.serving.deadline import TooLate
from recray.serving.schema import ApiError, EventsRequest, RecommendRequest
from recray.serving.seen import Seen
from recray.serving.settings import GraphArgs
from recray.serving.tracing import open_tracer

log = logging.getLogger("recray.serving")

UNAVAILABLE = "state unavailable"  # of an answer without the events that came after its bundle
LATE = "state late"  # of one for which there was no time to wait for them
SHARE, SPARED_S = (
    4,
    0.05,
)  # of what is left until the deadline events may take 1 / SHARE; where models are spared
FIRST_S, LONGEST_S = 0.5, 8.0  # how long a store that failed is left alone, and how long at most
READS, WRITES = 64, 32  # asks that go to the store together

_Shown = tuple[str, "str | None", float, str, Sequence[Any]]  # request, user, time, generation, items


class UserState:
    """What one ingress replica keeps of users. One event loop owns it."""

    def __init__(self, store: Store, feedback: Path | None = None, limits: Limits | None = None) -> None:
        """feedback: the folder of the logs; without one nothing is logged. Raises ConfigError for it."""
        self._store = store
        self._events = None if feedback is None else SegmentLog(feedback, EVENTS, limits)
        self._impressions: Backlog[_Shown] | None = None
        if feedback is not None:
            impressions = SegmentLog(feedback, IMPRESSIONS, limits)
            self._impressions = Backlog(impressions, IMPRESSIONS, _impression)
        self._reading, self._writing = Patience(), Patience()  # a store may do the one and not the other
        self._read: Batcher[str, list[Kept]] = Batcher(self._histories, max_size=READS)
        self._write: Batcher[Sequence[Event], list[bool]] = Batcher(self._append, max_size=WRITES)

    async def recall(self, ask: RecommendRequest) -> list[str]:
        """Put the events of its user into a request that asks for their history; says why not, if so."""
        if ask.user is None or ask.history is not None:
            return []
        now = time.monotonic()
        left = ask.due - now
        try:
            ask.remember(await self._read(ask.user, now + (left / SHARE if left > 0 else SPARED_S)))
        except StoreError:
            return [UNAVAILABLE]
        except TooLate:
            return [UNAVAILABLE if left > 0 else LATE]
        return []

    async def keep(self, ask: EventsRequest, request_id: str) -> list[bool]:
        """Which of the events were not known before; all are kept now. Raises ApiError."""
        events = events_of(ask, request_id, time.time())
        try:
            return await self._write(events)
        except StoreError:
            words = "events cannot be kept now; send them again"
            raise ApiError(503, "unavailable", words, "state") from None

    def shown(self, request_id: str, user: str | None, generation: str, items: Sequence[Any]) -> None:
        """Log what was answered, a little later."""
        if self._impressions is not None:
            self._impressions.add((request_id, user, time.time(), generation, items))

    def tidy(self) -> None:
        """Delete what has been logged for too long, on a thread."""
        for log_ in (self._events, self._impressions):
            if log_ is not None:
                asyncio.get_running_loop().run_in_executor(None, log_.tidy)

    def close(self) -> None:
        """Write what waits, and let go of everything."""
        self._read.close()
        self._write.close()
        for part in (self._events, self._impressions, self._store):
            if part is not None:
                part.close()

    def _histories(self, users: Sequence[str]) -> Sequence[list[Kept]]:
        found: list[list[Kept]] = self._reading.ask(lambda: self._store.histories(users))
        return found

    def _append(self, asks: Sequence[Sequence[Event]]) -> Sequence[list[bool]]:
        """Into the store first: what is then lost with this process was never acknowledged, and the retry is
        logged. What is logged twice counts once by its id."""
        flat = [event for events in asks for event in events]
        new = iter(self._writing.ask(lambda: self._store.append(flat)))
        if self._events is not None:
            try:
                self._events.write([_line(event) for event in flat])
            except OSError as error:
                log.warning("events cannot be logged: %s", error.strerror)
                raise StoreError("the log of events cannot be written") from None
        return [[bool(next(new)) for _ in events] for events in asks]


class Patience:
    """Leaves alone what failed: at first briefly, then twice as long each time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._until, self._next = clock, 0.0, FIRST_S

    def ask(self, work: Callable[[], Any]) -> Any:
        """What `work` gives. Raises StoreError when it does, and unasked for a while after."""
        if self._clock() < self._until:
            raise StoreError("the state failed just now")
        try:
            made = work()
        except StoreError as error:
            if self._next == FIRST_S:
                log.warning("%s", error)
            self._until = self._clock() + self._next
            self._next = min(2 * self._next, LONGEST_S)
            raise
        self._until, self._next = 0.0, FIRST_S
        return made


def events_of(ask: EventsRequest, request_id: str, now: float) -> list[Event]:
    """What was sent, with all that it left open: when, what it counts, and what it is known by.

    Without an id an event is known by what it says if it says when it was, else by its place in this
    request: then the client must send the same X-Request-Id again. Raises ApiError (422) for the future.
    """
    made = []
    for n, sent in enumerate(ask.events):
        time_ = now if sent.time is None else float(sent.time)
        if time_ > now + LATEST_S:
            words = "the time lies in the future; give seconds since 1970"
            raise ApiError(422, "invalid_value", words, f"body.events.{n}.time")
        weight = (0.0 if sent.event == "return" else 1.0) if sent.weight is None else float(sent.weight)
        named = sent.event_id
        if named is None:
            said = "" if sent.time is None else f"{sent.event or ''}@{time_!r} {sent.item}"
            named = said or f"{request_id}.{n}"
        made.append(Event(ask.user, sent.item, time_, named, weight, sent.event or "", sent.request_id or ""))
    return made


def open_state(
    where: str | None, feedback: str | None = None, limits: Limits | None = None
) -> UserState | None:
    """The state at a folder or a Redis URL; None for none. The logs lie in `feedback`, by default in that
    folder. Raises ConfigError."""
    if where is None:
        if feedback is not None:
            raise ConfigError("feedback is logged of what the state keeps", fix="give --state, too")
        return None
    return UserState(open_store(where), folder_of(where, feedback), limits)


def folder_of(where: str | None, feedback: str | None) -> Path | None:
    """The folder of the logs: as given, else that of the state where it is one."""
    folder = feedback if feedback is not None or where is None or where.startswith(REDIS) else where
    return None if folder is None else Path(folder)


def seen_by(args: GraphArgs, held: Callable[[], Mapping[str, Any]]) -> Seen:
    """What an ingress replica notes, with the logs that are asked for. Raises ConfigError."""
    folder = folder_of(args.state, args.feedback)
    return Seen(kept=open_answers(folder, args.answers), held=held, tracer=open_tracer(folder, args.trace))


def settled(args: GraphArgs, machines: int) -> GraphArgs:
    """With `state` and `feedback` as every replica finds them, checked beforehand. Raises ConfigError."""
    where, logs = args.state, None if args.feedback is None else os.path.abspath(args.feedback)
    if where is not None and "://" not in where:
        if machines > 1:
            words = f"is a folder of one machine, and the cluster has {machines}"
            raise ConfigError(words, where=where, fix="give --state redis://HOST:PORT/0")
        where = os.path.abspath(where)
    seen_by(dataclasses.replace(args, state=where, feedback=logs), dict)
    users = open_state(where, logs)
    if users is not None:
        users.close()
    return dataclasses.replace(args, state=where, feedback=logs)


def _line(event: Event) -> dict[str, Any]:
    told = {"user": event.user, "item": event.item, "time": event.time, "event_id": event.id}
    told["weight"] = event.weight
    return told | {k: v for k, v in (("event", event.event), ("request_id", event.request_id)) if v}


def _impression(shown: _Shown) -> dict[str, Any]:
    request_id, user, time_, generation, items = shown
    told = {"request_id": request_id, "user": user, "time": time_, "generation": generation}
    return {**told, "items": [item["item"] for item in items]}

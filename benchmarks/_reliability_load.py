"""Clients that ask without pause while something is done to the server: what each was answered, and by which
generation; and one that sends events until each is acknowledged."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from recray.bundles.bundle import Bundle

K, APART = 8, 1e-5  # items an answer; scores of a batch of many differ by so little from those of one alone
Items = list[tuple[str, float]]


@dataclass(frozen=True)
class Answer:
    """A 200: when it came, for whom, its stamp and its items."""

    at: float
    user: str
    generation: str
    items: Items


@dataclass(frozen=True)
class Failure:
    """Anything else: when, and what came."""

    at: float
    what: str


class Load:
    """`clients` that ask for the `users` in turn, each again when it has its answer."""

    def __init__(self, url: str, users: Sequence[str], clients: int = 6, *, keep: bool = True) -> None:
        self.url, self.users, self.clients, self.keep = url, users, clients, keep
        self.answers: list[Answer] = []
        self.failed: list[Failure] = []
        self.answered = self.under_way = 0
        self.newest = math.nan  # when the newest 200 came
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(120)

    def wait(self, more: int = 40, within_s: float = 60) -> None:
        """Until so many more have been answered, or `within_s` are over."""
        goal = self.answered + more
        self.until(lambda: self.answered >= goal, within_s)

    def wait_for_all(self) -> int:
        """Until every user has been answered once more; how many answers there were before."""
        begun = len(self.answers)
        self.until(lambda: {one.user for one in self.answers[begun:]} == set(self.users))
        return begun

    def until(self, holds: Callable[[], bool], within_s: float = 60) -> bool:
        """Wait for something, at most so long; whether it came."""
        deadline = time.monotonic() + within_s
        while not holds():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    async def _run(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=60) as session:
            await asyncio.gather(*(self._client(session, n) for n in range(self.clients)))

    async def _client(self, session: httpx.AsyncClient, at: int) -> None:
        while not self._done.is_set():
            user = self.users[at % len(self.users)]
            at += 1
            self.under_way += 1
            try:
                answer = await session.post("/v1/recommend", json={"user": user, "k": K})
            except httpx.HTTPError as error:
                self.failed.append(Failure(time.monotonic(), type(error).__name__))
                await asyncio.sleep(0.05)  # nobody listens there now
                continue
            finally:
                self.under_way -= 1
            self._note(user, answer)

    def _note(self, user: str, answer: httpx.Response) -> None:
        now = time.monotonic()
        if answer.status_code != 200:
            self.failed.append(Failure(now, f"{answer.status_code} {answer.text:.200}"))
            return
        self.answered, self.newest = self.answered + 1, now
        if self.keep:
            body = answer.json()
            items = [(item["item"], item["score"]) for item in body["items"]]
            self.answers.append(Answer(now, user, body["generation"], items))


def mixed(answers: Iterable[Answer], bundles: Sequence[Bundle]) -> list[Answer]:
    """Those that the bundle they are stamped with does not give: every one is computed again from it."""
    by_name = {bundle.generation: bundle for bundle in bundles}
    known: dict[tuple[str, str], Items] = {}
    wrong = []
    for one in answers:
        key = (one.user, one.generation)
        if key not in known and one.generation in by_name:
            ranked = by_name[one.generation].recommend(user=one.user, k=K).items
            known[key] = [(item.item, item.score) for item in ranked]
        if not _same(one.items, known.get(key)):
            wrong.append(one)
    return wrong


def _same(items: Items, want: Items | None) -> bool:
    if want is None or [item for item, _ in items] != [item for item, _ in want]:
        return False
    return all(abs(a - b) <= APART * max(1.0, abs(b)) for (_, a), (_, b) in zip(items, want))


class Events:
    """One event after the other, each of a user of its own, sent again until it is acknowledged."""

    def __init__(self, url: str, items: Sequence[str], pause_s: float = 0.05) -> None:
        self.url, self._items, self._pause_s = url, items, pause_s
        self.sent: list[dict[str, Any]] = []
        self.retries = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Events:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(120)

    def _run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as session:
            while not self._done.is_set():
                n = len(self.sent)
                event = {"item": self._items[n % len(self._items)], "event_id": f"e{n}", "event": "click"}
                body = {"user": f"event-{n}", "events": [event]}
                if self._acknowledged(session, body):
                    self.sent.append(body)
                self._done.wait(self._pause_s)

    def _acknowledged(self, session: httpx.Client, body: Mapping[str, Any]) -> bool:
        while not self._done.is_set():
            try:
                if session.post("/v1/events", json=body).status_code == 200:
                    return True
            except httpx.HTTPError:
                pass
            self.retries += 1
            self._done.wait(0.2)
        return False

    def lost(self) -> int:
        """How many acknowledged ones the server does not know when they are sent once more."""
        unknown = 0
        with httpx.Client(base_url=self.url, timeout=30) as session:
            for body in self.sent:
                unknown += session.post("/v1/events", json=body).json()["repeated"] != 1
        return unknown

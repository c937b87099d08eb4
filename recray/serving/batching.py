"""Concurrent calls answered together, on threads of our own or by one call of another process.

A call waits only while everything that could take it is busy; whatever has gathered by then goes as one
batch. So a lone client pays nothing, and the batch grows with the load. One event loop owns a batcher.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

from recray.serving import deadline
from recray.serving.deadline import LATE, TIME, Pace, TooLate

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")
Results = list[Answer | BaseException]


class _Gathered(ABC, Generic[Ask, Answer]):
    """Gathers asks into batches of at most `max_size`, `slots` of which are out at a time.

    A caller that hangs up is skipped, before its batch starts or after; so is one whose time is over.
    """

    def __init__(self, *, max_size: int, slots: int, wait_s: float | None = None) -> None:
        if max_size < 1 or slots < 1:
            raise ValueError(f"max_size {max_size} and slots {slots} must be at least 1")
        self._max_size, self._slots, self._wait_s = max_size, slots, wait_s
        self._waiting: deque[tuple[Ask, asyncio.Future[Answer], float, float]] = deque()
        self._busy = 0
        self._timer: asyncio.TimerHandle | None = None
        self.sizes: deque[int] = deque(maxlen=1000)  # of the newest batches
        self.pace = Pace()  # of whole batches
        self.noted: Callable[[int, float], None] | None = None  # told of each batch: of how many, and seconds

    @property
    def waiting(self) -> int:
        """How many asks are in no batch yet."""
        return len(self._waiting)

    async def __call__(
        self, ask: Ask, due: float = math.inf, future: asyncio.Future[Answer] | None = None
    ) -> Answer:
        """The answer. Raises TooLate when there is none at `due`, by the loop's clock; whoever holds the
        future may answer before the batch does."""
        loop = asyncio.get_running_loop()
        if future is None:
            future = loop.create_future()
        self._waiting.append((ask, future, loop.time(), due))
        if len(self._waiting) == 1:  # later, so that all that arrive in this turn of the loop go together
            loop.call_soon(self._start, loop)
        if due == math.inf:
            return await future
        timer = loop.call_at(due, _late, future, LATE)
        try:
            return await future
        finally:
            timer.cancel()

    def ahead_s(self) -> float:
        """How long the next ask is expected to wait."""
        while self._waiting and self._waiting[0][1].done():  # it is late or gone, and waits no more
            self._waiting.popleft()
        if not self._waiting and self._busy < self._slots:
            return 0.0
        waiting, size = len(self._waiting), self._max_size
        batch_s = self.pace.seconds(min(size, waiting + 1))
        return deadline.wait_s(waiting, self._busy, size=size, slots=self._slots, batch_s=batch_s)

    @abstractmethod
    def _work(self, loop: asyncio.AbstractEventLoop, asks: list[Ask]) -> asyncio.Future[Results[Answer]]:
        """Begin to answer a batch: one answer, or what went wrong with it, for each ask."""

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        while self._waiting and (self._busy < self._slots or self._overdue(loop)):
            batch: list[Ask] = []
            futures: list[asyncio.Future[Answer]] = []
            while self._waiting and len(batch) < self._max_size:
                ask, future, _, due = self._waiting.popleft()
                if due <= now:  # its timer is as late as we are
                    _late(future, TIME)
                if not future.done():
                    batch.append(ask)
                    futures.append(future)
            if not batch:
                continue
            self._busy += 1
            self.sizes.append(len(batch))
            try:
                work = self._work(loop, batch)
            except RuntimeError as error:  # closed
                self._busy -= 1
                _settle(futures, [error] * len(batch))
                continue
            work.add_done_callback(partial(self._finish, loop, futures, now))
        if self._waiting and self._wait_s is not None and self._timer is None:
            due = self._waiting[0][2] + self._wait_s
            self._timer = loop.call_at(due, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._start(loop)

    def _overdue(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Whether the oldest ask has waited for as long as it may."""
        return self._wait_s is not None and loop.time() >= self._waiting[0][2] + self._wait_s

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[Answer]],
        began: float,
        work: asyncio.Future[Results[Answer]],
    ) -> None:
        self._busy -= 1
        self.pace.add(len(futures), loop.time() - began)
        if self.noted is not None:
            self.noted(len(futures), loop.time() - began)
        try:
            results = work.result()
        except (Exception, asyncio.CancelledError) as error:
            results = [error] * len(futures)
        _settle(futures, results)
        self._start(loop)


class Batcher(_Gathered[Ask, Answer]):
    """Calls `run(asks) -> answers`, in order and of the same number, on `threads` threads.

    When a batch raises, its asks are run again one by one, so that only those at fault see the error.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Ask]], Sequence[Answer | BaseException]],
        *,
        max_size: int,
        threads: int = 1,
    ) -> None:
        super().__init__(max_size=max_size, slots=threads)
        self._run = run
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="recray-model")

    def close(self) -> None:
        """Let running batches end; later calls fail."""
        self._executor.shutdown(wait=False)

    def _work(self, loop: asyncio.AbstractEventLoop, asks: list[Ask]) -> asyncio.Future[Results[Answer]]:
        return loop.run_in_executor(self._executor, isolated, self._run, asks)


class Sender(_Gathered[Ask, Answer]):
    """Awaits `send(asks) -> answers`, in order and of the same number, for at most `in_flight` at a time.

    An ask that has waited for `wait_s` goes all the same. When a batch raises, its asks are sent again one
    by one, so that only those at fault see the error; an error among the answers is one ask's alone.
    """

    def __init__(
        self,
        send: Callable[[Sequence[Ask]], Awaitable[Sequence[Answer | BaseException]]],
        *,
        max_size: int,
        in_flight: int,
        wait_s: float,
    ) -> None:
        super().__init__(max_size=max_size, slots=in_flight, wait_s=wait_s)
        self._send = send

    def _work(self, loop: asyncio.AbstractEventLoop, asks: list[Ask]) -> asyncio.Future[Results[Answer]]:
        # in a context of its own: in that of one request Serve would cancel it with that request
        return contextvars.Context().run(loop.create_task, self._sent(asks))

    async def _sent(self, asks: list[Ask]) -> Results[Answer]:
        try:
            answers = list(await self._send(asks))
            if len(answers) != len(asks):
                raise RuntimeError(f"{len(answers)} answers to {len(asks)} asks")
            return answers
        except Exception as error:
            if len(asks) == 1:
                return [error]
        return [answer for ask in asks for answer in await self._sent([ask])]


def isolated(
    run: Callable[[Sequence[Ask]], Sequence[Answer | BaseException]], asks: Sequence[Ask]
) -> Results[Answer]:
    """The answers of `run`; when a batch raises, its asks are run one by one, each with its own error."""
    try:
        answers: Results[Answer] = list(run(asks))
        if len(answers) != len(asks):
            raise RuntimeError(f"{len(answers)} answers to {len(asks)} asks")
        return answers
    except Exception as error:
        if len(asks) == 1:
            return [error]
    return [answer for ask in asks for answer in isolated(run, [ask])]


def _late(future: asyncio.Future[Answer], why: str) -> None:
    if not future.done():
        future.set_exception(TooLate(why))


def _settle(futures: Sequence[asyncio.Future[Answer]], results: Sequence[Answer | BaseException]) -> None:
    for future, result in zip(futures, results, strict=True):
        if future.done():  # its caller hung up: setting a result would raise and starve the others
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

"""Concurrent calls answered together: a queue in front of an executor of our own.

A call waits only while every thread is busy; whatever has gathered by then goes as one batch. So a
lone client pays nothing, and the batch grows with the load. One event loop owns a batcher.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, TypeVar

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


class Batcher(Generic[Ask, Answer]):
    """Calls `run(asks) -> answers`, in order and of the same number, on `threads` threads.

    A caller that hangs up is skipped, before its batch starts or after. When a batch raises, its asks
    are run again one by one, so that only those at fault see the error.
    """

    def __init__(
        self, run: Callable[[Sequence[Ask]], Sequence[Answer]], *, max_size: int, threads: int = 1
    ) -> None:
        if max_size < 1 or threads < 1:
            raise ValueError(f"max_size {max_size} and threads {threads} must be at least 1")
        self._run, self._max_size, self._threads = run, max_size, threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="recray-model")
        self._waiting: deque[tuple[Ask, asyncio.Future[Answer]]] = deque()
        self._busy = 0
        self.sizes: deque[int] = deque(maxlen=1000)  # of the newest batches

    async def __call__(self, ask: Ask) -> Answer:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((ask, future))
        loop.call_soon(self._start, loop)  # after the others that arrived in this turn of the loop
        return await future

    def close(self) -> None:
        """Let running batches end; later calls fail."""
        self._executor.shutdown(wait=False)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._busy < self._threads and self._waiting:
            batch: list[tuple[Ask, asyncio.Future[Answer]]] = []
            while self._waiting and len(batch) < self._max_size:
                ask, future = self._waiting.popleft()
                if not future.done():
                    batch.append((ask, future))
            if not batch:
                return
            self._busy += 1
            self.sizes.append(len(batch))
            try:
                work = loop.run_in_executor(self._executor, self._answers, [ask for ask, _ in batch])
            except RuntimeError as error:  # closed
                self._busy -= 1
                _settle(batch, [error] * len(batch))
                continue
            work.add_done_callback(partial(self._finish, loop, [future for _, future in batch]))

    def _answers(self, asks: list[Ask]) -> list[Answer | BaseException]:
        try:
            answers = list(self._run(asks))
            if len(answers) != len(asks):
                raise RuntimeError(f"{len(answers)} answers to {len(asks)} asks")
            return list(answers)
        except Exception as error:
            if len(asks) == 1:
                return [error]
        return [answer for ask in asks for answer in self._answers([ask])]

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        futures: list[asyncio.Future[Answer]],
        work: asyncio.Future[list[Answer | BaseException]],
    ) -> None:
        self._busy -= 1
        try:
            results = work.result()
        except (Exception, asyncio.CancelledError) as error:
            results = [error] * len(futures)
        _settle([(None, future) for future in futures], results)
        self._start(loop)


def _settle(
    batch: Sequence[tuple[object, asyncio.Future[Answer]]], results: Sequence[Answer | BaseException]
) -> None:
    for (_, future), result in zip(batch, results, strict=True):
        if future.done():  # its caller hung up: setting a result would raise and starve the others
            continue
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

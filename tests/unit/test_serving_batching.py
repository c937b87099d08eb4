"""Batches: order, sizes, and what a caller that hangs up or a poisoned ask does to the others."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from contextvars import ContextVar

import pytest

from recray.serving.batching import Batcher, Sender
from recray.serving.deadline import TooLate


def test_concurrent_calls_share_a_batch_and_keep_their_answers() -> None:
    async def scene() -> None:
        seen: list[int] = []

        def run(asks: Sequence[int]) -> list[int]:
            seen.append(len(asks))
            return [ask * 10 for ask in asks]

        batcher = Batcher(run, max_size=8)
        assert await asyncio.gather(*(batcher(i) for i in range(20))) == [i * 10 for i in range(20)]
        assert seen == [8, 8, 4]
        assert await batcher(7) == 70
        assert seen[-1] == 1
        batcher.close()

    asyncio.run(scene())


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_a_caller_that_hangs_up_harms_nobody(when: str) -> None:
    async def scene() -> None:
        started, go = threading.Event(), threading.Event()
        ran: list[int] = []

        def run(asks: Sequence[int]) -> list[int]:
            ran.extend(asks)
            started.set()
            assert go.wait(10)
            return list(asks)

        batcher = Batcher(run, max_size=4)
        calls = [asyncio.create_task(batcher(i)) for i in range(6)]  # 0-3 run, 4 and 5 wait
        await asyncio.to_thread(started.wait, 10)
        leaver = 1 if when == "running" else 4
        calls[leaver].cancel()
        await asyncio.sleep(0)
        go.set()
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert isinstance(results.pop(leaver), asyncio.CancelledError)
        assert results == [i for i in range(6) if i != leaver]
        assert (4 in ran) == (when == "running"), "nobody waits for it, so it must not be run"
        assert await asyncio.wait_for(batcher(9), 10) == 9
        batcher.close()

    asyncio.run(scene())


def test_only_the_ask_at_fault_sees_its_error() -> None:
    async def scene() -> None:
        def run(asks: Sequence[int]) -> list[float]:
            return [1 / ask for ask in asks]

        batcher = Batcher(run, max_size=8)
        answers = await asyncio.gather(*(batcher(i) for i in (1, 0, 2)), return_exceptions=True)
        assert answers[0] == 1
        assert answers[2] == 0.5
        assert isinstance(answers[1], ZeroDivisionError)
        batcher.close()

    asyncio.run(scene())


def test_too_few_answers_is_an_error_and_not_a_hang() -> None:
    async def scene() -> None:
        batcher: Batcher[int, int] = Batcher(lambda asks: [], max_size=2)
        with pytest.raises(RuntimeError, match="0 answers to 1 asks"):
            await asyncio.wait_for(batcher(1), 10)
        batcher.close()
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(batcher(1), 10)

    asyncio.run(scene())


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(lambda asks: list(asks), max_size=0)


def test_a_sender_gathers_while_its_calls_are_out_and_forgets_who_left() -> None:
    async def scene() -> None:
        go, sent = asyncio.Event(), []

        async def send(asks: Sequence[int]) -> list[int]:
            sent.append(list(asks))
            await go.wait()
            return [ask * 10 for ask in asks]

        sender = Sender(send, max_size=8, in_flight=1, wait_s=60)
        first = asyncio.create_task(sender(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        calls = [asyncio.create_task(sender(i)) for i in range(1, 12)]
        await asyncio.sleep(0)
        calls[2].cancel()  # waits
        first.cancel()  # is on its way
        await asyncio.sleep(0)
        go.set()
        results = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        assert sent == [[0], [1, 2, 4, 5, 6, 7, 8, 9], [10, 11]]
        assert isinstance(results.pop(2), asyncio.CancelledError)
        assert results == [i * 10 for i in range(1, 12) if i != 3]

    asyncio.run(scene())


def test_nobody_waits_longer_than_agreed_for_a_call_that_hangs() -> None:
    async def scene() -> None:
        hangs, sent = asyncio.Event(), []

        async def send(asks: Sequence[int]) -> list[int]:
            sent.append(list(asks))
            if asks[0] == 0:
                await hangs.wait()
            return list(asks)

        sender = Sender(send, max_size=4, in_flight=1, wait_s=0.02)
        stuck = asyncio.create_task(sender(0))
        await asyncio.sleep(0.005)
        assert await asyncio.wait_for(asyncio.gather(*(sender(i) for i in range(1, 7))), 10) == [*range(1, 7)]
        assert sent == [[0], [1, 2, 3, 4], [5, 6]]
        assert not stuck.done()
        hangs.set()
        assert await asyncio.wait_for(stuck, 10) == 0

    asyncio.run(scene())


def test_a_batch_that_fails_is_sent_again_one_by_one() -> None:
    async def scene() -> None:
        async def send(asks: Sequence[int]) -> list[float | BaseException]:
            if 9 in asks:
                return [LookupError("mine alone") if ask == 9 else ask for ask in asks]
            return [1 / ask for ask in asks]

        sender = Sender(send, max_size=8, in_flight=1, wait_s=60)
        answers = await asyncio.gather(*(sender(i) for i in (1, 0, 2)), return_exceptions=True)
        assert (answers[0], answers[2]) == (1, 0.5)
        assert isinstance(answers[1], ZeroDivisionError)
        answers = await asyncio.gather(*(sender(i) for i in (1, 9)), return_exceptions=True)
        assert answers[0] == 1
        assert isinstance(answers[1], LookupError)

    asyncio.run(scene())


def test_whose_time_is_over_is_not_run_and_does_not_wait() -> None:
    async def scene() -> None:
        go, ran = threading.Event(), list[int]()

        def run(asks: Sequence[int]) -> list[int]:
            ran.extend(asks)
            assert go.wait(60)
            return list(asks)

        batcher: Batcher[int, int] = Batcher(run, max_size=4)
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(batcher(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(TooLate) as late:
            await batcher(1, loop.time() + 0.02)
        assert late.value.why == "late"
        over = asyncio.create_task(batcher(2, loop.time() - 1))
        patient = asyncio.create_task(batcher(3, loop.time() + 600))
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(TooLate):
            await over
        assert (await first, await patient) == (0, 3)
        assert ran == [0, 3]
        batcher.close()

    asyncio.run(scene())


def test_one_may_be_answered_before_its_batch() -> None:
    async def scene() -> None:
        go = threading.Event()
        loop = asyncio.get_running_loop()
        early: asyncio.Future[str] = loop.create_future()

        def run(asks: Sequence[int]) -> list[str]:
            loop.call_soon_threadsafe(early.set_result, "early")
            assert go.wait(60)
            return ["whole"] * len(asks)

        batcher: Batcher[int, str] = Batcher(run, max_size=4)
        other = asyncio.create_task(batcher(1))
        assert await batcher(0, math.inf, early) == "early"
        assert not other.done()
        go.set()
        assert await other == "whole"
        batcher.close()

    asyncio.run(scene())


def test_a_batcher_says_how_long_the_next_waits() -> None:
    async def scene() -> None:
        go = threading.Event()

        def run(asks: Sequence[int]) -> list[int]:
            assert go.wait(60)
            return list(asks)

        batcher: Batcher[int, int] = Batcher(run, max_size=2)
        for _ in range(3):
            batcher.pace.add(2, 10.0)
        assert batcher.ahead_s() == 0.0, "nobody is here"
        tasks = [asyncio.create_task(batcher(n)) for n in range(6)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert batcher.waiting == 4
        batch_s = batcher.pace.seconds(2)
        assert batcher.ahead_s() == pytest.approx(3 * batch_s), "two batches wait, and one is out"
        go.set()
        await asyncio.gather(*tasks)
        batcher.close()

    asyncio.run(scene())


def test_what_is_sent_together_belongs_to_no_request() -> None:
    asked: ContextVar[str] = ContextVar("asked", default="")

    async def scene() -> list[str]:
        async def send(asks: Sequence[int]) -> list[str]:
            return [asked.get()] * len(asks)

        sender = Sender(send, max_size=8, in_flight=1, wait_s=60)
        asked.set("of one request")
        return list(await asyncio.gather(sender(0), sender(1)))

    assert asyncio.run(scene()) == ["", ""]

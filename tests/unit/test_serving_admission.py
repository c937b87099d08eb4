"""Who comes in: Little's law, a loop that is late, and when to ask again; with clocks of our own."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.serving import admission
from recray.serving.admission import LONGEST_S, STANDING, TICK_S, Door, asked_ms, most, passing, retry_after
from recray.serving.deadline import Deadlines
from recray.serving.schema import ApiError, RecommendRequest


class World:
    """Two clocks that stand still until they are moved."""

    def __init__(self) -> None:
        self.now, self.work = 100.0, 5.0
        self.door = Door(
            Deadlines(default_ms=200, max_ms=2000),
            clock=lambda: self.now,
            worked=lambda: self.work,
            draw=lambda: 0.5,
        )

    def tick(self, late: float = 0.0, work: float = 0.0) -> None:
        """The loop comes round `late` seconds too late."""
        self.now += TICK_S + late
        self.work += work
        self.door.look(self.now)
        self.door._expected = self.now + TICK_S


def in_a_loop(scene: Callable[[World], None]) -> None:
    async def run() -> None:
        scene(World())

    asyncio.run(run())


def test_littles_law() -> None:
    assert most(0.2, 0.001) == pytest.approx(200)
    assert most(0.2, 0.0) == math.inf, "nothing is known yet"


@given(st.floats(0, 1e4), st.floats(0, 1), st.floats(0, 1))
def test_retry_after_is_whole_seconds_within_bounds_and_grows_with_the_crowd(
    within: float, refused: float, draw: float
) -> None:
    seconds = retry_after(within, refused, draw)
    assert 1 <= seconds <= LONGEST_S
    assert seconds == int(seconds)
    assert retry_after(within * 2, refused, draw) >= seconds
    assert retry_after(within, min(1.0, refused + 0.1), draw) >= seconds


def test_a_request_has_its_deadline_less_what_handing_over_takes() -> None:
    def scene(world: World) -> None:
        visit = world.door.enter([(b"host", b"x"), (b"x-deadline-ms", b"1000")])
        for body, seconds in ((None, 1.0), (500.0, 0.5), (9000.0, 1.0)):
            ask = RecommendRequest(deadline_ms=body)
            world.door.limit(ask, visit)
            assert ask.due == pytest.approx(100.0 + 0.9 * seconds)
        visit, ask = world.door.enter([]), RecommendRequest()
        world.door.late_s = 0.005
        world.door.limit(ask, visit)
        assert ask.due == pytest.approx(100.0 + 0.9 * 0.2 - 0.01)

    in_a_loop(scene)


def test_a_loop_that_is_late_sends_away_and_lets_in_when_it_has_caught_up() -> None:
    def scene(world: World) -> None:
        world.door.enter([])
        world.tick(late=5.0)
        world.tick()
        world.door.enter([])  # that was a pause, and is over
        for _ in range(STANDING):
            world.tick(late=0.02)
        world.door.enter([])
        for _ in range(STANDING):
            world.tick(late=0.06)
        with pytest.raises(ApiError) as error:
            world.door.enter([])
        assert (error.value.status, error.value.code) == (503, "overloaded")
        assert error.value.retry_after_s >= 1
        world.door.enter([(b"x-deadline-ms", b"1000")])  # has the time
        world.tick()
        world.door.enter([])

    in_a_loop(scene)


def test_the_later_the_loop_the_fewer_go_on_evenly_spread() -> None:
    assert [passing(late, (0.1, 0.3)) for late in (0.0, 0.1, 0.2, 0.3, 9.0)] == pytest.approx(
        [1, 1, 0.5, 0, 0]
    )

    def scene(world: World) -> None:
        def to_models(late: float) -> list[bool]:
            made = []
            for _ in range(40):
                world.door.late_s, ask = late * 0.2, RecommendRequest()
                visit = world.door.enter([])
                world.door.limit(ask, visit)
                world.door.leave()
                made.append(ask.due > -math.inf)
            return made

        assert to_models(0.04) == [True] * 40
        assert 19 <= sum(to_models(0.08)) <= 21
        assert sum(to_models(0.12)) == 0
        world.door.late_s, came_in = 0.21 * 0.2, 0
        for _ in range(40):
            with contextlib.suppress(ApiError):
                world.door.enter([])
                came_in += 1
        assert 19 <= came_in <= 21

    in_a_loop(scene)


def test_no_more_are_let_in_than_can_be_answered() -> None:
    def scene(world: World) -> None:
        for _ in range(10):  # an answer takes a core 10 ms
            world.door.enter([])
            world.door.leave()
            world.tick(work=0.010)
        assert world.door.each_s == pytest.approx(0.010)
        with pytest.raises(ApiError, match="in time"):
            for _ in range(30):
                world.door.enter([])
        assert 4 <= world.door.inside <= 7, "a quarter of the deadline, 200 ms, less its reserve"
        world.door.leave()
        world.door.enter([])

    in_a_loop(scene)


def test_sending_away_does_not_make_an_answer_look_dear() -> None:
    def scene(world: World) -> None:
        for _ in range(200):  # 10 ms an answer, 3 ms a refusal, of which there are ten
            world.door.enter([])
            world.door.leave()
            world.door.late_s = 9.0
            for _ in range(10):
                with pytest.raises(ApiError, match="in time"):
                    world.door.enter([])
            world.tick(work=0.040)
        assert world.door.each_s == pytest.approx(0.010, rel=0.01)

    in_a_loop(scene)


def test_the_loop_is_looked_at_only_while_there_are_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "CALM_S", 0.02)

    async def scene() -> None:
        door = Door()
        door.enter([])
        while door._loop is None or not door._expected:
            await asyncio.sleep(0.005)
        for _ in range(10):
            await asyncio.sleep(0.005)
        assert door._loop is not None, "one is inside"
        door.leave()
        for _ in range(2000):
            if door._loop is None:
                break
            await asyncio.sleep(0.005)
        assert door._loop is None
        door.enter([])
        assert door._loop is not None

    asyncio.run(scene())


@pytest.mark.parametrize("value", [b"", b"soon", b"0", b"-5", b"nan", b"inf", b"1e999"])
def test_a_header_that_is_no_deadline_is_refused(value: bytes) -> None:
    with pytest.raises(ApiError) as error:
        asked_ms(value)
    assert (error.value.status, error.value.where) == (422, "header.x-deadline-ms")

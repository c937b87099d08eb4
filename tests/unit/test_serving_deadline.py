"""What is done in the time that is left: one decision, times that are learned, and how long a queue takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.errors import ConfigError
from recray.serving.deadline import (
    DEVIATIONS,
    JUMP,
    LATE,
    MEANINGS,
    NAMES,
    REASONS,
    Deadlines,
    Level,
    Needs,
    Pace,
    Paces,
    decide,
    told,
    wait_s,
)

SECONDS = st.floats(0, 10)
NEEDS = st.builds(
    Needs,
    wait=SECONDS,
    retrieve=SECONDS,
    rank=SECONDS,
    light=st.none() | SECONDS,
    unranked=st.booleans(),
    cached=st.booleans(),
)


@pytest.mark.parametrize(
    ("left", "level"),
    [
        (10.0, Level.FULL),
        (6.0, Level.FULL),
        (5.9, Level.LIGHT),
        (4.0, Level.LIGHT),
        (3.9, Level.RETRIEVED),
        (3.0, Level.RETRIEVED),
        (2.9, Level.CACHED),
        (0.0, Level.CACHED),
        (-1.0, Level.CACHED),
    ],
)
def test_the_best_that_fits_is_done(left: float, level: Level) -> None:
    needs = Needs(wait=1, retrieve=2, rank=3, light=1, unranked=True, cached=True)
    assert decide(left, needs) is level


def test_what_cannot_be_is_passed_over() -> None:
    assert decide(3.0, Needs(retrieve=2, rank=3)) is Level.POPULAR
    assert decide(3.0, Needs(retrieve=2, rank=3, cached=True)) is Level.CACHED
    assert decide(3.0, Needs(retrieve=2, rank=3, light=0.5)) is Level.LIGHT


@given(st.floats(-1, 40), st.floats(0, 10), NEEDS)
def test_more_time_never_gives_less_and_there_is_always_an_answer(
    left: float, more: float, needs: Needs
) -> None:
    level = decide(left, needs)
    assert decide(left + more, needs) <= level
    assert decide(math.inf, needs) is Level.FULL
    assert level is not Level.CACHED or needs.cached
    assert level is not Level.LIGHT or needs.light is not None
    if level in (Level.LIGHT, Level.RETRIEVED, Level.FULL):
        assert needs.wait + needs.retrieve <= left


@given(st.floats(0, 20), NEEDS, SECONDS)
def test_what_takes_longer_never_gives_more(left: float, needs: Needs, more: float) -> None:
    slower = Needs(
        wait=needs.wait + more,
        retrieve=needs.retrieve,
        rank=needs.rank,
        light=needs.light,
        unranked=needs.unranked,
        cached=needs.cached,
    )
    assert decide(left, slower) >= decide(left, needs)


def test_words_are_of_known_levels_and_reasons() -> None:
    assert told(Level.LIGHT, LATE) == "light ranking: late"
    assert set(NAMES) == set(MEANINGS) == set(Level) - {Level.FULL}
    assert all(why in REASONS for why in ("overload", "deadline", "late", "unavailable"))


def test_a_queue_takes_as_long_as_the_batches_before() -> None:
    assert wait_s(0, 1, size=32, slots=1, batch_s=0.02) == pytest.approx(0.02)
    assert wait_s(64, 1, size=32, slots=1, batch_s=0.02) == pytest.approx(0.06)
    assert wait_s(64, 2, size=32, slots=2, batch_s=0.02) == pytest.approx(0.04)


def test_times_are_learned_by_size_without_the_first_of_each() -> None:
    pace = Pace()
    assert pace.seconds(8) == 0.0, "nobody knows: it is tried"
    pace.add(8, 5.0)
    assert pace.seconds(8) == 0.0, "the first makes what is made once"
    for _ in range(50):
        pace.add(8, 0.010)
    assert pace.seconds(8) == pytest.approx(0.010, rel=0.05)
    assert pace.seconds(9) == pace.seconds(8), "much like it"
    assert pace.seconds(64) == pace.seconds(8), "larger ones take no less"
    assert pace.seconds(1) == pytest.approx(0.010 / 8, rel=0.05), "smaller ones their share"
    for _ in range(3):
        pace.add(64, 0.040)
    assert pace.seconds(64) >= 0.040
    assert pace.seconds(8) == pytest.approx(0.010, rel=0.05)


def test_a_pause_is_no_rule_and_a_change_is_followed() -> None:
    pace = Pace()
    for _ in range(30):
        pace.add(1, 0.010)
    before = pace.seconds(1)
    pace.add(1, 60.0)
    assert pace.seconds(1) < before * (1 + JUMP * (1 + DEVIATIONS) / 8) * 1.01
    for _ in range(60):
        pace.add(1, 0.080)
    assert pace.seconds(1) == pytest.approx(0.080, rel=0.2)


def test_what_keeps_work_from_being_done_is_believed_less_until_it_is_seen_again() -> None:
    pace = Pace()
    for _ in range(20):
        pace.add(4, 1.0)
    times = 0
    while pace.seconds(4) > 0.1:
        pace.doubt(4)
        times += 1
    assert 20 < times < 100, "tried again, and seldom"
    pace.add(4, 1.0)
    assert pace.seconds(4) > 0.9


def test_a_batch_goes_on_with_those_who_have_the_time() -> None:
    paces = Paces()
    dues = [100.0, 100.5, math.inf]
    assert paces.found(dues, 100.1) == [1, 2], "the first is over already"
    for _ in range(20):
        paces.retrieve.add(3, 0.3)
        paces.rank.add(120, 0.3)
        paces.rank.add(30, 0.05)
    assert paces.found(dues, 100.1) == [1, 2]
    assert paces.found(dues, 100.3) == [2]
    wants, now = [40, 40, 40], 100.0
    levels = paces.levels([100.01, 100.2, 101.0], wants, [True] * 3, now)
    assert levels == [Level.RETRIEVED, Level.LIGHT, Level.FULL]
    levels = paces.levels([100.01, 100.2, 101.0], wants, [False] * 3, now)
    assert levels == [Level.POPULAR, Level.POPULAR, Level.FULL], "a list under rules is whole or not at all"


def test_deadlines_have_bounds_and_the_shortest_counts() -> None:
    deadlines = Deadlines(default_ms=200, max_ms=1000)
    assert deadlines.seconds(None, None) == 0.2
    assert deadlines.seconds(None, 500) == 0.5
    assert deadlines.seconds(100, 500) == 0.1
    assert deadlines.seconds(9e9) == 1.0
    for wrong in ({"default_ms": 0}, {"default_ms": 9e9}, {"max_ms": math.inf}, {"default_ms": math.nan}):
        with pytest.raises(ConfigError):
            Deadlines(**wrong)

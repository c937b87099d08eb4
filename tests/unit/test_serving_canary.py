"""The verdict on a canary: quick where it is plain, patient where it is chance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.errors import ConfigError
from recray.serving.canary import Band, Tally, at_least, at_most, judge, merged


def tally(ms: list[float], failed: int = 0, clicks: int = 0) -> Tally:
    made = Tally()
    for one in ms:
        made.add(one)
    for _ in range(failed):
        made.add(0.0, failed=True)
    made.clicks = clicks
    return made


def drawn(n: int, seed: int, scale: float = 1.0) -> list[float]:
    return list(scale * np.random.default_rng(seed).lognormal(1.0, 0.5, n))


@given(st.lists(st.floats(0.05, 1e5), min_size=1, max_size=300))
def test_the_p99_is_that_of_the_samples_or_a_tenth_above(ms: list[float]) -> None:
    exact = float(np.sort(ms)[int(np.ceil(0.99 * len(ms))) - 1])
    found = tally(ms).p99_ms()
    assert found is not None
    assert exact * (1 - 1e-9) <= found <= exact * 1.1 * (1 + 1e-9)


@given(st.lists(st.floats(0.05, 1e4), max_size=100), st.floats(0.05, 1e4))
def test_who_was_slower_is_never_counted_too_high(ms: list[float], limit: float) -> None:
    found, exact = tally(ms).slower(limit), sum(one > limit for one in ms)
    surely = sum(one > limit * 1.1001 for one in ms)
    assert surely <= found <= exact


def test_tallies_of_several_replicas_add_up() -> None:
    parts = [{"a": tally(drawn(300, 1), failed=2)}, {"a": tally(drawn(200, 2)), "b": tally([1.0])}]
    whole = merged(parts)
    both = tally(drawn(300, 1) + drawn(200, 2), failed=2)
    assert whole["a"] == both
    assert whole["b"].requests == 1
    assert parts[0]["a"].requests == 302, "the parts stay as they were"
    assert Tally().p99_ms() is None


@given(st.integers(0, 60), st.integers(1, 60))
def test_bounds_hold_the_share(hits: int, more: int) -> None:
    of = hits + more
    assert 0 <= at_least(hits, of) <= hits / of <= at_most(hits, of) <= 1 + 1e-12


def test_a_sound_canary_stays() -> None:
    usual = tally(drawn(2000, 3), failed=3, clicks=300)
    for seed in range(20):
        canary = Tally()
        for ms in drawn(600, 100 + seed):  # looked at after each request
            canary.add(ms)
            assert judge(canary, usual, Band(clicks=1.0)).fate == "keep"
    assert judge(tally(drawn(600, 9), clicks=85), usual, Band()).fate == "keep"


def test_errors_end_it_early() -> None:
    usual = tally(drawn(2000, 3))
    assert judge(tally([], failed=2), usual, Band()).fate == "roll back"
    verdict = judge(tally(drawn(90, 4), failed=10), usual, Band())
    assert verdict.fate == "roll back"
    assert "10 of 100 requests failed" in verdict.why
    assert judge(tally(drawn(99, 4), failed=1), usual, Band()).fate == "keep"
    failing = tally(drawn(900, 3), failed=100)
    assert judge(tally(drawn(90, 4), failed=10), failing, Band()).fate == "keep", "both fail as often"
    assert judge(tally([], failed=9), Tally(), Band()).fate == "roll back", "with nothing beside it"


def test_a_slow_one_is_rolled_back() -> None:
    usual = tally(drawn(2000, 3))
    verdict = judge(tally(drawn(200, 5, scale=10.0)), usual, Band())
    assert verdict.fate == "roll back"
    assert "ms" in verdict.why
    assert judge(tally(drawn(10, 5, scale=100.0)), usual, Band()).fate == "roll back"
    assert judge(tally(drawn(200, 5, scale=10.0)), usual, Band(p99=20)).fate == "keep"
    assert judge(tally([*drawn(199, 5), 900.0]), usual, Band()).fate == "keep", "one in 200 is no p99"


def test_it_waits_for_something_to_compare_with() -> None:
    assert judge(tally([900.0] * 50), tally(drawn(99, 1)), Band()).fate == "wait"
    assert judge(Tally(), Tally(), Band()).fate == "wait"


def test_lost_clicks_end_it_where_there_are_any() -> None:
    usual = tally([1.0] * 5000, clicks=1000)
    assert judge(tally([1.0] * 1000, clicks=60), usual, Band()).fate == "roll back"
    assert judge(tally([1.0] * 1000, clicks=190), usual, Band()).fate == "keep"
    assert judge(tally([1.0] * 1000), tally([1.0] * 5000), Band()).fate == "keep"


@pytest.mark.parametrize(
    "wrong", [{"p99": 0.5}, {"errors": -1}, {"clicks": 2}, {"least": 0}, {"slack_ms": -1}]
)
def test_a_band_that_is_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="canary"):
        Band(**wrong)  # type: ignore[arg-type]

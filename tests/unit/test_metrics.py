"""Ratings, the metrics beyond accuracy, and intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.metrics import beyond, interval, rating


def test_rating_errors_by_hand() -> None:
    assert rating.mse([1, 2, 3], [1, 4, 2]) == pytest.approx(5 / 3)
    assert rating.rmse([1, 2, 3], [1, 4, 2]) == pytest.approx(math.sqrt(5 / 3))
    assert rating.mae([1, 2, 3], [1, 4, 2]) == pytest.approx(1.0)


@pytest.mark.parametrize(("predicted", "given_"), [([1.0], [1.0, 2.0]), ([float("nan")], [1.0])])
def test_ratings_that_cannot_be_compared(predicted: list[float], given_: list[float]) -> None:
    with pytest.raises(ValueError, match=r"shape|finite"):
        rating.mse(predicted, given_)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=30))
def test_mae_is_at_most_rmse(pairs: list[tuple[float, float]]) -> None:
    p, g = [a for a, _ in pairs], [b for _, b in pairs]
    assert rating.mae(p, g) <= rating.rmse(p, g) + 1e-12


def test_coverage() -> None:
    assert beyond.coverage(np.array([[0, 1, -1], [1, 3, -1]]), 4) == 0.75


def test_novelty_is_mean_bits() -> None:
    bits = beyond.self_information(np.array([8, 4, 1, 0]), 8)
    assert bits.tolist() == [0, 1, 3, 3]
    got = beyond.novelty(np.array([[0, 1], [2, -1], [-1, -1]]), bits)
    assert got.tolist() == [0.5, 3.0, 0.0]
    with pytest.raises(ValueError, match="more users"):
        beyond.self_information(np.array([9]), 8)


def test_diversity_of_categories_is_the_share_of_differing_pairs() -> None:
    categories = np.array([0, 0, 1, 2, -1])
    rows = np.array([[0, 1, 2, 3], [0, 1, -1, -1], [2, 3, -1, -1], [0, -1, -1, -1], [0, 4, -1, -1]])
    assert beyond.diversity(rows, categories) == pytest.approx([5 / 6, 0, 1, 0, 1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_diversity_equals_a_loop_over_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    categories = rng.integers(-1, 4, size=9)
    rows = rng.integers(-1, 9, size=(3, 5))
    got = beyond.diversity(rows, categories)
    for b, row in enumerate(rows):
        pairs = list(itertools.combinations([categories[r] for r in row if r >= 0], 2))
        differ = [i != j or i < 0 for i, j in pairs]
        assert got[b] == pytest.approx(np.mean(differ) if differ else 0.0)


def test_the_interval_is_students() -> None:
    got = interval.mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t(.975, 3) * s / sqrt(4)
    assert (got.mean, got.low, got.high, got.n) == pytest.approx((2.5, 2.5 - half, 2.5 + half, 4), rel=1e-6)
    assert got.above_zero


def test_pairing_sees_a_small_steady_gain() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    ours = base + 0.05 + 0.01 * rng.normal(size=200)
    assert interval.paired(ours, base).above_zero
    assert not interval.paired(base, ours).above_zero
    assert interval.mean_interval(base).low < 0 < interval.mean_interval(base).high


def test_what_one_user_does_is_not_independent() -> None:
    rng, users = np.random.default_rng(2), np.repeat(np.arange(40), np.arange(40) % 8 + 1)
    single = rng.normal(size=40)
    assert interval.by_user(single, np.arange(40)) == pytest.approx(single)
    covered, naive = [], []
    for _ in range(400):
        values = rng.normal(0.5, 1.0, 40)[users] + 0.3 * rng.normal(size=len(users))
        got, loose = interval.mean_interval(interval.by_user(values, users)), interval.mean_interval(values)
        assert (got.mean, got.n) == pytest.approx((loose.mean, 40))
        covered.append(got.low <= 0.5 <= got.high)
        naive.append(loose.low <= 0.5 <= loose.high)
    assert np.mean(naive) < 0.75
    assert 0.9 <= np.mean(covered) <= 0.98


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert interval.mean_interval([2.0]).as_dict() == {"mean": 2.0, "low": None, "high": None, "n": 1}
    with pytest.raises(ValueError, match="no values"):
        interval.mean_interval([])
    with pytest.raises(ValueError, match="same users"):
        interval.paired([1.0], [1.0, 2.0])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    covered = [
        got.low <= 0.3 <= got.high
        for got in (interval.mean_interval(rng.binomial(1, 0.3, size=400)) for _ in range(400))
    ]
    assert 0.92 <= np.mean(covered) <= 0.98

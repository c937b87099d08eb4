"""The front, its volume, and the choice under a budget."""

from __future__ import annotations

import numpy as np
import pytest

from recray.errors import ConfigError
from recray.tuning.pareto import (
    Budget,
    Value,
    choose,
    dominated,
    hypervolume,
    megabytes,
    milliseconds,
    shortage,
)

MS, MB = 1e-3, 1e6


def test_dominated_means_no_better_anywhere_and_worse_somewhere() -> None:
    costs = np.array([[1, 1], [2, 2], [1, 2], [0, 3], [1, 1]], dtype=float)
    assert dominated(costs).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("m", [1, 2, 3])
def test_hypervolume_agrees_with_counting_random_points(m: int) -> None:
    rng = np.random.default_rng(m)
    costs = rng.random((12, m))
    drawn = rng.random((100_000, m))
    counted = (costs[None] <= drawn[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(costs, [1.0] * m) == pytest.approx(counted, abs=0.01)


def test_hypervolume_by_hand_and_outside_the_reference() -> None:
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0], [2.0, 2.0]]), [3.0, 3.0]) == 3.0
    assert hypervolume(np.array([[4.0, 1.0]]), [3.0, 3.0]) == 0.0
    assert hypervolume(np.empty((0, 2)), [1.0, 1.0]) == 0.0


def test_the_best_quality_that_fits_is_chosen() -> None:
    values = [Value(0.5, 20 * MS, MB), Value(0.4, 5 * MS, MB), Value(0.3, 1 * MS, MB / 2)]
    choice = choose(values, Budget(10 * MS, 2 * MB))
    assert (choice.index, choice.best, choice.fits, choice.tied) == (1, 1, True, (1,))


def test_equal_quality_goes_to_the_lower_p99_times_bytes() -> None:
    values = [Value(0.4, 4 * MS, 2 * MB), Value(0.4, 4 * MS, MB), Value(0.4, 2 * MS, 3 * MB)]
    assert choose(values, Budget(10 * MS, 10 * MB)).index == 1


def test_ties_within_the_noise_are_for_the_caller_to_say_and_must_fit() -> None:
    values = [Value(0.40, 4 * MS, 4 * MB), Value(0.399, 4 * MS, MB), Value(0.39, MS, MB), Value(0.4, 1, 1)]
    choice = choose(
        values,
        Budget(10 * MS, 10 * MB),
        tied=lambda i, best: values[best].quality - values[i].quality < 0.002,
    )
    assert (choice.index, choice.best, choice.tied) == (1, 0, (0, 1))


def test_when_nothing_fits_the_nearest_is_named_with_what_is_short() -> None:
    budget = Budget(10 * MS, MB)
    values = [Value(0.5, 30 * MS, 0.9 * MB), Value(0.4, 14.2 * MS, 1.2 * MB), Value(0.1, 9 * MS, 3 * MB)]
    choice = choose(values, budget)
    assert (choice.index, choice.fits) == (1, False)
    said = shortage(values[1], budget)
    assert said == (
        "p99 is 14.2 ms where 10 ms are allowed (42% over) "
        "and size is 1.2 MB where 1 MB are allowed (20% over)"
    )
    assert "p99" not in shortage(values[2], budget)


@pytest.mark.parametrize("p99, size", [(0, 1), (1, 0), (-1, 1), (float("nan"), 1)])
def test_a_budget_that_fits_nothing_is_refused(p99: float, size: float) -> None:
    with pytest.raises(ConfigError):
        Budget(p99, size)


def test_figures_for_people() -> None:
    assert [milliseconds(x) for x in (0.0123, 2.5, 0.0000456)] == ["12.3 ms", "2.5 s", "0.0456 ms"]
    assert [megabytes(x) for x in (512, 1234567, 64e6, 3.2e9)] == ["512 B", "1.23 MB", "64 MB", "3.2 GB"]

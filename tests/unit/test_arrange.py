"""Pins, caps and diversity against plain readings of their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recray.data.sequences import Histories
from recray.retrieval.arrange import Groups, Rules, arranged, fill, reaching


def plain(
    scores: NDArray[Any], rows: list[int], rules: Rules, groups: Groups, vectors: NDArray[Any]
) -> list[int]:
    """The definition, item by item in Python; gives rows."""
    fixed = {place: row for place, row in rules.pins if place >= 0 and row in rows}
    for place, row in rules.pins:
        if place < 0 and row in rows:
            fixed[min(set(range(rules.k)) - set(fixed))] = row
    chosen, made = list(fixed.values()), []

    def fits(row: int) -> bool:
        return all(
            sum(value in groups[column][other] for other in chosen) < most
            for column, most in rules.caps
            for value in groups[column][row]
        )

    def cosine(a: int, b: int) -> float:
        x, y = vectors[rows.index(a)].astype(float), vectors[rows.index(b)].astype(float)
        return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-30))

    left = [float(score) for row, score in zip(rows, scores) if row not in chosen] or [0.0]
    low, span = min(left), max(max(left) - min(left), 1e-30)
    for place in range(rules.k):
        if place in fixed:
            made.append(fixed[place])
            continue
        best, value = None, -np.inf
        for row, score in zip(rows, scores):
            if row in chosen or not fits(row):
                continue
            near = max((cosine(row, other) for other in chosen), default=0.0)
            worth = (1 - rules.diversity) * (float(score) - low) / span
            worth -= rules.diversity * near
            if worth > value + 1e-12:
                best, value = row, worth
        if best is not None:
            chosen.append(best)
            made.append(best)
    return made


@st.composite
def pools(draw: st.DrawFn) -> tuple[NDArray[np.float32], list[int], Groups, NDArray[np.float32], int]:
    n = draw(st.integers(1, 14))
    rows = draw(st.permutations(range(20)))[:n]
    scores = np.sort(np.array(draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)), np.float32))[::-1]
    colours = draw(st.lists(st.lists(st.integers(0, 3), max_size=2, unique=True), min_size=20, max_size=20))
    vectors = np.random.default_rng(draw(st.integers(0, 99))).standard_normal((n, 3)).astype(np.float32)
    return scores.copy(), list(rows), {"colour": Histories.of(colours)}, vectors, draw(st.integers(1, 10))


@st.composite
def ruled(draw: st.DrawFn) -> tuple[Any, Rules]:
    pool = draw(pools())
    k = pool[-1]
    pinned = draw(st.lists(st.integers(0, 19), max_size=k, unique=True))
    named = draw(st.permutations(range(k)))
    places = [named[i] if draw(st.booleans()) else -1 for i in range(len(pinned))]
    caps = (("colour", draw(st.integers(1, 3))),) if draw(st.booleans()) else ()
    rules = Rules(k, tuple(zip(places, pinned)), caps, draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])))
    return pool, rules


@given(ruled())
@settings(max_examples=150, deadline=None)
def test_a_list_is_as_its_definition_says(asked: tuple[Any, Rules]) -> None:
    (scores, rows, groups, vectors, _), rules = asked
    places = arranged(scores, np.array(rows), rules, groups, vectors)
    assert [rows[place] for place in places] == plain(scores, rows, rules, groups, vectors)


@given(pools())
@settings(max_examples=50, deadline=None)
def test_without_rules_the_order_stays_and_any_diversity_keeps_k(pool: Any) -> None:
    scores, rows, groups, vectors, k = pool
    assert arranged(scores, np.array(rows), Rules(k)).tolist() == list(range(min(k, len(rows))))
    for diversity in (0.0, 0.5, 1.0):
        places = arranged(scores, np.array(rows), Rules(k, diversity=diversity), groups, vectors)
        assert len(set(places.tolist())) == min(k, len(rows))
        assert places[0] == 0


def test_empty_places_of_a_pool_are_never_taken() -> None:
    scores, rows = np.array([2, 1, -np.inf, -np.inf], np.float32), np.array([7, 3, -1, -1])
    vectors = np.ones((4, 2), np.float32)
    for rules in (Rules(4), Rules(4, diversity=1.0), Rules(4, pins=((3, 3), (0, 9)))):
        assert arranged(scores, rows, rules, {}, vectors).tolist() == [0, 1]


def test_what_is_alike_goes_apart() -> None:
    vectors = np.array([[1, 0], [1, 0.01], [1, 0.02], [0, 1]], np.float32)
    scores, rows = np.array([4, 3.9, 3.8, 1], np.float32), np.arange(4)
    for diversity, wanted in ((0.0, [0, 1, 2]), (0.6, [0, 3, 1]), (1.0, [0, 3, 2])):
        got = arranged(scores, rows, Rules(3, diversity=diversity), {}, vectors)
        assert got.tolist() == wanted


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("values", [2, 9, 60])
def test_a_pool_is_filled_as_if_it_were_the_whole_catalogue(most: int, values: int) -> None:
    draw, n, k = np.random.default_rng(values), 300, 12
    order = draw.permutation(n)
    skewed = (values * draw.random(n) ** 6).astype(int)
    groups = {"brand": Histories.of(skewed[:, None])}
    asked: list[int] = []

    def find(allowed: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
        asked.append(count)
        left = order[allowed[order]][:count]
        return np.pad(left, (0, count - len(left)), constant_values=-1)

    rules, pinned = Rules(k, ((0, 5),), (("brand", most),)), [5]
    more = fill(order[:20], pinned, rules, groups, find)
    pool = np.array([*order[:20], *([] if 5 in order[:20] else [5]), *more])
    falling = -np.arange(len(pool), dtype=np.float32)
    got = pool[arranged(falling, pool, rules, groups)]
    whole = np.array([5, *order[order != 5]])
    wanted = whole[arranged(-np.arange(n, dtype=np.float32), whole, rules, groups)]
    assert got.tolist() == wanted.tolist()
    assert len(got) == min(k, sum(min(most, int((skewed == v).sum())) for v in range(values)))
    assert len(asked) <= 4


def test_caps_that_one_order_cannot_keep_are_kept_by_another() -> None:
    groups = {"colour": Histories.of([[0, 1], [0], [1], [2]])}
    rules = Rules(3, caps=(("colour", 1),))
    scores, rows = np.array([4, 3, 2, 1], np.float32), np.arange(4)
    order = np.array([1, 2, 3, 0])  # as retrieved: two of one colour each in place of one of both
    places = arranged(scores, rows, rules, groups)
    assert rows[places].tolist() == [0, 3]
    wider = reaching(places, order, scores, rows, rules, groups)
    assert rows[wider].tolist() == [1, 2, 3]
    assert reaching(wider, order, scores, rows, rules, groups) is wider


def test_a_pin_far_behind_does_not_weigh_on_the_others() -> None:
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [1, 1]], np.float32)
    scores, rows = np.array([1.0, 0.9, 0.1, -1000.0], np.float32), np.arange(4)
    free = arranged(scores[:3], rows[:3], Rules(3, diversity=0.3), {}, vectors[:3])
    pinned = arranged(scores, rows, Rules(4, ((3, 3),), diversity=0.3), {}, vectors)
    assert free.tolist() == [0, 1, 2]
    assert pinned.tolist() == [0, 1, 2, 3]

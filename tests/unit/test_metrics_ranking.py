"""Ranking metrics: by hand, within bounds, and equal to a slow and obvious program."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data.sequences import Histories
from recray.metrics.ranking import NAMES, hits, ranking


def test_by_hand() -> None:
    # places 1 and 3 hold two of three targets
    got = ranking(np.array([[7, 1, 9, 2, 3]]), Histories.of([[9, 7, 8]]), ks=(4, 2))
    dcg = 1 + 1 / math.log2(4)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    want = {
        "ndcg@4": dcg / ideal,
        "recall@4": 2 / 3,
        "precision@4": 2 / 4,
        "f1@4": 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2),
        "hr@4": 1.0,
        "mrr@4": 1.0,
        "map@4": (1 / 1 + 2 / 3) / 3,
        "ndcg@2": 1 / (1 + 1 / math.log2(3)),
        "recall@2": 1 / 3,
        "precision@2": 1 / 2,
        "f1@2": 0.4,
        "hr@2": 1.0,
        "mrr@2": 1.0,
        "map@2": 1 / 2,
    }
    assert {name: values.item() for name, values in got.items()} == pytest.approx(want)


@pytest.mark.parametrize("place", range(1, 6))
def test_one_target_gives_the_reciprocal_of_its_place(place: int) -> None:
    rows = np.full((1, 5), -1)
    rows[0, place - 1] = 42
    got = ranking(rows, Histories.of([[42]]), ks=(5,))
    assert got["mrr@5"][0] == pytest.approx(1 / place)
    assert got["map@5"][0] == pytest.approx(1 / place)
    assert got["ndcg@5"][0] == pytest.approx(1 / math.log2(1 + place))


def test_an_item_given_twice_counts_once() -> None:
    got = ranking(np.array([[5, 5, 5]]), Histories.of([[5, 6]]), ks=(3,))
    assert got["recall@3"][0] == 0.5
    assert got["precision@3"][0] == pytest.approx(1 / 3)


def test_targets_named_twice_are_one_target() -> None:
    assert ranking(np.array([[5]]), Histories.of([[5, 5]]), ks=(1,))["recall@1"][0] == 1.0


def test_an_empty_list_earns_nothing() -> None:
    got = ranking(np.full((2, 3), -1), Histories.of([[0], [1, 2]]), ks=(3,))
    assert all((values == 0).all() for values in got.values())


def test_a_list_shorter_than_the_cut_has_empty_places() -> None:
    got = ranking(np.array([[3]]), Histories.of([[3, 4]]), ks=(10,))
    assert got["precision@10"][0] == 0.1
    assert got["recall@10"][0] == 0.5


def test_refuses_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match="user 1 of the batch has no target"):
        ranking(np.zeros((2, 3), dtype=np.int64), Histories.of([[1], []]))
    with pytest.raises(ValueError, match="2 lists for 1 users"):
        ranking(np.zeros((2, 3), dtype=np.int64), Histories.of([[1]]))
    with pytest.raises(ValueError, match="cut of 0"):
        ranking(np.zeros((1, 3), dtype=np.int64), Histories.of([[1]]), ks=(0,))


lists = st.lists(st.integers(-1, 12), min_size=1, max_size=8)
cases = st.lists(
    st.tuples(lists, st.lists(st.integers(0, 12), min_size=1, max_size=6)), min_size=1, max_size=5
)


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(1, 10))
def test_equals_a_slow_program_and_stays_in_bounds(users: list[tuple[list[int], list[int]]], k: int) -> None:
    width = max(len(row) for row, _ in users)
    rows = np.array([row + [-1] * (width - len(row)) for row, _ in users])
    got = ranking(rows, Histories.of([target for _, target in users]), ks=(k,))
    assert set(got) == {f"{name}@{k}" for name in NAMES}
    for b, (row, target) in enumerate(users):
        want = _slow(row, set(target), k)
        assert {name: got[f"{name}@{k}"][b] for name in NAMES} == pytest.approx(want)
    for values in got.values():
        assert values.dtype == np.float64
        assert ((values >= 0) & (values <= 1 + 1e-12)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8))
def test_an_ideal_list_has_ndcg_and_map_of_one(n_targets: int, k: int) -> None:
    rows = np.arange(10)[None]
    got = ranking(rows, Histories.of([range(n_targets)]), ks=(k,))
    assert got[f"ndcg@{k}"][0] == pytest.approx(1.0)
    assert got[f"map@{k}"][0] == pytest.approx(1.0)


def test_hits_marks_places() -> None:
    hit, sizes = hits(np.array([[4, -1, 4, 2], [0, 1, 2, 3]]), Histories.of([[2, 4], [9]]))
    assert hit.tolist() == [[True, False, False, True], [False] * 4]
    assert sizes.tolist() == [2, 1]


def _slow(row: list[int], target: set[int], k: int) -> dict[str, float]:
    top = (row + [-1] * k)[:k]
    found: list[int] = []  # places of hits, counted from 1
    for place, item in enumerate(top, 1):
        if item in target and item not in top[: place - 1]:
            found.append(place)
    precision, recall = len(found) / k, len(found) / len(target)
    ideal = sum(1 / math.log2(1 + j) for j in range(1, min(len(target), k) + 1))
    return {
        "ndcg": sum(1 / math.log2(1 + j) for j in found) / ideal,
        "recall": recall,
        "precision": precision,
        "f1": 2 * precision * recall / (precision + recall) if found else 0.0,
        "hr": float(bool(found)),
        "mrr": 1 / found[0] if found else 0.0,
        "map": sum(i / place for i, place in enumerate(found, 1)) / min(len(target), k),
    }

"""Splits and the sorting of parts, against plain Python."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.data import parts, splits
from recray.data.interactions import Interactions
from recray.errors import InputError

WIDE = st.integers(-(2**62), 2**62)
ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=60)


def log_of(rows: list[tuple[int, int, int]]) -> Interactions:
    user, item, time = (np.array(column) for column in zip(*rows))
    return Interactions(
        user.astype(np.int32),
        item.astype(np.int32),
        time.astype(np.int64),
        np.ones(len(rows), np.float32),
        True,
    )


@given(st.lists(st.integers(0, 6), max_size=20))
def test_leave_one_out(lengths: list[int]) -> None:
    codes = splits.leave_one_out(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    want = [[0] * n if n < 3 else [0] * (n - 2) + [1, 2] for n in lengths]
    assert codes.tolist() == [code for user in want for code in user]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=100))
def test_a_split_by_time_cuts_time(times: list[int]) -> None:
    array = np.array(times, np.int64)
    codes = splits.by_time(array, splits.time_cuts(array))
    for low, high in ((0, 1), (1, 2), (0, 2)):
        assert array[codes == low].max(initial=-1) <= array[codes == high].min(initial=99)
    assert not set(array[codes == 0].tolist()) & set(array[codes > 0].tolist())
    assert (codes == 2).sum() >= len(times) // 10


def test_a_split_by_time_takes_a_tenth_each() -> None:
    times = np.random.default_rng(0).permutation(1000).astype(np.int64)
    codes = splits.by_time(times, splits.time_cuts(times))
    assert np.bincount(codes).tolist() == [800, 100, 100]
    plan = parts.Plan("time", False, False)
    with pytest.raises(InputError, match="differ too little"):
        plan.cut((5, 5), 0)


@given(st.lists(st.tuples(WIDE, WIDE, st.integers(0, 3)), max_size=40))
def test_order_by_is_a_stable_sort_whatever_the_width(rows: list[tuple[int, int, int]]) -> None:
    keys = [np.array([row[i] for row in rows], np.int64) for i in range(3)]
    assert parts.order_by(*keys).tolist() == sorted(range(len(rows)), key=lambda i: rows[i])
    narrow = [key % 3 for key in keys]
    want = sorted(range(len(rows)), key=lambda i: [int(key[i]) for key in narrow])
    assert parts.order_by(*narrow).tolist() == want


@given(ROWS, st.booleans())
def test_finish_sorts_marks_duplicates_and_splits(rows: list[tuple[int, int, int]], dedupe: bool) -> None:
    tables, repeated = parts.finish(log_of(rows), None, parts.Plan("leave-one-out", dedupe, False))
    assert repeated == len(rows) - len(set(rows))
    left = list(dict.fromkeys(rows)) if dedupe else rows
    want: dict[str, list[tuple[int, int, int]]] = {}
    for user in range(6):
        mine = sorted((r for r in left if r[0] == user), key=lambda r: r[2])
        cut = len(mine) - 2 if len(mine) >= 3 else len(mine)
        for name, some in (("train", mine[:cut]), ("valid", mine[cut : cut + 1]), ("test", mine[cut + 1 :])):
            want.setdefault(name, []).extend(some)
    columns = ("user_row", "item_row", "time")
    got = {name: list(zip(*(table.column(c).to_pylist() for c in columns))) for name, table in tables.items()}
    assert got == {name: found for name, found in want.items() if found}


@given(st.lists(st.integers(1, 20), min_size=1, max_size=50), st.integers(1, 60))
def test_parts_are_all_users_in_order(counts: list[int], size: int) -> None:
    borders = parts.bounds(np.array(counts, np.int64), size)
    assert borders[0] == 0
    assert borders[-1] == len(counts)
    assert (np.diff(borders) > 0).all()
    each = [sum(counts[a:b]) for a, b in pairwise(borders)]
    assert max(each) <= 2 * size + max(counts)
    assert parts.part_of(borders).tolist() == [p for p, n in enumerate(np.diff(borders)) for _ in range(n)]

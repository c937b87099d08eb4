"""Histories against the same thing with Python lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recray.data.sequences import Histories, append, concat

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=8)


def lists(h: Histories) -> list[list[int]]:
    return [h[b].tolist() for b in range(len(h))]


def timed(sequences: list[list[int]]) -> Histories:
    made = Histories.of(sequences)
    n = len(made.items)
    return Histories(made.items, made.offsets, np.arange(n, dtype=np.float32), np.arange(n, dtype=np.int64))


@given(LISTS, st.data())
def test_take(sequences: list[list[int]], data: st.DataObject) -> None:
    at = data.draw(st.lists(st.integers(0, len(sequences) - 1), max_size=8))
    h = timed(sequences)
    taken = h.take(np.array(at, np.int64))
    assert lists(taken) == [sequences[i] for i in at]
    assert taken.times is not None
    assert taken.times.tolist() == [t for i in at for t in range(h.offsets[i], h.offsets[i + 1])]


@given(LISTS, st.integers(0, 7))
def test_last_and_without_last_share_a_history(sequences: list[list[int]], n: int) -> None:
    h = timed(sequences)
    last, rest = h.last(n), h.without_last(n)
    assert lists(last) == [s[max(len(s) - n, 0) :] for s in sequences]
    assert lists(append(rest, last)) == sequences
    assert append(rest, last).weights is not None
    np.testing.assert_array_equal(append(rest, last).weights, h.weights)


@given(LISTS)
def test_append_and_concat(sequences: list[list[int]]) -> None:
    h, other = timed(sequences), timed([s[::-1] for s in sequences])
    assert lists(append(h, other)) == [s + s[::-1] for s in sequences]
    assert lists(concat([h, other])) == sequences + [s[::-1] for s in sequences]

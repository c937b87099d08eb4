"""Histories against the same thing with Python lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recray.data.sequences import PAD, Histories, append, concat

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


@given(LISTS, st.none() | st.integers(1, 8))
def test_padded_keeps_the_newest(sequences: list[list[int]], length: int | None) -> None:
    h = timed(sequences)
    rows, lengths = h.padded(length)
    width = max(map(len, sequences)) if length is None else length
    newest = [s[max(len(s) - width, 0) :] for s in sequences]
    assert lengths.tolist() == [len(s) for s in newest]
    assert rows.tolist() == [s + [PAD] * (width - len(s)) for s in newest]


@given(st.lists(st.lists(st.integers(-1, 3), max_size=4), min_size=1, max_size=5))
def test_known_leaves_out_what_is_no_row(sequences: list[list[int]]) -> None:
    h = timed(sequences)
    for _ in range(2):  # the second time it is remembered whether there is anything to leave out
        assert lists(h.known()) == [[row for row in s if row >= 0] for s in sequences]
    assert (h.known() is h) == all(row >= 0 for s in sequences for row in s)


@given(LISTS)
def test_append_and_concat(sequences: list[list[int]]) -> None:
    h, other = timed(sequences), timed([s[::-1] for s in sequences])
    assert lists(append(h, other)) == [s + s[::-1] for s in sequences]
    assert lists(concat([h, other])) == sequences + [s[::-1] for s in sequences]

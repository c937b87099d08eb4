"""Ids: append-only, kept exactly, by order of first appearance however the input is cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.data.ids import Ids, merge
from recray.errors import ArtefactError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
WORDS = st.lists(TEXT, max_size=30)


@given(WORDS, WORDS)
def test_extend_appends_only(first: list[str], then: list[str]) -> None:
    known = Ids([]).extend(first)
    grown = known.extend(then)
    assert grown.values.to_pylist() == list(dict.fromkeys(first + then))
    assert grown.ids_of(range(len(known))) == known.values.to_pylist()
    assert grown.extend(first) == grown


@given(WORDS, WORDS)
def test_rows_and_ids_are_inverse(known: list[str], asked: list[str]) -> None:
    ids = Ids([]).extend(known)
    rows = ids.rows_of(asked).tolist()
    assert rows == ids.rows_of(pa.array(asked, pa.string())).tolist()
    assert [ids.id_of(r) if r >= 0 else None for r in rows] == [a if a in known else None for a in asked]
    assert all((a in ids) == (a in known) for a in asked)


def test_ids_of_many_and_of_few_rows_are_the_same() -> None:
    ids = Ids([f"i{row}" for row in range(20_000)])
    rows = np.random.default_rng(0).integers(0, 20_000, 15_000)
    many = ids.ids_of(rows)
    assert many == [name for part in np.split(rows, 5) for name in ids.ids_of(part)]
    assert ids.ids_of(rows[:3].tolist()) == many[:3]
    assert ids.ids_of([]) == []
    for wrong in ([3, -1], [20_000], np.append(rows, -1), np.append(rows, 20_000)):
        with pytest.raises(IndexError):
            ids.ids_of(wrong)


@given(st.lists(WORDS, max_size=6))
def test_merge_is_the_order_of_first_appearance(blocks: list[list[str]]) -> None:
    distinct = [list(dict.fromkeys(block)) for block in blocks]
    words, rows = merge([pa.array(block, pa.string()) for block in distinct])
    assert words.to_pylist() == list(dict.fromkeys(w for block in distinct for w in block))
    assert [[words[i].as_py() for i in r.tolist()] for r in rows] == distinct


def test_ids_are_kept_exactly_on_disk(tmp_path: Path) -> None:
    ids = Ids(["00123", "123", " x ", "é", "NA", "null"])
    ids.save(tmp_path / "ids.parquet")
    assert Ids.load(tmp_path / "ids.parquet") == ids
    assert ids.rows_of(["00123", "nobody"]).tolist() == [0, -1]
    with pytest.raises(IndexError, match="6 of 6"):
        ids.id_of(6)


def test_another_file_is_no_ids(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"not parquet")
    with pytest.raises(ArtefactError, match="not a file of ids"):
        Ids.load(tmp_path / "x")

"""An item table as categories, numbers and text, whatever its columns hold."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.data.item_features import MOST_VALUES, features_of, item_features, vocabulary_of
from recray.data.prepare import prepare
from recray.manifest import write_artefact
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.saved import catalogue_of, catalogue_report


def test_of_no_table_there_is_nothing() -> None:
    found = features_of(None, 3)
    assert (found.names, found.sizes, found.number_names, found.values) == ((), (), (), ())
    assert found.categories.shape == found.numbers.shape == (3, 0)
    assert found.categories.dtype == np.int32
    assert found.numbers.dtype == np.float32
    assert found.texts == ["", "", ""]


def test_words_of_few_values_are_a_category_with_unknown_first() -> None:
    found = features_of(pa.table({"kind": ["b", None, "a", "b", " "]}), 5)
    assert (found.names, found.sizes, found.values) == (("kind",), (3,), (("", "a", "b"),))
    assert found.categories[:, 0].tolist() == [2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    "cells",
    [
        [["x", "y"], ["y"], [], None, ["z", None, "x"]],
        ["x|y", "y", "", None, "z||x"],
        ["x, y", "y", "", None, "z, x"],
    ],
)
def test_cells_of_several_values_are_a_column_a_place(cells: Any) -> None:
    found = features_of(pa.table({"genres": cells}), 5)
    assert found.names == ("genres", "genres#2")
    assert {vocabulary_of(name) for name in found.names} == {"genres"}
    assert found.values[0] == found.values[1] == ("", "x", "y", "z")
    assert found.categories.tolist() == [[1, 2], [2, 0], [0, 0], [0, 0], [3, 1]]


def test_of_very_many_values_in_a_cell_the_first_are_kept() -> None:
    found = features_of(pa.table({"tags": [[f"t{i}" for i in range(20)], ["t3"]]}), 2)
    assert len(found.names) == MOST_VALUES
    assert set(found.sizes) == {21}


def test_titles_with_commas_are_text() -> None:
    titles = [f"Film {i}, The ({1900 + i})" for i in range(200)]
    table = pa.table({"title": titles, "genre": ["a"] * 100 + ["b"] * 100, "about": ["", None] * 100})
    found = features_of(table, 200)
    assert found.names == ("genre",)
    assert found.texts == titles


def test_texts_are_joined_and_addresses_left_out() -> None:
    n = 120
    table = pa.table(
        {
            "title": [f"T{i}" for i in range(n)],
            "link": [f"https://x.example/{i}" for i in range(n)],
            "about": [None if i % 2 else f"about {i}" for i in range(n)],
        }
    )
    assert features_of(table, n).texts[:2] == ["T0. about 0", "T1"]


def test_whole_numbers_are_a_category_where_few_and_dense() -> None:
    n = 300
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "year": pa.array(rng.integers(1990, 2010, n)),
            "price": pa.array(rng.choice([99, 199, 499, 999, 4999], n)),
            "seconds": pa.array(rng.integers(0, 10**6, n)),
            "new": pa.array(rng.integers(0, 2, n).astype(bool)),
        }
    )
    found = features_of(table, n)
    assert found.names == ("new", "year")
    assert found.number_names == ("price", "seconds")


def test_numbers_are_standardized_and_unknown_ones_in_the_middle() -> None:
    x = [1.0, None, 3.0, float("nan"), 5.0, float("inf")]
    found = features_of(pa.table({"x": x, "same": [2.5] * 6, "none": pa.nulls(6, pa.float64())}), 6)
    assert found.number_names == ("x",)
    known = np.array([1.0, 3.0, 5.0])
    want = (known - known.mean()) / known.std()
    np.testing.assert_allclose(found.numbers[[0, 2, 4], 0], want, rtol=1e-6)
    assert found.numbers[[1, 3, 5], 0].tolist() == [0, 0, 0]


def test_a_skewed_positive_number_is_taken_by_its_logarithm() -> None:
    price = np.exp(np.random.default_rng(0).normal(3, 1, 500))
    found = features_of(pa.table({"price": price, "change": price - price.mean()}), 500)
    logs = np.log(price)
    np.testing.assert_allclose(found.numbers[:, 1], (logs - logs.mean()) / logs.std(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.numbers[:, 0], (price - price.mean()) / price.std(), rtol=1e-4, atol=1e-5
    )


def test_times_are_numbers() -> None:
    days = [datetime.date(2020, 1, 1) + datetime.timedelta(days=i * i) for i in range(60)]
    stamps = [datetime.datetime(2020, 1, 1, i % 24) for i in range(60)]
    found = features_of(pa.table({"day": days, "stamp": stamps}), 60)
    assert found.number_names == ("day", "stamp")
    assert (np.diff(found.numbers[:, 0]) > 0).all()


CELL = st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["a|b", "b,c", "a", "é;a"]))


@given(st.lists(st.tuples(CELL, st.one_of(st.none(), st.floats()), st.one_of(st.none(), st.integers(0, 9)))))
def test_whatever_a_table_holds_shapes_and_ranges_are_kept(rows: list[Any]) -> None:
    words, floats, wholes = zip(*rows, strict=True) if rows else ((), (), ())
    table = pa.table(
        {
            "words": pa.array(words, pa.string()),
            "floats": pa.array(floats, pa.float64()),
            "wholes": pa.array(wholes, pa.int64()),
        }
    )
    found, n = features_of(table, len(rows)), len(rows)
    assert found.categories.shape == (n, len(found.names)) == (n, len(found.sizes))
    assert found.numbers.shape == (n, len(found.number_names))
    assert len(found.texts) == n
    assert list(found.names) == sorted(found.names)
    assert np.isfinite(found.numbers).all()
    assert (found.categories >= 0).all()
    assert (found.categories < np.array(found.sizes, np.int32).reshape(1, -1)).all()
    assert [len(v) for v in found.values] == list(found.sizes)


def test_a_dataset_says_its_features_and_the_catalogue_travels(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(f"u{u},i{u % 4},{u}\n" for u in range(20)))
    (tmp_path / "items.csv").write_text("item,kind,price\ni0,a,1.5\ni2,b,2.5\ni3,a,9.5\n")
    data = prepare([str(tmp_path / "log.csv")], items=str(tmp_path / "items.csv"), out=str(tmp_path / "data"))
    found = item_features(data)
    assert item_features(data) is found
    catalogue = Catalogue.of(data)
    assert (catalogue.item_values, catalogue.item_numbers) == ({"kind": 3}, 1)
    assert found.categories[data.items.rows_of(["i0", "i1", "i2", "i3"]), 0].tolist() == [1, 0, 2, 1]
    model = build_model("popularity", catalogue, {})
    model.see(data)
    report = {"catalogue": catalogue_report(catalogue)}
    made = write_artefact(tmp_path / "c", "checkpoint", lambda folder: None, recipe={}, report=report)
    assert catalogue_of(made) == catalogue
    old = {"catalogue": {"n_items": 4, "context": {}}}
    made = write_artefact(tmp_path / "old", "checkpoint", lambda folder: None, recipe={}, report=old)
    assert catalogue_of(made) == Catalogue(4, {})

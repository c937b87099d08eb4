"""Filters: every kind of column, the recent masks kept and no more."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from recray.bundles import filters
from recray.bundles.filters import Filters
from recray.errors import InputError

FEATURES = pa.table(
    {
        "genre": pa.array(["a", "b", None, "a", "c"]),
        "code": pa.array(["x", "y", "x", None, "z"]).dictionary_encode(),
        "year": pa.array([1990, 1991, None, 1990, 1993], pa.int32()),
        "price": pa.array([1.5, 2.0, 3.0, None, 1.5]),
        "new": pa.array([True, False, None, True, True]),
        "tags": pa.array([["p", "q"], [], None, ["q"], ["r", "p"]]),
        "numbers": pa.array([[1], [2, 3], None, [], [3]], pa.large_list(pa.int64())),
    }
)


def kept(given: Any, features: Any = FEATURES) -> list[int] | None:
    made = Filters(features, 5)
    mask = made.mask(made.checked(given))
    return None if mask is None else mask.nonzero()[0].tolist()


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({"genre": "a"}, [0, 3]),
        ({"genre": ["b", "c", "?"]}, [1, 4]),
        ({"genre": []}, []),
        ({"code": "x"}, [0, 2]),
        ({"year": 1990}, [0, 3]),
        ({"year": "1990"}, [0, 3]),
        ({"year": (1991, 1993)}, [1, 4]),
        ({"price": 1.5}, [0, 4]),
        ({"price": 2}, [1]),
        ({"new": True}, [0, 3, 4]),
        ({"tags": "p"}, [0, 4]),
        ({"tags": ["p", "q"]}, [0, 3, 4]),
        ({"numbers": "3"}, [1, 4]),
        ({"genre": "a", "tags": "p"}, [0]),
        ({"genre": {"not": "a"}}, [1, 2, 4]),
        ({"tags": {"not": ["p", "?"]}}, [1, 2, 3]),
        ({"price": {"min": 1.5, "max": 2}}, [0, 1, 4]),
        ({"price": {"max": 1.9}}, [0, 4]),
        ({"year": {"min": 1991}, "tags": {"not": "r"}}, [1]),
        ({"year": {"min": 1990, "not": [1993]}}, [0, 1, 3]),
        ({"price": {"min": None}}, [0, 1, 2, 3, 4]),
        ({"price": {"max": 10**308}}, [0, 1, 2, 4]),
        ({"year": {"min": -(10**308)}}, [0, 1, 3, 4]),
        ({}, None),
        (None, None),
    ],
)
def test_masks(given: Any, rows: list[int] | None) -> None:
    assert kept(given) == rows


@pytest.mark.parametrize(
    "given",
    [
        {"year": "soon"},
        {"year": 1990.5},
        {"year": 2**63},
        {"numbers": ["x"]},
        {"no": 1},
        {7: 1},
        7,
        {"year": {}},
        {"year": {"under": 3}},
        {"year": {"min": "1990"}},
        {"year": {"max": True}},
        {"year": {"max": float("nan")}},
        {"year": {"max": 10**399}},
        {"price": {"min": -(10**399)}},
        {"price": {"min": 1.5, "max": 2**1024}},
        {"genre": {"min": 1}},
        {"tags": {"max": 1}},
        {"year": {"not": "soon"}},
    ],
)
def test_what_cannot_be_read_is_refused(given: Any) -> None:
    with pytest.raises(InputError):
        kept(given)


def test_without_features_every_column_is_unknown() -> None:
    with pytest.raises(InputError, match="no item features"):
        kept({"genre": "a"}, None)


def test_chunked_columns_are_read_whole() -> None:
    chunked = pa.concat_tables([FEATURES.slice(0, 2), FEATURES.slice(2)])
    assert kept({"tags": "p"}, chunked) == [0, 4]
    assert kept({"code": "x"}, chunked) == [0, 2]


def test_masks_are_kept_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "KEPT", 3)
    made = Filters(FEATURES, 5)
    first = made.mask(made.checked({"genre": "a"}))
    assert first is not None
    assert made.mask(made.checked({"genre": ["a"]})) is first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = False
    for year in (1990, 1991, 1992):
        made.mask(made.checked({"year": year}))
    assert len(made._kept) == 3
    assert made.mask(made.checked({"genre": "a"})) is not first


def test_lists_of_categories_are_lists_of_words_and_other_nests_are_refused() -> None:
    words = [["p", "q"], [], None, ["q"], ["r", "p"]]
    features = pa.table(
        {
            "codes": pa.array(words, pa.list_(pa.dictionary(pa.int32(), pa.string()))),
            "size": pa.array([{"w": 1}] * 5),
            "place": pa.array([[1.0, 2.0]] * 5, pa.list_(pa.float64(), 2)),
            "deep": pa.array([[[1]]] * 5),
        }
    )
    assert kept({"codes": "p"}, features) == [0, 4]
    assert kept({"codes": {"not": ["q"]}}, features) == [1, 2, 4]
    made = Filters(features, 5)
    assert made.groups(["codes"])["codes"].lengths.tolist() == [2, 0, 0, 1, 2]
    for column in ("size", "place", "deep"):
        for what in ("filter", "caps"):
            with pytest.raises(InputError, match=f"{what} column '{column}' holds"):
                made.known(column, what)

"""What a model can learn of items: a dataset's item table as categories, numbers and text.

A column is taken for what it holds:
- words, booleans and dense whole numbers of few distinct values are a category: one value an item,
  row 0 for unknown. "Few" is at most max(50, N / 5), "dense" at least half of the range;
- cells of several values (lists, or words between `|`, `;` or `,`) are up to 8 categories, `genres`,
  `genres#2`, `genres#3`, ...: the first 8 values in their order. They share one list of values, so a
  model may read all of them from one table (`vocabulary_of`);
- other numbers and times are standardized, after a logarithm where they are positive and skewed;
- other words are text. Columns of addresses (`http...`), of one value or of none are left out.

Shapes: N items, F categories, G numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

MOST_VALUES = 8  # of a cell that holds several
_FEW = 50  # distinct values that are always few
_SEPARATORS = "|;,"
_OFTEN = 0.05  # share of the cells that hold a separator where it is meant as one
_SKEWED = 1.0  # skewness above which a positive number is taken by its logarithm


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """The features of N items: F category columns, G numbers, one text; F, G may be 0.

    names: of the categories, sorted; sizes: their value rows, row 0 = unknown included;
    categories: int32[N, F]; numbers: float32[N, G], standardized, 0 where unknown; number_names: sorted;
    texts: N strings, an item's text columns joined by ". ", "" where it has none;
    values: the words of each category's rows, "" for row 0.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    categories: NDArray[np.int32]
    numbers: NDArray[np.float32]
    number_names: tuple[str, ...]
    texts: list[str]
    values: tuple[tuple[str, ...], ...] = ()


_known: WeakKeyDictionary[Dataset, ItemFeatures] = WeakKeyDictionary()


def item_features(data: Dataset) -> ItemFeatures:
    """The features of a dataset's items, worked out once; no columns where it has no item table."""
    if data not in _known:
        _known[data] = features_of(data.item_features, data.n_items)
    return _known[data]


def vocabulary_of(name: str) -> str:
    """The column that a category was made of: `genres` for `genres#3`, whose rows mean the same."""
    return name.partition("#")[0]


def features_of(table: Any | None, n_items: int) -> ItemFeatures:
    """The features in an Arrow table whose row i is item row i; of no table, none."""
    coded: dict[str, tuple[NDArray[np.int32], tuple[str, ...]]] = {}
    numbers: dict[str, NDArray[np.float32]] = {}
    texts: list[Any] = []
    for name, chunks in [] if table is None else zip(table.column_names, table.columns, strict=True):
        column = chunks.combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        cells = _cells(column, max(_FEW, n_items // 5))
        if cells is not None:
            coded |= _coded(name.replace("#", "_"), *cells, n_items)
        elif _is_text(column.type):
            words = pc.fill_null(pc.utf8_trim_whitespace(column.cast(pa.string())), "")
            if 2 * (pc.sum(pc.match_substring_regex(words, "^https?://")).as_py() or 0) <= _filled(words):
                texts.append(words)
        else:
            standard = _standardized(column)
            if standard is not None:
                numbers[name] = standard
    names, number_names = tuple(sorted(coded)), tuple(sorted(numbers))
    return ItemFeatures(
        names,
        tuple(len(coded[name][1]) for name in names),
        _stacked([coded[name][0] for name in names], n_items, np.int32),
        _stacked([numbers[name] for name in number_names], n_items, np.float32),
        number_names,
        [". ".join(filter(None, row)) for row in zip(*(t.to_pylist() for t in texts), strict=True)]
        or [""] * n_items,
        tuple(coded[name][1] for name in names),
    )


def _stacked(columns: list[NDArray[Any]], n_items: int, kind: Any) -> NDArray[Any]:
    return np.stack(columns, 1).astype(kind) if columns else np.zeros((n_items, 0), kind)


def _cells(column: Any, few: int) -> tuple[Any, NDArray[np.int64]] | None:
    """(the values of all cells as words, the item of each) where the column is a category, else None."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if not (_is_text(kind.value_type) or pa.types.is_integer(kind.value_type)):
            return None
        found = _values(column)
        return found if len(pc.unique(found[0])) <= few else None
    if not (_is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind)):
        return None
    distinct = pc.count_distinct(column).as_py()
    if pa.types.is_integer(kind):
        ends = pc.min_max(column)
        if not distinct or distinct > few or 2 * distinct <= ends["max"].as_py() - ends["min"].as_py():
            return None
    if _is_text(kind):
        for separator in _SEPARATORS:
            there = pc.sum(pc.match_substring(column, separator)).as_py() or 0
            if there > _OFTEN * (len(column) - column.null_count):
                found = _values(pc.split_pattern(column.cast(pa.string()), separator))
                if len(pc.unique(found[0])) <= min(few, distinct):
                    return found
    if distinct > few:
        return None
    return _values(pa.ListArray.from_arrays(np.arange(len(column) + 1, dtype=np.int32), column))


def _values(lists: Any) -> tuple[Any, NDArray[np.int64]]:
    """The words in the lists that are no blanks, and the list of each."""
    words = pc.utf8_trim_whitespace(pc.list_flatten(lists).cast(pa.string()))
    parents = pc.list_parent_indices(lists)
    there = pc.fill_null(pc.greater(pc.utf8_length(words), 0), False)
    owner: NDArray[np.int64] = parents.filter(there).to_numpy(zero_copy_only=False).astype(np.int64)
    return words.filter(there), owner


def _coded(
    name: str, words: Any, owner: NDArray[np.int64], n_items: int
) -> dict[str, tuple[NDArray[np.int32], tuple[str, ...]]]:
    """Category name -> (value row of each item, the values): a column for each place in a cell."""
    values = sorted(pc.unique(words).to_pylist())
    rows = pc.index_in(words, pa.array(values, pa.string())).to_numpy(zero_copy_only=False).astype(np.int32)
    nth = np.arange(len(owner)) - np.searchsorted(owner, owner)
    made = {}
    for place in range(min(MOST_VALUES, int(nth.max(initial=-1)) + 1)):
        column = np.zeros(n_items, np.int32)
        column[owner[nth == place]] = rows[nth == place] + 1
        if place or column.min(initial=1) != column.max(initial=1):  # one value for all says nothing
            made[f"{name}#{place + 1}" if place else name] = column, ("", *values)
    return made


def _standardized(column: Any) -> NDArray[np.float32] | None:
    """float32[N] of mean 0 and deviation 1, 0 where unknown; None where the column says nothing."""
    kind = column.type
    if pa.types.is_temporal(kind):
        column = column.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        return None
    x = pc.fill_null(column.cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False).copy()
    known = np.isfinite(x)
    peak = np.abs(x[known]).max(initial=0)
    if not peak:
        return None
    x[known] /= peak  # so that squares of the greatest are numbers
    if x[known].min() > 0 and _skewness(x[known]) > _SKEWED:
        x[known] = np.log(x[known])
    mean, spread = x[known].mean(), x[known].std()
    if spread < 1e-9:
        return None
    made: NDArray[np.float32] = np.where(known, (x - mean) / spread, 0).astype(np.float32)
    return made


def _skewness(x: NDArray[np.float64]) -> float:
    away = x - x.mean()
    return float((away**3).mean() / max((away**2).mean() ** 1.5, 1e-300))


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _filled(words: Any) -> int:
    return int(pc.sum(pc.greater(pc.utf8_length(words), 0)).as_py() or 0)

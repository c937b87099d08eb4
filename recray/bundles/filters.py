"""Filters on item features as masks over the catalogue, the recent ones kept; and what caps count."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray.data.sequences import Histories
from recray.errors import InputError

KEPT = 64  # masks; each takes one byte an item
FORMS = 'write a value, a list of values, {"not": [values]}, {"min": number} or {"min": .., "max": ..}'


@dataclass(frozen=True)
class Condition:
    """What one column must hold: one of `among`, none of `never`, at least `least`, at most `most`.

    None asks nothing. An unknown feature is among nothing and within no bounds, but is nothing that
    `never` names.
    """

    among: tuple[Any, ...] | None = None
    never: tuple[Any, ...] | None = None
    least: float | None = None
    most: float | None = None


Filter = tuple[tuple[str, Condition], ...]  # (column, what it must hold), all of them


class Filters:
    """`mask(filter)` over item features (aligned with item rows, or None when there are none)."""

    def __init__(self, features: pa.Table | None, n_items: int) -> None:
        self.features, self.n_items = features, n_items
        self._kept: OrderedDict[Any, NDArray[np.bool_]] = OrderedDict()
        self._groups: dict[str, Histories] = {}  # no more than there are columns
        self._lock = threading.Lock()

    def checked(self, given: Any) -> Filter:
        """`{"column": value, [values], {"not": [values]} or {"min": .., "max": ..}}` in one form.

        Unknown columns and odd values raise InputError.
        """
        if given is None:
            return ()
        if not isinstance(given, Mapping):
            raise InputError(f"filter is {given!r:.80}", fix='write {"column": ["value"]}')
        made = []
        for column, values in sorted(given.items(), key=lambda pair: str(pair[0])):
            self.known(column, "filter")
            made.append((column, self._condition(column, values)))
        return tuple(made)

    def known(self, column: Any, what: str) -> None:
        """Raise InputError for a column that the items do not have."""
        columns = [] if self.features is None else self.features.column_names
        if column not in columns:
            fix = f"choose of {', '.join(columns)}" if columns else "this bundle has no item features"
            raise InputError(f"unknown {what} column {column!r:.80}", fix=fix)
        assert self.features is not None
        kind = self.features.schema.field(column).type
        if what != "feature" and pa.types.is_nested(kind.value_type if _is_list(kind) else kind):
            raise InputError(f"{what} column {column!r} holds {kind}", fix="choose one of words or numbers")

    def _condition(self, column: str, given: Any) -> Condition:
        if not isinstance(given, Mapping):
            return Condition(among=self._listed(column, given))
        odd = [name for name in given if name not in ("not", "min", "max")]
        if odd or not given:
            raise InputError(f"filter on {column!r} is {dict(given)!r:.80}", fix=FORMS)
        never = self._listed(column, given["not"]) if "not" in given else None
        bounds = [given.get("min"), given.get("max")]
        if any(bound is not None for bound in bounds):
            assert self.features is not None
            kind = _plain(self.features.column(column).slice(0, 1)).type
            numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
            if not numeric or not all(bound is None or _is_number(bound) for bound in bounds):
                raise InputError(f"filter on {column!r} has bounds but wants {kind}", fix=FORMS)
        return Condition(never=never, least=bounds[0], most=bounds[1])

    def _listed(self, column: str, given: Any) -> tuple[Any, ...]:
        values = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
        if not all(isinstance(v, (str, int, float, bool)) for v in values):
            raise InputError(f"filter on {column!r} has a value that is neither text nor a number", fix=FORMS)
        self._values(column, tuple(dict.fromkeys(values)))
        return tuple(dict.fromkeys(values))

    def mask(self, filter: Filter) -> NDArray[np.bool_] | None:
        """bool[N], read-only: items whose every named column is as its condition asks; None without a
        filter."""
        if not filter:
            return None
        key = repr(filter)  # tells 1 from 1.0 and True
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        mask = np.ones(self.n_items, bool)
        for column, condition in filter:
            if condition.among is not None:
                mask &= self._column(column, condition.among)
            if condition.never is not None:
                mask &= ~self._column(column, condition.never)
            if condition.least is not None or condition.most is not None:
                mask &= self._within(column, condition)
        mask.flags.writeable = False
        with self._lock:
            self._kept[key] = mask
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return mask

    def groups(self, columns: Iterable[str]) -> dict[str, Histories]:
        """Column -> the values that each item has in it, as rows of the distinct ones; an unknown feature
        is no value, and a list is each of its values once."""
        made = {}
        for column in columns:
            with self._lock:
                found = self._groups.get(column)
            if found is None:
                found = self._grouped(column)
                with self._lock:
                    self._groups[column] = found
            made[column] = found
        return made

    def _grouped(self, column: str) -> Histories:
        assert self.features is not None
        data = _plain(self.features.column(column))
        lists = _is_list(data.type)
        owner = pc.list_parent_indices(data).to_numpy() if lists else np.arange(self.n_items)
        values = pc.dictionary_encode(data.flatten() if lists else data)
        rows = pc.fill_null(values.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        pairs = np.unique(np.stack([owner, rows])[:, rows >= 0], axis=1)
        lengths = np.bincount(pairs[0], minlength=self.n_items)
        return Histories(pairs[1].astype(np.int32), np.concatenate([[0], np.cumsum(lengths)]))

    def _within(self, column: str, condition: Condition) -> NDArray[np.bool_]:
        assert self.features is not None
        numbers = _plain(self.features.column(column)).cast(pa.float64(), safe=False)
        found = pc.fill_null(numbers, np.nan).to_numpy(zero_copy_only=False)  # NaN is within no bounds
        least = -np.inf if condition.least is None else condition.least
        most = np.inf if condition.most is None else condition.most
        return np.asarray((found >= least) & (found <= most), bool)

    def _column(self, column: str, values: tuple[Any, ...]) -> NDArray[np.bool_]:
        assert self.features is not None
        data = _plain(self.features.column(column))
        wanted = self._values(column, values)
        if not _is_list(data.type):
            return _bools(pc.is_in(data, value_set=wanted))
        hit = _bools(pc.is_in(data.flatten(), value_set=wanted))
        parents = pc.list_parent_indices(data).to_numpy(zero_copy_only=False)
        return np.bincount(parents[hit], minlength=self.n_items) > 0

    def _values(self, column: str, values: tuple[Any, ...]) -> pa.Array:
        """The values in the column's type; what cannot be read as such raises InputError."""
        assert self.features is not None
        kind = _plain(self.features.column(column).slice(0, 1)).type
        kind = kind.value_type if _is_list(kind) else kind
        try:
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return pa.array([str(v) for v in values], kind)
            return pa.array([pa.scalar(v).cast(kind).as_py() for v in values], kind)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            raise InputError(f"filter on {column!r} wants {kind}, not {values!r:.80}") from None


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; an int has no end, and NaN is not within these."""
    most = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -most <= value <= most


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, dictionary-encoded ones as their values; Arrow compares no half floats."""
    data = column.combine_chunks()
    if pa.types.is_float16(data.type):
        return data.cast(pa.float32())
    if pa.types.is_dictionary(data.type):
        return data.dictionary_decode()
    if _is_list(data.type) and pa.types.is_dictionary(data.type.value_type):
        kind = pa.large_list if pa.types.is_large_list(data.type) else pa.list_
        return data.cast(kind(data.type.value_type.value_type))
    return data


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _bools(found: Any) -> NDArray[np.bool_]:
    plain: NDArray[np.bool_] = pc.fill_null(found, False).to_numpy(zero_copy_only=False).astype(bool)
    return plain

"""Filters on item features as masks over the catalogue, the recent ones kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray.errors import InputError

KEPT = 64  # masks; each takes one byte an item
Filter = Mapping[str, tuple[Any, ...]]


class Filters:
    """`mask(filter)` over item features (aligned with item rows, or None when there are none)."""

    def __init__(self, features: pa.Table | None, n_items: int) -> None:
        self.features, self.n_items = features, n_items
        self._kept: OrderedDict[Any, NDArray[np.bool_]] = OrderedDict()
        self._lock = threading.Lock()

    def checked(self, given: Any) -> Filter:
        """`{"column": value or [values]}` in one form. Unknown columns and odd values raise InputError."""
        if given is None:
            return {}
        if not isinstance(given, Mapping):
            raise InputError(f"filter is {given!r:.80}", fix='write {"column": ["value"]}')
        known = [] if self.features is None else self.features.column_names
        made = {}
        for column, values in sorted(given.items(), key=lambda pair: str(pair[0])):
            if column not in known:
                fix = f"choose of {', '.join(known)}" if known else "this bundle has no item features"
                raise InputError(f"unknown filter column {column!r:.80}", fix=fix)
            values = list(values) if isinstance(values, (list, tuple, set, frozenset)) else [values]
            if not all(isinstance(v, (str, int, float, bool)) for v in values):
                raise InputError(f"filter on {column!r} has a value that is neither text nor a number")
            made[column] = tuple(dict.fromkeys(values))
            self._values(column, made[column])
        return made

    def mask(self, filter: Filter) -> NDArray[np.bool_] | None:
        """bool[N], read-only: items whose every named column holds one of its values; None without a
        filter. An item whose feature is unknown fails."""
        if not filter:
            return None
        key = tuple(sorted((c, tuple((type(v).__name__, v) for v in vs)) for c, vs in filter.items()))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        mask = np.ones(self.n_items, bool)
        for column, values in filter.items():
            mask &= self._column(column, values)
        mask.flags.writeable = False
        with self._lock:
            self._kept[key] = mask
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return mask

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
        except (pa.ArrowException, TypeError, ValueError):
            raise InputError(f"filter on {column!r} wants {kind}, not {values!r:.80}") from None


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, a dictionary-encoded one as its values."""
    data = column.combine_chunks()
    return data.dictionary_decode() if pa.types.is_dictionary(data.type) else data


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _bools(found: Any) -> NDArray[np.bool_]:
    plain: NDArray[np.bool_] = pc.fill_null(found, False).to_numpy(zero_copy_only=False).astype(bool)
    return plain

"""Columns as they are read -> ids, numbers and times, with what is missing or malformed marked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray import columns as col
from recray.data.formats import Source
from recray.errors import InputError

_NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$|^\s*[-+]?(?i:nan|inf(inity)?)\s*$"
_ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}(:?\d{2}(:?\d{2}([.,]\d+)?)?)?)?\s*(Z|[-+]\d{2}:?(\d{2})?)?$"
_DIVISOR = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

Mark = Callable[[NDArray[np.bool_], str, str], None]  # (which rows, why, role): told of rows to drop


def codes_of(column: Any) -> NDArray[np.int32]:
    """int32[n] codes of a dictionary array, -1 where null."""
    indices = column.indices
    if indices.null_count:
        indices = pc.fill_null(indices, -1)
    codes: NDArray[np.int32] = indices.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return codes


def at_words(
    of_word: NDArray[np.bool_], codes: NDArray[np.int32], missing: bool = False
) -> NDArray[np.bool_]:
    """bool[n]: a property of dictionary words, looked up for every row; nulls count as `missing`."""
    nulls = bool(len(codes)) and int(codes.min()) < 0
    if not of_word.any() and not (nulls and missing):
        return np.zeros(len(codes), bool)
    return np.append(of_word, missing)[codes]


def text_of(column: Any) -> tuple[Any, NDArray[np.bool_] | None]:
    """(strings, plain or dictionary-coded; which rows are no UTF-8 or None)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        try:
            return column.cast(pa.string()), None
        except pa.ArrowInvalid:
            words = [None if v is None else _decoded(v) for v in column.to_pylist()]
            bad = np.array([v is not None and w is None for v, w in zip(column.to_pylist(), words)])
            return pa.array(["?" if b else w for b, w in zip(bad, words)], pa.string()), bad
    if pa.types.is_dictionary(column.type):
        words = column.dictionary
        if pa.types.is_string(words.type):
            return column, None
        return pa.DictionaryArray.from_arrays(column.indices.cast(pa.int32()), words.cast(pa.string())), None
    if pa.types.is_string(column.type):
        return column, None
    if pa.types.is_floating(column.type):  # pandas writes whole ids with a gap as floats
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.fill_null(pc.equal(column, pc.floor(column)), True)
        if pc.all(whole).as_py() and len(column):
            column = column.cast(pa.int64(), safe=False)
    coded = column.dictionary_encode()
    try:
        words = coded.dictionary.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise InputError(f"an id or context column holds {column.type}, not text or numbers") from None
    return pa.DictionaryArray.from_arrays(coded.indices, words), None


def _decoded(value: bytes) -> str | None:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


def _floats(column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """(float64[n], which are missing, which are malformed); NaN for both."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    malformed = None
    if _is_text(column.type):
        words = pc.utf8_trim_whitespace(text_of(column)[0].cast(pa.string()))
        empty = pc.fill_null(pc.equal(words, ""), True)
        good = pc.fill_null(pc.match_substring_regex(words, _NUMBER), False)
        malformed = pc.invert(pc.or_(good, empty)).to_numpy(zero_copy_only=False)
        plain = pc.replace_substring_regex(words, r"^\+", "")
        column = pc.if_else(pc.and_(good, pc.invert(empty)), plain, None).cast(pa.float64())
    elif pa.types.is_decimal(column.type) or pa.types.is_boolean(column.type):
        column = column.cast(pa.float64(), safe=False)
    missing = column.is_null().to_numpy(zero_copy_only=False) if column.null_count else None
    values = column.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    if missing is not None and malformed is not None:
        missing = missing & ~malformed
    return values, missing, malformed


def _is_text(kind: Any) -> bool:
    return bool(
        pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_dictionary(kind)
        or pa.types.is_large_string(kind) or pa.types.is_large_binary(kind)
    )  # fmt: skip


def weights_of(column: Any, drop: Mark) -> NDArray[np.float64]:
    """float64[n] weights as written; missing, malformed and infinite ones are handed to `drop`."""
    values, missing, malformed = _floats(column)
    if missing is not None:
        drop(missing, "missing weight", col.WEIGHT)
    if malformed is not None:
        drop(malformed, "malformed weight", col.WEIGHT)
    finite = np.isfinite(values)
    if not finite.all():
        drop(~finite, "weight is NaN or infinite", col.WEIGHT)
        values = np.where(finite, values, 1.0)
    return values


def times_of(column: Any, source: Source, drop: Mark) -> NDArray[np.int64]:
    """int64[n] unix seconds; 0 where missing or malformed (those rows are dropped)."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if source.unit == "iso":
        return _iso_times(column, drop)
    if pa.types.is_temporal(column.type):
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("s"))
        per = _DIVISOR[column.type.unit]
        drop(column.is_null().to_numpy(zero_copy_only=False), "missing time", col.TIME)
        ticks = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
        return _floor(ticks, per)
    if pa.types.is_integer(column.type) and not column.null_count:
        whole = column.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return _floor(whole, _DIVISOR.get(source.unit, 1))
    values, missing, malformed = _floats(column)
    if missing is not None:
        drop(missing, "missing time", col.TIME)
    if malformed is not None:
        drop(malformed, "malformed time", col.TIME)
    good = np.abs(np.nan_to_num(values, nan=np.inf)) < 2**62
    drop(~good, "malformed time", col.TIME)
    values = np.where(good, values, 0.0)
    return np.floor(values / _DIVISOR.get(source.unit, 1)).astype(np.int64)


def _floor(ticks: NDArray[np.int64], per: int) -> NDArray[np.int64]:
    return ticks if per == 1 else np.floor_divide(ticks, per)


def _iso_times(column: Any, drop: Mark) -> NDArray[np.int64]:
    words = pc.utf8_trim_whitespace(text_of(column)[0].cast(pa.string()))
    words = pc.replace_substring(words, ",", ".")  # of a second
    drop(pc.fill_null(pc.equal(words, ""), True).to_numpy(zero_copy_only=False), "missing time", col.TIME)
    looks = pc.fill_null(pc.match_substring_regex(words, _ISO), False)
    zoned = pc.fill_null(pc.match_substring_regex(words, r"(Z|:\d{2}(\.\d+)?[-+]\d{2}:?(\d{2})?)$"), False)
    seconds = np.zeros(len(words), np.int64)
    bad = ~looks.to_numpy(zero_copy_only=False)
    for with_zone, kind in ((False, pa.timestamp("ns")), (True, pa.timestamp("ns", tz="UTC"))):
        chosen = pc.and_(looks, zoned if with_zone else pc.invert(zoned))
        at = np.flatnonzero(chosen.to_numpy(zero_copy_only=False))
        if not len(at):
            continue
        some = words.filter(chosen)
        try:
            ticks = some.cast(kind).cast(pa.int64()).to_numpy(zero_copy_only=False)
            seconds[at] = np.floor_divide(ticks, 10**9)
        except pa.ArrowInvalid:  # one of them is a 31st of June
            for i, word in zip(at, some.to_pylist()):
                try:
                    ticks = pa.scalar(word).cast(kind).value
                    seconds[i] = ticks // 10**9
                except pa.ArrowInvalid:
                    bad[i] = True
    drop(bad, "malformed time", col.TIME)
    return seconds

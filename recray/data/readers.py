"""Bytes of a log -> Arrow tables of its needed columns, a block at a time, any block on any worker.

A block that does not parse as typed columns is read again as text, so that one bad cell costs its row only.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray import columns as col
from recray.data.files import guarded
from recray.data.formats import Source
from recray.data.spans import Span, texts
from recray.errors import InputError

REPAIRS = 20  # unclosed quotes of one block whose line is read without them
_CODED = pa.dictionary(pa.int32(), pa.string())


@dataclass
class Raw:
    """One block as read: an Arrow table by role, and the rows that could not be split into fields.

    `broken`: reason -> (count, first row in the block, its text). `rows` counts all of them.
    """

    table: Any
    rows: int
    broken: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    text: bytes = b""
    skip: frozenset[int] = frozenset()  # rows, counted among all, that are not in the table
    lines_before: int = 0  # lines of the span before this block
    header: bool = False  # whether a header line was cut off the text
    lines: NDArray[np.int64] | None = None  # int64[rows], the 0-based line of each, where one has several

    def row_of(self, kept: int) -> int:
        """The row among all rows of the block, from the row of the table."""
        for row in sorted(self.skip):
            if row > kept:
                break
            kept += 1
        return kept


# -- reading -----------------------------------------------------------------------------------------
def blocks(span: Span) -> Iterator[Raw]:
    """The blocks of one span, in order. Raises InputError where the file is damaged."""
    source = span.source
    if source.kind == "parquet":
        yield _read_parquet(span)
        return
    read = {"delimited": _read_delimited, "sequences": _read_sequences, "jsonl": _read_json}[source.kind]
    first, lines = span.start == 0, 0
    for text in texts(span):
        if first and text.startswith(b"\xef\xbb\xbf"):
            text = text[3:]
        header = first and source.header and source.kind == "delimited"
        empty = len(text) - len(text.lstrip(b"\r\n")) if header else 0
        raw = read(source, text[text.find(b"\n", empty) + 1 or len(text) :] if header else text)
        raw.header, raw.lines_before = header, lines + text[:empty].count(b"\n")
        lines += text.count(b"\n")
        yield raw
        first = False


def _types(source: Source) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for role, name in source.columns.items():
        if role == col.WEIGHT:
            types[name] = pa.float64()
        elif role == col.TIME:
            types[name] = (
                pa.string() if source.unit == "iso" else pa.float64() if source.fractions else pa.int64()
            )
        else:
            types[name] = _CODED
    return types


def _read_delimited(source: Source, text: bytes) -> Raw:
    separator = source.separator
    if len(separator) > 1:
        text, separator = text.replace(separator.encode(), b"\x1f"), "\x1f"
    bad: list[tuple[int, str]] = []

    def on_bad(row: Any) -> str:
        bad.append((row.number or 0, row.text))
        return "skip"

    def read(types: dict[str, Any], utf8: bool = True) -> Any:
        bad.clear()
        return pcsv.read_csv(
            pa.BufferReader(text),
            pcsv.ReadOptions(use_threads=False, block_size=len(text) + 1, column_names=list(source.names)),
            pcsv.ParseOptions(
                delimiter=separator,
                quote_char='"' if source.quoted else False,
                newlines_in_values=source.quoted and b'"' in text,
                invalid_row_handler=on_bad,
            ),
            pcsv.ConvertOptions(
                check_utf8=utf8,
                column_types=types,
                include_columns=list(dict.fromkeys(source.columns.values())),
                null_values=[""],
                strings_can_be_null=False,
            ),
        )

    if not text.strip():
        return Raw(_by_role(source, None), 0)
    for left in range(REPAIRS, -1, -1):
        try:
            table = read(_types(source))
        except pa.ArrowInvalid:
            try:
                table = read(dict.fromkeys(source.columns.values(), pa.binary()), utf8=False)
            except pa.ArrowInvalid as error:
                raise InputError(f"cannot be read ({str(error)[:200]})", where=source.place) from None
        mended = mended_quote(source.separator, text, bad) if left and source.quoted else None
        if mended is None:
            break
        text = mended
    broken = {}
    if bad:
        bad = [(number - 1, words) for number, words in bad]
        broken["wrong number of fields"] = (len(bad), bad[0][0], bad[0][1][:80])
    return Raw(
        _by_role(source, table), table.num_rows + len(bad), broken, text, frozenset(row for row, _ in bad)
    )


def mended_quote(separator: str, text: bytes, bad: list[tuple[int, str]]) -> bytes | None:
    """The text without the quotes of a line that leaves one open: it hid rows that are good. None: no such.

    bad: rows that could not be split, their number, from 1, and their text.
    """
    line = _unclosed(separator, text, bad)
    if line is None:
        return None
    lines = text.splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"', b"")
    return b"".join(lines)


def _unclosed(separator: str, text: bytes, bad: list[tuple[int, str]]) -> int | None:
    """The 0-based line whose quote is never closed, or only by another row's."""
    for number, words in bad:
        if "\n" in words.rstrip("\r\n"):
            return _line_in(text, number - 1, quoted=True)
    if text.count(b'"') % 2 == 0:
        return None
    at, inside = 0, False
    for number, line in enumerate(io.BytesIO(text)):
        if line.count(b'"') % 2:
            inside = not inside
            at = number if inside else at
    opened = text.splitlines()[at]
    starts = opened.startswith(b'"') or separator.encode() + b'"' in opened
    return at if starts else None  # a quote inside a field is a character like any other


def _read_sequences(source: Source, text: bytes) -> Raw:
    found = text.decode("utf-8", errors="replace").splitlines()
    at = np.array([number for number, line in enumerate(found) if line.strip()], np.int64)
    lines = [found[number] for number in at]
    fields = pc.split_pattern(pa.array([line.strip() for line in lines], pa.string()), source.separator)
    lengths = pc.list_value_length(fields).to_numpy(zero_copy_only=False).astype(np.int64)
    words = fields.flatten()
    starts = np.cumsum(lengths) - lengths
    is_item = np.ones(len(words), bool)
    is_item[starts] = False
    users = words.take(pa.array(np.repeat(starts, lengths - 1)))
    table = pa.table(
        {col.USER: users.dictionary_encode(), col.ITEM: words.filter(pa.array(is_item)).dictionary_encode()}
    )
    return Raw(table, table.num_rows, lines=np.repeat(at, lengths - 1))


def _read_json(source: Source, text: bytes) -> Raw:
    schema = []
    for role, name in source.columns.items():
        number = pa.int64() if role == col.TIME and not source.fractions else pa.float64()
        kind = pa.int64() if source.types.get(name) == "int64" else pa.string()
        if role == col.WEIGHT or (role == col.TIME and source.unit != "iso"):
            kind = number
        schema.append(pa.field(name, kind))
    if not text.strip():
        return Raw(_by_role(source, None), 0)
    try:
        table = pjson.read_json(
            pa.BufferReader(text),
            pjson.ReadOptions(use_threads=False, block_size=len(text) + 1),
            pjson.ParseOptions(explicit_schema=pa.schema(schema), unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return _read_json_slowly(source, text)
    return Raw(_by_role(source, table), table.num_rows, {}, text)


def _read_json_slowly(source: Source, text: bytes) -> Raw:
    """Line by line, for a block with a broken line or with ids of several types."""
    rows: dict[str, list[bytes | None]] = {name: [] for name in source.columns.values()}
    bad: dict[str, list[tuple[int, str]]] = {}
    ids = {source.columns[role] for role in (col.USER, col.ITEM)}
    number = -1
    for line in text.splitlines():
        if not line.strip():
            continue
        number += 1
        reason = ""
        values: list[bytes | None] = []
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                reason = "not a JSON object"
            elif any(not isinstance(row.get(name), (str, int, type(None))) or (row.get(name) in (True, False)
                     and isinstance(row.get(name), bool)) for name in ids):  # fmt: skip
                reason = "id is neither text nor a whole number"
            else:
                asked = [row.get(name) for name in rows]
                values = [None if value is None else str(value).encode() for value in asked]
        except (ValueError, RecursionError):  # half of a character, or brackets in brackets without end
            reason = "not a JSON object"
        if reason:
            bad.setdefault(reason, []).append((number, line.decode("utf-8", errors="replace")[:80]))
            continue
        for column, value in zip(rows.values(), values):
            column.append(value)
    table = pa.table({name: pa.array(values, pa.binary()) for name, values in rows.items()})
    skip = frozenset(n for found in bad.values() for n, _ in found)
    broken = {reason: (len(found), *found[0]) for reason, found in bad.items()}
    return Raw(_by_role(source, table), number + 1, broken, text, skip)


def _read_parquet(span: Span) -> Raw:
    source = span.source
    coded = [name for role, name in source.columns.items() if role not in (col.TIME, col.WEIGHT)]
    wanted = list(dict.fromkeys(source.columns.values()))

    def read() -> Any:
        with source.place.open() as file:
            made = pq.ParquetFile(file, read_dictionary=coded)
            return made.read_row_groups(list(range(span.start, span.stop)), columns=wanted, use_threads=False)

    table = guarded(source.place, read)
    return Raw(_by_role(source, table), table.num_rows, {}, b"")


def _by_role(source: Source, table: Any) -> Any:
    """The columns under their role's name, each in one chunk."""
    made = {}
    for role, name in source.columns.items():
        if table is None:
            made[role] = pa.array([], pa.string())
        elif name in table.column_names:
            made[role] = _one(table.column(name))
        else:
            made[role] = pa.nulls(table.num_rows, pa.string())
    return pa.table(made)


def _one(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


# -- where a row stands ------------------------------------------------------------------------------
def line_of(raw: Raw, source: Source, row: int) -> int:
    """1-based line of a row of a block (its row number in Parquet), counted from the block's first line."""
    if raw.lines is not None:
        return 1 + int(raw.lines[row])
    return 1 + row if source.kind == "parquet" else 1 + raw.header + _line_in(raw.text, row, source.quoted)


def _line_in(text: bytes, row: int, quoted: bool) -> int:
    """0-based line, in a block's text, of its row: empty lines and quoted line breaks are lines too."""
    at, found, inside = 0, -1, False
    for number, line in enumerate(io.BytesIO(text)):
        if not inside and line.strip(b"\r\n"):
            found, at = found + 1, number
            if found == row:
                break
        inside ^= quoted and bool(line.count(b'"') % 2)
    return at

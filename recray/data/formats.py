"""What kind of file a log is: compression, separator, header, which column is what. Decided from its head.

Everything decided here travels in a small picklable `Source`, so that every block of the file is read the
same way on any worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from recray import columns as col
from recray.data.files import compression_of, first_bytes, head, suffix_of
from recray.data.headers import (
    CONTEXT,
    Unit,
    any_usual,
    has_fractions,
    is_number,
    resolve,
    time_unit,
    usual_column,
)
from recray.errors import InputError
from recray.storage import Place

HEAD = 1 << 20  # bytes of plain text that are looked at
_JSON = (".json", ".jsonl", ".ndjson")
_SEPARATORS = ("::", "\t", ",", ";", "|", " ")
Kind = Literal["delimited", "sequences", "jsonl", "parquet"]


@dataclass(frozen=True)
class Source:
    """How one file is read. `columns` maps a role (or CONTEXT + a context column) to the name in `names`."""

    place: Place
    kind: Kind
    compression: str | None
    separator: str
    quoted: bool
    header: bool
    names: tuple[str, ...]
    columns: Mapping[str, str]
    unit: Unit
    fractions: bool  # times are written with a decimal point
    types: Mapping[str, str]  # JSON lines: column -> "string" or "int64" as in the head

    def assumed(self) -> str:
        """One line for a person: what will be read as what."""
        kinds = {"delimited": f"separated by {self.separator!r}", "sequences": "one user's sequence a line"}
        parts = [f"{role}={name}" for role, name in self.columns.items() if not role.startswith(CONTEXT)]
        if self.unit in ("ms", "us", "ns"):
            parts.append(f"times in {self.unit}")
        header = "" if self.kind != "delimited" or self.header else ", no header"
        return f"{self.place}: {kinds.get(self.kind, self.kind)}{header}; {', '.join(parts)}"


def sniff(
    where: Place,
    columns: Mapping[str, str] | None = None,
    context: Sequence[str] = (),
) -> Source:
    """Look at the head of one file. `columns`: role -> header or position, as the user wrote it.

    Raises InputError for an empty, damaged or unreadable file and for unknown columns.
    """
    given = {role: str(name) for role, name in (columns or {}).items()}
    for role in given:
        if role not in col.ROLES:
            raise InputError(f"unknown column role {role!r}", fix=f"known: {', '.join(col.ROLES)}")
    magic = first_bytes(where)
    if not magic:
        raise InputError("is empty", where=where)
    if magic.startswith(b"PAR1"):
        return _sniff_parquet(where, given, context)
    compression = compression_of(where, magic)
    text, whole = head(where, compression, HEAD)
    lines = head_lines(text, whole)
    if not lines:
        raise InputError("has no rows", where=where)
    if suffix_of(where.path) in _JSON or lines[0].lstrip().startswith("{"):
        return _sniff_json(where, compression, lines, given, context)
    return _sniff_text(where, compression, lines, given, context)


def head_lines(text: bytes, whole: bool) -> list[str]:
    """The non-empty lines of a head; the last one is left out where it may be cut."""
    lines = text.decode("utf-8-sig", errors="replace").splitlines()
    if not whole and len(lines) > 1:
        lines.pop()  # cut off in the middle
    return [line for line in lines if line.strip()]


def _sniff_parquet(where: Place, given: Mapping[str, str], context: Sequence[str]) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with where.open() as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"is not a Parquet file we can read ({error})", where=where) from None
    chosen = resolve(where, schema.names, given, context)
    for role, name in chosen.items():
        kind = schema.field(name).type
        odd = pa.types.is_nested(kind) or isinstance(kind, pa.BaseExtensionType)
        if odd or (role == col.TIME and (pa.types.is_time(kind) or pa.types.is_duration(kind))):
            words = f"the {role.removeprefix(CONTEXT)} column {name!r} holds {kind}"
            raise InputError(words, where=where, fix=f"name another: --columns {role}=NAME")
    unit: Unit = "none"
    if col.TIME in chosen:
        kind = schema.field(chosen[col.TIME]).type
        unit = "arrow"
        if not pa.types.is_temporal(kind):
            with where.open() as file:
                head = next(pq.ParquetFile(file).iter_batches(1000, columns=[chosen[col.TIME]]), None)
            values = [] if head is None else [str(v) for v in head.column(0).to_pylist() if v is not None]
            unit = time_unit(values)
    return Source(where, "parquet", None, "", False, True, tuple(schema.names), chosen, unit,
                  False, {})  # fmt: skip


def _sniff_json(
    where: Place, compression: str | None, lines: list[str], given: Mapping[str, str], context: Sequence[str]
) -> Source:
    import json

    rows: list[dict[str, Any]] = []
    for line in lines[:1000]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    if not rows:
        raise InputError(
            "is not JSON lines: no line is an object", where=where, fix="write one object a line"
        )
    names = tuple(dict.fromkeys(name for row in rows for name in row))
    chosen = resolve(where, names, given, context)
    times = [str(row[chosen[col.TIME]]) for row in rows if row.get(chosen.get(col.TIME, "")) is not None]
    types = {}
    for name in chosen.values():
        values = [row[name] for row in rows if row.get(name) is not None]
        whole = bool(values) and all(isinstance(v, int) and not isinstance(v, bool) for v in values)
        types[name] = "int64" if whole else "string"
    unit = time_unit(times) if times else "none"
    return Source(where, "jsonl", compression, "", False, True, names, chosen, unit,
                  has_fractions(times), types)  # fmt: skip


def _sniff_text(
    where: Place, compression: str | None, lines: list[str], given: Mapping[str, str], context: Sequence[str]
) -> Source:
    suffix = suffix_of(where.path)
    separator, ragged = _separator(lines[:500], suffix)
    if given.get(col.ITEM, "").endswith(":") or (ragged and not given):
        return Source(where, "sequences", compression, separator, False, False, ("0", "1:"),
                      {col.USER: "0", col.ITEM: "1:"}, "none", False, {})  # fmt: skip
    separator, quoted, names, header = layout(where, lines)
    if (
        header
        and given
        and all(v.isdigit() and v not in names for v in given.values())
        and not any_usual(names)
    ):
        header, names = False, tuple(str(i) for i in range(len(names)))  # positions were given
    chosen = resolve(where, names, given, context)
    times: list[str] = []
    if col.TIME in chosen:
        at = names.index(chosen[col.TIME])
        table = [split_fields(line, separator, quoted) for line in lines[header:1000]]
        times = [row[at] for row in table if len(row) > at and row[at]]
    return Source(where, "delimited", compression, separator, quoted, header, names, chosen,
                  time_unit(times) if times else "none", has_fractions(times), {})  # fmt: skip


def layout(where: Place, lines: list[str]) -> tuple[str, bool, tuple[str, ...], bool]:
    """(separator, whether quotes quote, names of the columns, whether the first line is a header)."""
    separator, _ = _separator(lines[:500], suffix_of(where.path))
    if not separator:
        raise InputError("has one column only", where=where, fix="separate the columns by commas or tabs")
    quoted = separator in (",", ";")
    first = [name.strip() for name in split_fields(lines[0], separator, quoted)]
    numbers = any(is_number(name) for name in first)  # a context column may have one for its name
    header = not numbers or all(usual_column(role, first) for role in (col.USER, col.ITEM))
    return separator, quoted, tuple(first) if header else tuple(str(i) for i in range(len(first))), header


def _separator(lines: list[str], suffix: str) -> tuple[str, bool]:
    """(separator, whether lines have so different lengths that each is one user's sequence)."""
    if suffix == ".csv":
        counts = {s: lines[0].count(s) for s in (",", ";", "\t", "|")}
        best = max(counts, key=lambda s: counts[s])
        return (best, False) if counts[best] else ("", False)
    if suffix in (".tsv", ".inter") and "\t" in lines[0]:
        return "\t", False
    shares = {}
    for separator in _SEPARATORS:
        number, same = Counter(line.rstrip().count(separator) for line in lines).most_common(1)[0]
        shares[separator] = same / len(lines) if number else 0.0
    for separator, share in shares.items():
        if share >= 0.9:
            return separator, False
    for separator in (" ", "\t"):  # a table has few lines of another length, a file of sequences many
        used = sum(separator in line for line in lines)
        if used > len(lines) / 2 and shares[separator] < 0.6 and max(shares.values()) < 0.6:
            return separator, True
    best = max(shares, key=lambda s: shares[s])
    return (best, False) if shares[best] else ("", False)


def split_fields(line: str, separator: str, quoted: bool) -> list[str]:
    """The fields of one line of text."""
    if quoted and '"' in line:
        import csv

        return next(csv.reader([line], delimiter=separator), [])
    return line.rstrip("\r\n").split(separator)

"""Tables about items and users, aligned to rows; links between users as pairs of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.json as pjson
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray.data import files, formats, headers, readers
from recray.data.ids import Ids
from recray.errors import InputError
from recray.progress import warn
from recray.storage import Place, place

LINK = "link"  # the role of both columns of a file of links


@dataclass(frozen=True)
class Features:
    """A feature file as read: its ids (strings, one a row) and its other columns."""

    where: Place
    ids: Any  # Arrow string array
    table: Any  # Arrow table without the id column
    skipped: int  # rows without an id, with a wrong number of fields, or of an id that came before


def read_features(file: Any, role: str, known: Ids) -> Features:
    """Read items' or users' features. The id column is the one of a usual name, else `id`, else the first.

    Any format a log may have. RecBole's header types are kept: `:token` columns stay text, `:float`
    become numbers. Text that is no UTF-8 is read as Latin-1, with a warning.

    Raises InputError for what cannot be read, and where no id is one that the log has (`known`).
    """
    where = _there(file)
    table, broken = _table(where, role)
    plain = [headers.plain_name(n) for n in table.column_names]
    if twice := next((n for i, n in enumerate(plain) if n in plain[:i]), None):
        raise InputError(f"has two columns named {twice!r}", where=where, fix="rename one of them")
    name = _id_column(role, table.column_names)
    ids = _as_text(table.column(name))
    rest = table.drop_columns([name])
    rest = rest.rename_columns([headers.plain_name(n) for n in rest.column_names])
    told = pc.fill_null(pc.greater(pc.utf8_length(ids), 0), False).to_numpy(zero_copy_only=False)
    codes = ids.dictionary_encode()
    first = np.zeros(len(ids), bool)
    indices = pc.fill_null(codes.indices, 0).to_numpy(zero_copy_only=False)
    first[np.unique(indices, return_index=True)[1]] = True
    keep = told & first
    if not keep.any():
        raise InputError(f"has no {role} with an id", where=where)
    mask = pa.array(keep)
    made = Features(where, ids.filter(mask), rest.filter(mask), broken + int(np.count_nonzero(~keep)))
    _check_ids(made, role, name, known)
    return made


def _id_column(role: str, names: Sequence[str]) -> str:
    return headers.usual_column(role, names) or ("id" if "id" in names else names[0])


def _check_ids(made: Features, role: str, name: str, known: Ids) -> None:
    """Ids of a wrong column would all be new ones: refuse them where no header says that they are ids."""
    met = int(np.count_nonzero(known.rows_of(made.ids) >= 0))
    if not met and headers.usual_column(role, [name]) is None:
        raise InputError(
            f"has no {role} of the log; its ids were taken from the column {name!r}",
            where=made.where,
            fix=f"call the column of the ids {role!r}",
        )
    if met < len(known) / 2:
        warn(f"{made.where} has {met:,} of the {len(known):,} {role}s of the log, by its column {name!r}")
    if made.skipped > len(made.ids):
        warn(f"{made.where}: {made.skipped:,} rows are left out and {len(made.ids):,} read")


def fingerprint(file: Any) -> str:
    """sha256 of a file's bytes."""
    made = hashlib.sha256()
    for chunk in files.chunks(_there(file), None):
        made.update(chunk)
    return made.hexdigest()


def aligned(features: Features, ids: Ids) -> Any:
    """The table with one row per id, null where the file has none."""
    rows = ids.rows_of(features.ids)
    at = np.full(len(ids), -1, np.int64)
    at[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    return features.table.take(pa.array(at, mask=at < 0))


def read_links(file: Any, users: Ids) -> tuple[Any, Any]:
    """(users, others): two Arrow string arrays, the first two columns of a file of user-user pairs.

    A first line of words is a header unless one of them is a known user.
    """
    where = _there(file)
    table, _ = _table(where, LINK)
    if table.num_columns < 2:
        raise InputError("has one column only", where=where, fix="a link is two user ids")
    names = table.column_names[:2]
    first = [[name] if any(n in users for n in names) else [] for name in names]
    one, two = (
        pa.concat_arrays([pa.array(first[i], pa.string()), _as_text(table.column(i))]) for i in range(2)
    )
    good = pc.and_(pc.greater(pc.utf8_length(one), 0), pc.greater(pc.utf8_length(two), 0))
    return one.filter(good), two.filter(good)


def link_rows(users: Ids, one: Any, two: Any) -> NDArray[np.int32]:
    """int32[L, 2] rows of both ends."""
    return np.stack([users.rows_of(one), users.rows_of(two)], axis=1)


def _as_text(column: Any) -> Any:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
        raise InputError(f"an id column holds {column.type}, not text or numbers")
    return pc.fill_null(column.cast(pa.string()), "").combine_chunks()


def _there(file: Any) -> Place:
    where = place(file)
    if not where.exists():
        raise InputError("is not there", where=where, fix="check the path")
    if where.is_dir():
        raise InputError("is a folder", where=where, fix="give one file")
    return where


def _without_views(table: Any) -> Any:
    """The same in types that Arrow has functions for; other writers' texts may come as views."""

    def plain(kind: Any) -> Any:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            made = pa.list_ if pa.types.is_list(kind) else pa.large_list
            return made(plain(kind.value_type))
        if kind == pa.string_view():
            return pa.large_string()
        return pa.large_binary() if kind == pa.binary_view() else kind

    return table.cast(pa.schema([(field.name, plain(field.type)) for field in table.schema]))


def _table(where: Place, role: str) -> tuple[Any, int]:
    magic = files.first_bytes(where)
    if not magic:
        raise InputError("is empty", where=where)
    try:
        if magic.startswith(b"PAR1"):
            with where.open() as file:
                return _without_views(pq.read_table(file)), 0
        text, _ = files.head(where, files.compression_of(where, magic), 1 << 62)
        try:
            text.decode()
        except UnicodeDecodeError:
            warn(f"{where} is not UTF-8; it is read as Latin-1")
            text = text.decode("latin-1").encode()
        text = text.removeprefix(b"\xef\xbb\xbf")
        if text.lstrip().startswith(b"{"):
            return _read_json(text, role), 0
        return _read_text(where, text, role)
    except pa.ArrowException as error:
        raise InputError(f"cannot be read ({str(error)[:200]})", where=where) from None


def _read_json(text: bytes, role: str) -> Any:
    """JSON lines; ids that are text stay text, also where they look like dates."""
    try:
        first = json.loads(text[: text.find(b"\n") + 1 or len(text)])
    except (ValueError, RecursionError):
        first = {}
    names = list(first) if isinstance(first, dict) else []
    kept = [name for name in names if name == _id_column(role, names) and isinstance(first[name], str)]
    return pjson.read_json(
        pa.BufferReader(text),
        pjson.ReadOptions(block_size=len(text) + 1),
        pjson.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in kept])),
    )


def _read_text(where: Place, text: bytes, role: str) -> tuple[Any, int]:
    lines = formats.head_lines(text[: formats.HEAD], len(text) <= formats.HEAD)
    if not lines:
        raise InputError("has no rows", where=where)
    separator, quoted, names, header = formats.layout(where, lines)
    if len(separator) > 1:
        text, separator = text.replace(separator.encode(), b"\x1f"), "\x1f"
    if header:
        empty = len(text) - len(text.lstrip(b"\r\n"))
        text = text[text.find(b"\n", empty) + 1 or len(text) :]
    else:
        names = tuple(f"column_{name}" for name in names)
    id_name = names[0] if role == LINK else _id_column(role, names)
    types = {id_name: pa.string()}
    for name in names:
        if name.endswith((":token", ":token_seq", ":float_seq")):
            types[name] = pa.string()
        elif name.endswith(":float"):
            types[name] = pa.float64()
    if role == LINK:
        types[names[1 % len(names)]] = pa.string()
    bad: list[tuple[int, str]] = []

    def on_bad(row: Any) -> str:
        bad.append((row.number or 0, row.text))
        return "skip"

    for left in range(readers.REPAIRS, -1, -1):
        bad.clear()
        table = pcsv.read_csv(
            pa.BufferReader(text),
            pcsv.ReadOptions(use_threads=False, column_names=list(names), block_size=len(text) + 1),
            pcsv.ParseOptions(
                delimiter=separator,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                invalid_row_handler=on_bad,
            ),
            pcsv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
        )
        mended = readers.mended_quote(separator, text, bad) if left and quoted else None
        if mended is None:
            break
        text = mended
    return table, len(bad)

"""A log of (user, item, time, weight, event, context), columnar and validated, one block at a time.

`check` is a pure function of one block: what is left and, per reason, what was dropped. It is the same
function on one machine and on a cluster.
"""

from __future__ import annotations

import time as clock
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray import columns as col
from recray.data import readers, spans
from recray.data.values import at_words, codes_of, text_of, times_of, weights_of

LONGEST_ID = 1024  # characters
_DAY = 86_400
_MOST = float(np.finfo(np.float32).max)  # weights are stored as float32


@dataclass(frozen=True)
class Interactions:
    """Checked interactions as rows, sorted by (user_row, time, input order).

    user_rows, item_rows int32[N]; times int64[N] unix seconds, all 0 when the log has none;
    weights float32[N]; events int8[N] codes into event_names, or None; context: column -> int32[N] value
    rows, 0 unknown.
    """

    user_rows: NDArray[np.int32]
    item_rows: NDArray[np.int32]
    times: NDArray[np.int64]
    weights: NDArray[np.float32]
    has_times: bool
    events: NDArray[np.int8] | None = None
    event_names: tuple[str, ...] = ()
    context: Mapping[str, NDArray[np.int32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.user_rows)

    def take(self, at: Any) -> Interactions:
        """Some of them: int array, bool mask or slice. Empty times and weights stay empty."""
        return Interactions(
            self.user_rows[at],
            self.item_rows[at],
            self.times[at] if len(self.times) else self.times,
            self.weights[at] if len(self.weights) else self.weights,
            self.has_times,
            None if self.events is None else self.events[at],
            self.event_names,
            {name: rows[at] for name, rows in self.context.items()},
        )


@dataclass(frozen=True)
class Rules:
    """What a valid row is. min_weight None: above zero; a number: at least it."""

    now: int
    min_weight: float | None = None
    event_weights: Mapping[str, float] | None = None
    longest_id: int = LONGEST_ID

    @staticmethod
    def today(min_weight: float | None = None, event_weights: Mapping[str, float] | None = None) -> Rules:
        return Rules(int(clock.time()), min_weight, event_weights)


@dataclass
class Problem:
    """How many rows were dropped for one reason, and where the first of them stands."""

    count: int
    line: int  # 1-based line (row number in Parquet), counted from where `span` starts
    example: str
    span: spans.Span

    @property
    def file(self) -> str:
        """The file, as the user named it."""
        return str(self.span.source.place)

    def place(self) -> int:
        """1-based line in the file."""
        return self.line + spans.lines_before(self.span)


@dataclass(frozen=True)
class Coded:
    """A column of text: `words` (an Arrow string array, each used) by order of first appearance, and
    int32[n] codes into them."""

    words: Any
    codes: NDArray[np.int32]


@dataclass
class Block:
    """The valid rows of one block, n of them."""

    coded: dict[str, Coded]  # user, item, and if present event and context columns
    times: NDArray[np.int64] | None
    weights: NDArray[np.float32] | None  # None: all 1
    rows: int  # read, valid or not
    problems: dict[str, Problem]

    def __len__(self) -> int:
        return len(self.coded[col.USER].codes)


def read_blocks(span: spans.Span, rules: Rules) -> Iterator[Block]:
    """Read and check the blocks of one span, in order."""
    for raw in readers.blocks(span):
        yield check(raw, span, rules)


def check(raw: readers.Raw, span: spans.Span, rules: Rules) -> Block:
    """Drop what is no valid interaction, one reason a row: the first that applies."""
    drop = _Dropper(raw, span)
    n = raw.table.num_rows
    source = span.source
    coded: dict[str, Any] = {}
    for role in (*source.columns,):
        if role in (col.TIME, col.WEIGHT):
            continue
        column, unreadable = text_of(raw.table.column(role))
        if unreadable is not None:
            drop(unreadable, "not valid UTF-8", role)
        coded[role] = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    for role in (col.USER, col.ITEM):
        codes, words = codes_of(coded[role]), coded[role].dictionary
        sizes = pc.fill_null(pc.utf8_length(words), 0).to_numpy(zero_copy_only=False)
        drop(at_words(sizes == 0, codes, missing=True), f"missing {role}", role)
        drop(
            at_words(sizes > rules.longest_id, codes),
            f"{role} id longer than {rules.longest_id} characters",
            role,
        )
    weights = None
    if col.WEIGHT in source.columns:
        weights = weights_of(raw.table.column(col.WEIGHT), drop)
    if rules.event_weights and col.EVENT in coded:
        factors = [rules.event_weights.get(w, 1.0) for w in coded[col.EVENT].dictionary.to_pylist()]
        factor = np.array([*factors, 1.0])[codes_of(coded[col.EVENT])]
        with np.errstate(over="ignore"):  # what gets infinite is dropped below
            weights = factor if weights is None else weights * factor
    if weights is not None:
        role = col.WEIGHT if col.WEIGHT in source.columns else col.EVENT  # where they come from
        low = weights <= 0 if rules.min_weight is None else weights < rules.min_weight
        limit = "not above zero" if rules.min_weight is None else f"below {rules.min_weight:g}"
        drop(low, f"weight {limit} (cancelled)", role)
        drop(np.abs(weights) > _MOST, f"weight too large (above {_MOST:.2g})", role)
    times = None
    if col.TIME in source.columns:
        times = times_of(raw.table.column(col.TIME), source, drop)
        drop(times < 0, "time before 1970", col.TIME)
        drop(times > rules.now + _DAY, "time in the future", col.TIME)
    keep = None if drop.dropped is None else ~drop.dropped
    return Block(
        {role: _compact(column, keep) for role, column in coded.items()},
        None if times is None else times if keep is None else times[keep],
        None if weights is None else (weights if keep is None else weights[keep]).astype(np.float32),
        max(raw.rows, n),
        drop.problems,
    )


class _Dropper:
    """Marks rows as dropped and keeps, per reason, their number and the first one's place."""

    def __init__(self, raw: readers.Raw, span: spans.Span) -> None:
        self.raw, self.span = raw, span
        self.dropped: NDArray[np.bool_] | None = None
        self.problems = {
            reason: self._problem(count, row, text) for reason, (count, row, text) in raw.broken.items()
        }

    def __call__(self, bad: NDArray[np.bool_], reason: str, role: str) -> None:
        if not bad.any():
            return
        fresh = bad if self.dropped is None else bad & ~self.dropped
        count = int(np.count_nonzero(fresh))
        if count:
            row = int(np.argmax(fresh))
            value = _shown(self.raw.table.column(role)[row])
            shown = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
            self.problems[reason] = self._problem(count, self.raw.row_of(row), f"{role} {shown[:60]!r}")
        self.dropped = bad if self.dropped is None else self.dropped | bad

    def _problem(self, count: int, row: int, example: str) -> Problem:
        line = self.raw.lines_before + readers.line_of(self.raw, self.span.source, row)
        return Problem(count, line, _printable(example), self.span)


def _shown(cell: Any) -> Any:
    """A cell as Python has it, or as Arrow writes it: its years may go beyond 9999."""
    try:
        return cell.as_py()
    except (OverflowError, ValueError):
        return str(cell.cast(pa.int64()))


def _printable(text: str) -> str:
    """On one line, without control characters."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def _compact(column: Any, keep: NDArray[np.bool_] | None) -> Coded:
    """The kept rows; their words are what they use, in order of first appearance; null is the word ""."""
    codes = codes_of(column)
    if keep is not None:
        codes = codes[keep]
    words = column.dictionary.cast(pa.string())
    if words.null_count:
        words = pc.fill_null(words, "")
    if len(codes) and int(codes.min()) < 0:
        codes = np.where(codes < 0, len(words), codes)
        words = pa.concat_arrays([words, pa.array([""], pa.string())])
        unified = words.dictionary_encode()  # "" may have been there
        codes, words = codes_of(unified)[codes], unified.dictionary
    first = np.full(len(words), len(codes), np.int64)
    first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
    order = np.argsort(first, kind="stable")[: int(np.count_nonzero(first < len(codes)))]
    if len(order) == len(words) and np.array_equal(order, np.arange(len(words))):
        return Coded(words, codes)
    new = np.full(len(words), -1, np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return Coded(words.take(pa.array(order)), new[codes])

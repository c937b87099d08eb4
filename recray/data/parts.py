"""Rows of a log -> the part files of a dataset: sorted, duplicates counted, split. Pure functions of arrays.

One machine calls `finish` for each range of users, a cluster calls it in as many tasks: the same files.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray import columns as col
from recray.data import splits
from recray.data.headers import CONTEXT
from recray.data.interactions import Interactions
from recray.errors import InputError

PART = 1 << 20  # interactions a part file has, about
ROW_GROUP = 1 << 17


@dataclass(frozen=True)
class Plan:
    """How rows become parts. `cuts`: first valid and first test time of the split by time."""

    split: str
    dedupe: bool
    given: bool  # valid or test come from files of their own; `codes` of each row say which
    cuts: tuple[int, int] | None = None

    def cut(self, cuts: tuple[int, int], first: int) -> Plan:
        """With the cuts of the split by time. InputError where they leave a split without interactions."""
        if not first < cuts[0] < cuts[1]:
            raise InputError("the times differ too little for a split by time", fix="choose leave-one-out")
        return dataclasses.replace(self, cuts=cuts)


def bounds(counts: NDArray[np.int64], part: int = PART) -> NDArray[np.int64]:
    """int64[P + 1] borders of user ranges of about `part` interactions each; counts int64[U] a user."""
    total = np.cumsum(counts)
    n = max(1, round(float(total[-1]) / part)) if len(total) else 1
    inner = np.searchsorted(total, np.arange(1, n) * (total[-1] / n) if n > 1 else [])
    return np.unique(np.concatenate([[0], inner, [len(counts)]])).astype(np.int64)


def part_of(borders: NDArray[np.int64]) -> NDArray[np.uint16]:
    """uint16[U]: the part of each user."""
    return np.repeat(np.arange(len(borders) - 1, dtype=np.uint16), np.diff(borders))


def order_by(*keys: NDArray[Any]) -> NDArray[np.int64]:
    """The stable ascending order of rows by integer keys, the first being the most significant.

    Keys and the row's number are packed into one uint64 where they fit, since numpy sorts such words
    many times faster than it argsorts; else the least significant keys are sorted by first.
    """
    n = len(keys[0])
    if n == 0:
        return np.empty(0, np.int64)
    room = 64 - (n - 1).bit_length()
    groups: list[list[tuple[NDArray[Any], int, int]]] = [[]]
    left = room
    for key in reversed(keys):
        low = int(key.min())
        bits = (int(key.max()) - low).bit_length()
        if bits > left and groups[-1]:
            groups.append([])
            left = room
        groups[-1].append((key, low, bits))
        left -= bits
    order: NDArray[np.int64] | None = None
    for group in groups:
        order = _pass(group, order, n, 64 - room)
    assert order is not None
    return order


def _pass(
    group: list[tuple[NDArray[Any], int, int]], order: NDArray[np.int64] | None, n: int, low_bits: int
) -> NDArray[np.int64]:
    if sum(bits for _, _, bits in group) + low_bits > 64:  # one key alone too wide
        key = group[0][0]
        found = np.argsort(key if order is None else key[order], kind="stable")
        return found if order is None else order[found]
    packed = np.arange(n, dtype=np.uint64)
    shift = low_bits
    for key, low, bits in group:
        if bits:
            values = key if order is None else key[order]
            packed |= (values.astype(np.int64) - low).astype(np.uint64) << np.uint64(shift)
            shift += bits
    if np.any(packed[1:] < packed[:-1]):
        packed.sort()
    found = (packed & np.uint64((1 << low_bits) - 1)).astype(np.int64)
    return found if order is None else order[found]


def duplicates(
    users: NDArray[np.int32], times: NDArray[np.int64] | None, items: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """bool[N]: rows that repeat an earlier (user, item, time). Rows are sorted by (user, time)."""
    again = np.zeros(len(users), bool)
    if len(users) < 2:
        return again
    same = users[1:] == users[:-1]
    if times is not None:
        same &= times[1:] == times[:-1]
    tied = np.zeros(len(users), bool)
    tied[1:] |= same
    tied[:-1] |= same
    at = np.flatnonzero(tied)
    if not len(at):
        return again
    group = np.cumsum(np.concatenate([[True], ~same]))[at]
    order = order_by(group, items[at])
    g, i = group[order], items[at][order]
    again[at[order[1:]][(g[1:] == g[:-1]) & (i[1:] == i[:-1])]] = True
    return again


def finish(log: Interactions, codes: NDArray[np.int8] | None, plan: Plan) -> tuple[dict[str, Any], int]:
    """({split: Arrow table of a part file}, duplicates) of all interactions of a range of users.

    log: rows in input order (any order of users); codes: int8[N] given splits, None where `plan` decides.
    """
    times = log.times if log.has_times else None
    keys = [log.user_rows] if codes is None else [codes, log.user_rows]
    order = order_by(*keys, *([] if times is None else [times]))
    repeated = 0
    picked = {name: values[order] for name, values in columns_of(log).items()}
    given = None if codes is None else codes[order]
    again = _repeats(picked, given)
    repeated = int(np.count_nonzero(again))
    if plan.dedupe and repeated:
        picked = {name: values[~again] for name, values in picked.items()}
        given = None if given is None else given[~again]
    if given is None:
        given = _split(picked, plan)
    made = {}
    for code, split in enumerate(col.SPLITS):
        chosen = given == code
        if chosen.any():
            every = bool(chosen.all())
            made[split] = pa.table(
                {name: pa.array(values if every else values[chosen]) for name, values in picked.items()}
            )
    return made, repeated


def columns_of(log: Interactions) -> dict[str, NDArray[Any]]:
    """The columns of a part file; times, weights and events only where there are any."""
    made: dict[str, NDArray[Any]] = {col.USER_ROW: log.user_rows, col.ITEM_ROW: log.item_rows}
    if log.has_times:
        made[col.TIME] = log.times
    if len(log.weights):
        made[col.WEIGHT] = log.weights
    if log.events is not None:
        made[col.EVENT] = log.events
    return made | {CONTEXT + name: rows for name, rows in log.context.items()}


def log_of(columns: Mapping[str, NDArray[Any]], events: tuple[str, ...]) -> Interactions:
    """What `columns_of` took apart."""
    return Interactions(
        columns[col.USER_ROW],
        columns[col.ITEM_ROW],
        columns.get(col.TIME, np.empty(0, np.int64)),
        columns.get(col.WEIGHT, np.empty(0, np.float32)),
        col.TIME in columns,
        columns.get(col.EVENT),
        events,
        {name.removeprefix(CONTEXT): rows for name, rows in columns.items() if name.startswith(CONTEXT)},
    )


def _repeats(picked: Mapping[str, NDArray[Any]], given: NDArray[np.int8] | None) -> NDArray[np.bool_]:
    users, times, items = picked[col.USER_ROW], picked.get(col.TIME), picked[col.ITEM_ROW]
    if given is None:
        return duplicates(users, times, items)
    again = np.zeros(len(users), bool)
    for code in range(len(col.SPLITS)):
        at = np.flatnonzero(given == code)
        again[at] = duplicates(users[at], None if times is None else times[at], items[at])
    return again


def _split(picked: Mapping[str, NDArray[Any]], plan: Plan) -> NDArray[np.int8]:
    users = picked[col.USER_ROW]
    if plan.split == "leave-one-out" and len(users):
        ends = np.flatnonzero(users[1:] != users[:-1]) + 1
        return splits.leave_one_out(np.concatenate([[0], ends, [len(users)]]).astype(np.int64))
    if plan.cuts is not None:
        return splits.by_time(picked[col.TIME], plan.cuts)
    return np.zeros(len(users), np.int8)


def encoded(table: Any) -> bytes:
    """The bytes of a part file. Sorted user rows pack well by difference."""
    sink = io.BytesIO()
    by_difference = [c for c in (col.USER_ROW, col.TIME) if c in table.column_names]
    other = [c for c in table.column_names if c not in by_difference]
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP,
        compression="zstd",
        compression_level=1,
        use_dictionary=[c for c in other if c != col.ITEM_ROW],
        column_encoding=dict.fromkeys(by_difference, "DELTA_BINARY_PACKED"),
        write_statistics=[col.USER_ROW],
    )
    return sink.getvalue()

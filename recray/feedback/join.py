"""The logs of events and impressions -> interactions that `prepare` reads, and what came of answers.

An event counts once by its id, however often it was sent. One that names the request that showed its item
is joined with it: which generation answered, and at which place (from 1) the item stood.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from recray import columns as col
from recray.errors import InputError
from recray.feedback.log import EVENTS, IMPRESSIONS, read

_KINDS = pa.schema(
    [
        (col.USER, pa.string()),
        (col.ITEM, pa.string()),
        (col.TIME, pa.int64()),
        (col.WEIGHT, pa.float32()),
        (col.EVENT, pa.string()),
        ("request_id", pa.string()),
        ("generation", pa.string()),
        ("place", pa.int32()),
    ]
)
_Kinds = Mapping[str, type | tuple[type, ...]]  # of what a line holds, as the state writes it
_NUMBER, _WORDS = (int, float), (str, type(None))
_EVENT: _Kinds = {
    **{"user": str, "item": str, "event_id": str, "time": _NUMBER, "weight": _NUMBER},
    **{"event": _WORDS, "request_id": _WORDS},
}
_IMPRESSION: _Kinds = {"request_id": str, "user": _WORDS, "generation": str, "items": list}


class Joined(NamedTuple):
    """interactions: a table of user, item, time, weight, event, and request_id, generation and place of what
    was shown (null elsewhere), by time; report: counts, see `join`."""

    interactions: Any
    report: Mapping[str, Any]


def join(folder: str | os.PathLike[str]) -> Joined:
    """Join what lies in a folder of feedback. Raises InputError where no events are, or for a line of others.

    The report counts events, repeated ones, impressions, and of each generation: answers, items shown,
    answers with an event of weight above zero, and such events by kind.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    lines = 0
    for line in _lines(folder, EVENTS, _EVENT):
        lines += 1
        rows.setdefault((line["user"], line["event_id"]), line)
    if not rows:
        raise InputError("holds no events", where=folder, fix="give the folder of `recray serve --feedback`")
    named = {line["request_id"] for line in rows.values() if "request_id" in line}
    shown: dict[str, dict[str, Any]] = {}
    by_generation: dict[str, Counter[str]] = {}
    for line in _lines(folder, IMPRESSIONS, _IMPRESSION):
        counts = by_generation.setdefault(line["generation"], Counter(answers=0, shown=0, answered=0))
        counts.update(answers=1, shown=len(line["items"]))
        if line["request_id"] in named:
            shown[line["request_id"]] = line
    answered = set()
    made = []
    for line in sorted(rows.values(), key=lambda line: line["time"]):
        told = {name: line[name] for name in (col.USER, col.ITEM, col.WEIGHT)}
        told |= {col.TIME: int(line["time"] // 1), col.EVENT: line.get("event", "")}
        told["request_id"] = line.get("request_id")
        seen = shown.get(line.get("request_id", ""))
        if seen is not None and seen["user"] in (None, line["user"]) and line["item"] in seen["items"]:
            told |= {"generation": seen["generation"], "place": seen["items"].index(line["item"]) + 1}
            if line["weight"] > 0:
                counts = by_generation[seen["generation"]]
                counts[f"events: {told[col.EVENT] or 'unnamed'}"] += 1
                counts["answered"] += seen["request_id"] not in answered
                answered.add(seen["request_id"])
        made.append(told)
    report = {
        "events": len(rows),
        "repeated": lines - len(rows),
        "impressions": sum(counts["answers"] for counts in by_generation.values()),
        "generations": {name: dict(counts) for name, counts in by_generation.items()},
    }
    return Joined(pa.Table.from_pylist(made, schema=_KINDS), report)


def _lines(folder: str | os.PathLike[str], name: str, kinds: _Kinds) -> Iterator[dict[str, Any]]:
    """The lines of a log. Raises InputError for one that the state did not write."""
    for line in read(folder, name):
        for field, kind in kinds.items():
            value: Any = line.get(field)
            if not isinstance(value, kind) or (isinstance(value, _NUMBER) and not abs(value) < 2**63):
                raise InputError(
                    f"is no line of {name}: its {field} is {value!r:.80}",
                    where=_place(Path(folder), name, line),
                    fix="give the folder of `recray serve --feedback`",
                )
        yield line


def _place(folder: Path, name: str, wanted: dict[str, Any]) -> str:
    """File and number of a line, looked for only now that it is to be told."""
    for path in (*folder.glob(f"{name}-*.jsonl"), *folder.glob(f".{name}-*.open")):
        with contextlib.suppress(OSError, ValueError):  # renamed meanwhile, or half a line
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if orjson.loads(line) == wanted:
                    return f"{path}:{number}"
    return str(folder)


def write(folder: str | os.PathLike[str], out: Path) -> Mapping[str, Any]:
    """`join`, its interactions written as Parquet; returns the report."""
    found = join(folder)
    pq.write_table(found.interactions, out, compression="zstd")
    return found.report

"""Ray's door to data: the same preparation on Ray Data, and a map over chunks, for more than one machine.

    spans -> check            the blocks, checked; the driver sees only their words and what was dropped
    words -> vocabulary       on the driver, in input order: the same ids as on one machine
    blocks -> rows -> parts   shuffled by user range, finished by the same function, file by file

The driver writes the files, so that workers need no common disk; what it holds is one part at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recray import columns as col
from recray.connect import session
from recray.data import parts, splits
from recray.data.assemble import Written, write
from recray.data.dataset import Dataset
from recray.data.encode import rows_of, vocabulary
from recray.data.interactions import Block, Coded, Problem, read_blocks
from recray.data.request import Request, Tally
from recray.data.spans import Span
from recray.progress import say

A = TypeVar("A")
B = TypeVar("B")
_AHEAD = 2  # chunks a worker has in hand and in wait
_WIDE = 1 << 16  # seconds a bucket has when the cuts of a split by time are looked for


@contextlib.contextmanager
def mapping(workers: int) -> Iterator[Callable[[Callable[[A], B], Iterable[A]], Iterator[B]]]:
    """A `map` for the block: results in order, at most `workers` calls at a time, each in a Ray task."""
    with session(num_cpus=workers):
        import ray

        def block_map(function: Callable[[A], B], chunks: Iterable[A]) -> Iterator[B]:
            call = ray.remote(num_cpus=1)(lambda chunk: function(chunk))  # Ray takes no partial
            waiting: deque[Any] = deque()
            for chunk in chunks:
                waiting.append(call.remote(chunk))
                if len(waiting) >= _AHEAD * workers:
                    yield ray.get(waiting.popleft())
            while waiting:
                yield ray.get(waiting.popleft())

        yield block_map


def prepare(request: Request, out: Any, workers: int) -> Dataset:
    """`data.prepare.prepare` on Ray Data with `workers` tasks at a time; leaves the same artefact."""
    with session(num_cpus=workers), _quiet():
        import ray

        say(f"preparing on Ray with {workers} workers")
        named = [(code, span) for code, name in enumerate(col.SPLITS) for span in request.spans.get(name, ())]
        rules = request.rules
        spans = ray.data.from_items(list(range(len(named))), override_num_blocks=len(named))
        shared_spans = ray.put(named)

        def check(row: dict[str, Any]) -> list[dict[str, Any]]:
            at = int(row["item"])
            code, span = ray.get(shared_spans)[at]
            return [_packed(at, nth, code, block) for nth, block in enumerate(read_blocks(span, rules))]

        blocks = spans.flat_map(check, concurrency=workers).materialize()
        heads = sorted(blocks.select_columns(HEAD).iter_rows(), key=lambda row: (row["at"], row["nth"]))
        tally = _tally(heads, [span for _, span in named])
        tally.check(sum(row["n"] for row in heads if row["code"] == 0), request.groups["train"][0].place)
        words, maps = vocabulary([_read(row["words"]) for row in heads], request)
        counts = np.zeros(len(words.users), np.int64)
        for row, rows in zip(heads, maps):
            counts[rows[col.USER]] += np.frombuffer(row["counts"], np.int64)
        borders = parts.bounds(counts)
        plan = request.plan
        if plan.split == "time":
            plan = plan.cut(*_time_cuts(blocks))
        numbers = {(row["at"], row["nth"]): i for i, row in enumerate(heads)}
        located = _Located(request, words.events, numbers, ray.put((maps, parts.part_of(borders))))
        finish = _Finish(request, words.events, plan)
        finished = (
            blocks.map_batches(
                lambda batch: located(batch), batch_size=1, batch_format="numpy", concurrency=workers
            )
            .groupby("part")
            .map_groups(lambda table: finish(table), batch_format="pyarrow", concurrency=workers)
        )
        return write(out, request, words, tally, _written(finished, borders))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data's own bars, logs and deprecations of itself are not for our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray

        context = ray.data.DataContext.get_current()
        log = logging.getLogger("ray.data")
        before, level = context.enable_progress_bars, log.level
        context.enable_progress_bars = False
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            context.enable_progress_bars = before
            log.setLevel(level)


# -- a block as a row of Ray Data: plain numbers, text and bytes -------------------------------------
HEAD = ["at", "nth", "code", "n", "rows", "words", "counts", "problems"]  # what the driver looks at


def _packed(at: int, nth: int, code: int, block: Block) -> dict[str, Any]:
    coded = {
        role: pa.DictionaryArray.from_arrays(pa.array(c.codes), c.words) for role, c in block.coded.items()
    }
    plain = {
        name: pa.array(values)
        for name, values in ((col.TIME, block.times), (col.WEIGHT, block.weights))
        if values is not None
    }
    users = block.coded[col.USER]
    problems = {reason: (p.count, p.line, p.example) for reason, p in block.problems.items()}
    return {
        "at": at,
        "nth": nth,
        "code": code,
        "n": len(block),
        "rows": block.rows,
        "words": _bytes(pa.table({role: _one(c.words) for role, c in block.coded.items()})),
        "counts": np.bincount(users.codes, minlength=len(users.words)).astype(np.int64).tobytes(),
        "problems": json.dumps(problems),
        "payload": _bytes(pa.table({**coded, **plain})),
    }


def _unpacked(payload: bytes) -> Block:
    table = _table(payload)
    coded, plain = {}, {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if pa.types.is_dictionary(column.type):
            coded[name] = Coded(column.dictionary, column.indices.to_numpy())
        else:
            plain[name] = column.to_numpy()
    return Block(coded, plain.get(col.TIME), plain.get(col.WEIGHT), table.num_rows, {})


def _one(words: Any) -> Any:
    """All words as one row, a list."""
    return pa.ListArray.from_arrays(pa.array([0, len(words)], pa.int32()), words)


def _bytes(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return bytes(sink.getvalue())


def _table(data: bytes) -> Any:
    with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
        return stream.read_all()


def _read(words: bytes) -> dict[str, Any]:
    table = _table(words)
    return {role: table.column(role).combine_chunks().flatten() for role in table.column_names}


def _tally(heads: Sequence[dict[str, Any]], spans: Sequence[Span]) -> Tally:
    tally = Tally()
    for row in heads:
        span = spans[row["at"]]
        problems = {
            reason: Problem(count, line, example, span)
            for reason, (count, line, example) in json.loads(row["problems"]).items()
        }
        tally.count(row["rows"], problems)
    return tally


# -- the steps between the shuffles -------------------------------------------------------------------
@dataclass(frozen=True)
class _Located:
    """Packed blocks -> a table of rows with their part and their place in the input."""

    request: Request
    events: tuple[str, ...]
    numbers: dict[tuple[int, int], int]
    shared: Any  # reference to (maps of every block, part of every user)

    def __call__(self, batch: dict[str, NDArray[Any]]) -> Any:
        import ray

        maps, part_of = ray.get(self.shared)
        number = self.numbers[int(batch["at"][0]), int(batch["nth"][0])]
        log = rows_of(_unpacked(batch["payload"][0]), maps[number], self.request, self.events)
        n = len(log)
        place = {
            "part": part_of[log.user_rows].astype(np.int32),
            "order": (np.int64(number) << 32) + np.arange(n, dtype=np.int64),
            "code": np.full(n, batch["code"][0], np.int8),
        }
        return pa.table({name: pa.array(values) for name, values in (place | parts.columns_of(log)).items()})


@dataclass(frozen=True)
class _Finish:
    """All rows of a part -> its files, one a row."""

    request: Request
    events: tuple[str, ...]
    plan: parts.Plan

    def __call__(self, table: Any) -> Any:
        arrays = {name: table.column(name).to_numpy() for name in table.column_names}
        at = parts.order_by(arrays.pop("order"))
        part = int(arrays.pop("part")[0])
        codes = arrays.pop("code")[at] if self.plan.given else None
        log = parts.log_of({name: values[at] for name, values in arrays.items()}, self.events)
        tables, repeated = parts.finish(log, codes, self.plan)
        return pa.table(
            {
                "part": pa.array([part] * len(tables)),
                "split": pa.array(list(tables)),
                "data": pa.array([parts.encoded(made) for made in tables.values()], pa.large_binary()),
                "rows": pa.array([made.num_rows for made in tables.values()]),
                "repeated": pa.array([repeated] + [0] * (len(tables) - 1)),
            }
        )


def _written(finished: Any, borders: NDArray[np.int64]) -> Iterator[Written]:
    for row in finished.iter_rows():
        part = row["part"]
        files = {row["split"]: (row["data"], row["rows"])}
        yield Written(part, int(borders[part]), int(borders[part + 1]), files, row["repeated"])


def _time_cuts(blocks: Any) -> tuple[tuple[int, int], int]:
    """(the cuts of the split by time, the first time), exactly as of all times together.

    Times are counted in wide buckets first, then one by one inside the two buckets of the cuts.
    """
    coarse = _counted(blocks, _WIDE, ())
    n = sum(coarse.values())
    cuts = []
    for rank in splits.time_ranks(n):
        bucket, inside = _bucket(coarse, rank)
        fine = _counted(blocks, 1, (bucket,))
        cuts.append(_bucket(fine, inside)[0])
    first = min(_counted(blocks, 1, (min(coarse),)))
    return (cuts[0], cuts[1]), first


def _counted(blocks: Any, width: int, only: tuple[int, ...]) -> dict[int, int]:
    """How many times lie in each bucket of `width` seconds, inside the wide buckets `only` (all for none)."""

    def count(row: dict[str, Any]) -> dict[str, Any]:
        times = _unpacked(row["payload"]).times
        assert times is not None
        if only:
            times = times[np.isin(times // _WIDE, only)]
        values, counts = np.unique(times // width, return_counts=True)
        return {"values": values.astype(np.int64).tobytes(), "counts": counts.astype(np.int64).tobytes()}

    made: dict[int, int] = {}
    for row in blocks.map(count).iter_rows():
        values, counts = (np.frombuffer(row[name], np.int64) for name in ("values", "counts"))
        for value, n in zip(values.tolist(), counts.tolist()):
            made[value] = made.get(value, 0) + n
    return made


def _bucket(counts: dict[int, int], rank: int) -> tuple[int, int]:
    """(the bucket of the time of that rank, its rank inside the bucket)."""
    for value in sorted(counts):
        if rank < counts[value]:
            return value, rank
        rank -= counts[value]
    raise IndexError(rank)

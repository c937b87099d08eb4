"""A plan before a run: who holds what, bytes a rank, bytes on the wire, seconds a step. Pure arithmetic.

W ranks share a step. A rank looks up n ids of a table of N rows of D floats, u of them distinct; a float
is w bytes in memory and v on the wire. What a step does to a table, and what it is reckoned to cost:

    dedupe    n ids are put in order, and found in it           n 2 id_s
    gather    u rows are read at random, copied to n places     u (row_s + 2 D w/b) + n 12 D/b
    sum       n gradients are added up into u                   n (id_s/2 + 8 D/b)
    update    u rows (all N/W: full softmax, penalty)           u (reads row_s + 4 D passes/b)
    wire      what is not local: ids, rows, gradients           (W-1)/W u (8 + 2 D v)/wire + latency
    softmax   P positions score N/W rows, and back              P N/W (6 D/flops + 144/b)
    dense     the network and what it keeps to go back          flops, 24 activations/b, calls call_s

With several ranks a row's owner sorts and adds up once more. b is the bandwidth of memory. The parts are
added up, since on a CPU they share the same cores. Memory is reckoned from above: as if all ids of a step
were distinct and every step as large as the largest, so that what is said to fit does. Validation after an
epoch gathers whole tables on every rank, and is counted beside the step.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recray.errors import ConfigError, InputError
from recray.training.layout import LARGEST, Layout

GIB = 1 << 30
PROCESS = 4 * GIB // 10  # bytes of Python, torch and Ray before there is a model
FLOAT = {"f32": 4, "bf16": 2}  # bytes
SLOTS = {"sgd": (0, 0), "adagrad": (4, 0), "adam": (8, 4)}  # optimizer -> bytes of state (a row, a float)
READS = {"sgd": 2, "adagrad": 4, "adam": 9}  # times an update reaches for a row, of weights or of state
PASSES = {"sgd": 13, "adagrad": 10, "adam": 18}  # times it reads or writes a row's floats
PASSES_ALL = {"sgd": 2, "adagrad": 4, "adam": 8}  # the same where all rows are updated, in their order
ROUNDING = 80  # more passes to round a row of a bfloat16 table
CALLS = 200  # smallest operators' time that a table's step takes beside its rows
KEPT = 24  # times a byte that is kept for the backward pass is read or written
DENSE = 20  # bytes a dense weight: itself, its gradient, two moments, its copy on the wire
LOGITS = 1 << 22  # that a full softmax makes at a time (losses.py), float32, three times
MOST_RANKS = 1 << 20

Float = Literal["f32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class TableWork:
    """One table and what a step asks of it, over all ranks. Raises ConfigError for impossible sizes."""

    name: str
    rows: int
    dim: int
    lookups: float  # ids a step
    distinct: float = 1.0  # share of a rank's ids of a step that are distinct
    scored: float = 0.0  # positions a step that are scored against all rows (full softmax)
    penalized: bool = False  # every row is stepped on (`train.table_l2`)
    dtype: Float = "f32"
    optimizer: Literal["sgd", "adagrad", "adam"] = "adam"

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= LARGEST:
            raise ConfigError(f"table {self.name!r} has {self.rows:,} rows", fix=f"plan 1 to {LARGEST:,}")
        if not 1 <= self.dim <= 1 << 20:
            raise ConfigError(f"table {self.name!r} has rows of {self.dim}", fix="plan 1 or more floats")
        if not (0 < self.lookups < math.inf and 0 <= self.scored < math.inf):
            raise ConfigError(f"table {self.name!r} is asked for {self.lookups:g} rows a step")
        if not 0 <= self.distinct <= 1:
            raise ConfigError(f"{self.distinct:g} of the ids are distinct", fix="give a share of 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step is, over all ranks."""

    tables: tuple[TableWork, ...]
    dense: int = 0  # weights outside of the tables
    flops: float = 0.0  # of the network, forward and backward
    activations: float = 0.0  # bytes that the network keeps for its backward pass
    calls: int = 0  # time of a rank whatever the sizes, in smallest operators
    largest: float = 1.0  # the largest step over the mean step
    accumulate: int = 1  # steps an update: so many gradients of rows are kept
    wire: Float = "f32"  # what rows and their gradients travel in
    validated: bool = False  # after an epoch, for which every rank gathers the whole tables


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one rank has to itself; the rates are those of a server's core where nothing else is known."""

    memory: int  # bytes
    bandwidth: float = 20e9  # bytes/s of memory, read and written in a row
    row_s: float = 20e-9  # seconds to reach a row at random, before its bytes are read
    id_s: float = 20e-9  # seconds an id to sort the ids of a step
    flops: float = 60e9  # a second, of float32 matrix products
    call_s: float = 1e-6  # seconds of the smallest operator
    wire: float = 1.25e9  # bytes/s that a rank can send: ten gigabit Ethernet
    latency: float = 100e-6  # seconds a message

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not 0 < getattr(self, field.name) < math.inf:
                raise ConfigError(f"{field.name} of {getattr(self, field.name):g}", fix="it must be above 0")


@dataclass(frozen=True)
class RunPlan:
    """Who holds what and what it costs one rank: bytes of memory, bytes sent and seconds a step."""

    work: Work
    ranks: int
    machine: Machine
    memory: Mapping[str, int]
    sent: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def bytes(self) -> int:
        """Bytes of memory of the rank that holds most."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.machine.memory

    @property
    def step_s(self) -> float:
        """Expected seconds of a step."""
        return sum(self.seconds.values())

    @property
    def lookups(self) -> float:
        """Ids a step, over all tables and ranks."""
        return sum(table.lookups for table in self.work.tables)

    def holds(self, rank: int) -> dict[str, tuple[int, int]]:
        """Table -> the positions [start, stop) that a rank holds of it."""
        return {table.name: Layout(table.rows, self.ranks).bounds(rank) for table in self.work.tables}

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "fits": self.fits,
            "ranks": self.ranks,
            "holds": [self.holds(rank) for rank in range(self.ranks)],
            "bytes_a_rank": {"total": self.bytes, **self.memory},
            "wire_bytes_a_step": {"total": sum(self.sent.values()), **self.sent},
            "step_ms": {"total": self.step_s * 1e3, **{k: s * 1e3 for k, s in self.seconds.items()}},
            "lookups_per_s": self.lookups / self.step_s,
            "work": dataclasses.asdict(self.work),
            "machine": dataclasses.asdict(self.machine),
        }


def make_plan(work: Work, ranks: int, machine: Machine) -> RunPlan:
    """The plan of this work on so many ranks that have such a machine each; `check_fits` judges it.

    Raises ConfigError for less than one rank.
    """
    if not 1 <= ranks <= MOST_RANKS:
        raise ConfigError(f"{ranks} workers", fix=f"plan for 1 to {MOST_RANKS:,}")
    sent = _sent(work, ranks)
    return RunPlan(work, ranks, machine, _memory(work, ranks), sent, _seconds(work, ranks, machine, sent))


def check_fits(plan: RunPlan) -> RunPlan:
    """The same plan; where a rank's memory is too small for it, InputError with what would fit."""
    if plan.fits:
        return plan
    most = max(plan.memory, key=lambda part: plan.memory[part])
    widest = max(plan.work.tables, key=lambda t: t.rows * t.dim)
    fitting = ", or with ".join(_fitting(plan))
    raise InputError(
        f"needs {size(plan.bytes)} of memory a worker on {plan.ranks} ({size(plan.memory[most])} of it "
        f"{most}), and {size(plan.machine.memory)} are there",
        where=f"table {widest.name!r} of {widest.rows:,} x {widest.dim}",
        fix=f"it fits with {fitting}" if fitting else "neither workers nor smaller rows make it fit",
    )


def compare(plan: RunPlan, measured_step_s: float) -> dict[str, Any]:
    """What a run's report keeps: the mean step as measured beside the predicted one, in milliseconds."""
    return {
        "predicted_step_ms": round(plan.step_s * 1e3, 3),
        "measured_step_ms": round(measured_step_s * 1e3, 3),
        "predicted_parts_ms": {part: round(s * 1e3, 3) for part, s in plan.seconds.items()},
        "bytes_a_rank": plan.bytes,
        "wire_bytes_a_step": sum(plan.sent.values()),
    }


def size(count: float) -> str:
    """Bytes for a person."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


def _memory(work: Work, ranks: int) -> dict[str, int]:
    """Bytes of one rank; more ranks make none of them more."""
    made = dict.fromkeys(("weights", "optimizer", "step", "validation", "dense", "process"), 0.0)
    for t in work.tables:
        if work.validated:  # as they come, and in order of row
            made["validation"] += t.rows * t.dim * (FLOAT[t.dtype] + 4)
        held = Layout(t.rows, ranks).share
        a_row, a_float = SLOTS[t.optimizer]
        made["weights"] += held * t.dim * FLOAT[t.dtype]
        made["optimizer"] += held * (a_row + a_float * t.dim)
        n = t.lookups * work.largest / ranks
        # the ids, sorted, as asked and as answered; the rows at their n places and their gradients
        made["step"] += n * (64 + 8 * t.dim)
        # rows as they came, gradients as they are kept, an update's state; both in the wire's type, twice
        made["step"] += n * work.accumulate * t.dim * (20 + 4 * FLOAT[work.wire])
        if t.scored:  # states of all ranks and their gradients; logits
            made["step"] += t.scored * work.largest * t.dim * 16 + 12 * LOGITS
        if t.scored or t.penalized:  # gradients of all rows
            made["step"] += held * t.dim * 4
    made["step"] += 2 * work.activations * work.largest / ranks  # with their gradients
    made["dense"] = DENSE * work.dense
    made["process"] = PROCESS
    return {part: math.ceil(count) for part, count in made.items()}


def _sent(work: Work, ranks: int) -> dict[str, int]:
    """Bytes that one rank sends in a step: what stays with it is not counted."""
    made = dict.fromkeys(("ids", "rows", "gradients", "softmax", "dense"), 0.0)
    away = (ranks - 1) / ranks
    for t in work.tables:
        u = t.lookups / ranks * t.distinct
        made["ids"] += away * u * 8
        made["rows"] += away * u * t.dim * FLOAT[work.wire]
        made["gradients"] += away * u * t.dim * FLOAT[work.wire]
        made["softmax"] += away * t.scored * (8 * t.dim + 16)  # states, gradients; targets, sums
    made["dense"] = away * work.dense * 8  # a ring passes the gradients around twice
    return {part: round(count) for part, count in made.items()}


def _seconds(work: Work, ranks: int, machine: Machine, sent: Mapping[str, int]) -> dict[str, float]:
    """Seconds of one rank in a step; the formulas stand at the top of this file."""
    made = dict.fromkeys(("dedupe", "gather", "sum", "update", "softmax"), 0.0)
    m, messages = machine, 2.0  # the loss and the dense gradients
    for t in work.tables:
        n = t.lookups / ranks
        u, held = n * t.distinct, t.rows / ranks
        owned = u if ranks > 1 else 0.0
        made["dedupe"] += (n + owned) * 2 * m.id_s
        made["gather"] += u * (m.row_s + t.dim * 2 * FLOAT[t.dtype] / m.bandwidth)
        made["gather"] += n * 12 * t.dim / m.bandwidth
        made["sum"] += (n + owned) * (m.id_s / 2 + 8 * t.dim / m.bandwidth)
        rounding = ROUNDING * (t.dtype == "bf16")
        if t.scored or t.penalized:
            made["update"] += held * 4 * t.dim * (PASSES_ALL[t.optimizer] + rounding) / m.bandwidth
        else:
            a_row = 4 * t.dim * (PASSES[t.optimizer] + rounding) / m.bandwidth
            made["update"] += min(u, held) * (READS[t.optimizer] * m.row_s + a_row)
        made["softmax"] += t.scored * held * (6 * t.dim / m.flops + 144 / m.bandwidth)
        messages += 4 + bool(t.scored) * (4 + t.scored * held / LOGITS)
    made["wire"] = sum(sent.values()) / m.wire + messages * m.latency * math.ceil(math.log2(ranks))
    network = work.flops / m.flops + KEPT * work.activations / m.bandwidth
    made["dense"] = network / ranks + (work.calls + CALLS * len(work.tables)) * m.call_s
    return made


def _fitting(plan: RunPlan) -> Iterator[str]:
    """What would fit, in a few words each: no validation, more workers, smaller floats, less state."""
    work, ranks = plan.work, plan.ranks

    def fits(work: Work, ranks: int = ranks) -> bool:
        return sum(_memory(work, ranks).values()) <= plan.machine.memory

    if work.validated and fits(dataclasses.replace(work, validated=False)):
        yield "train.valid_users=0"
    if fits(work, MOST_RANKS):
        fewest = _first(ranks, MOST_RANKS, lambda count: fits(work, count))
        yield f"{fewest:,} workers that have {size(plan.machine.memory)} each"
    for change in ({"dtype": "bf16"}, {"optimizer": "adagrad"}, {"dtype": "bf16", "optimizer": "adagrad"}):
        if fits(_with(work, change)):
            yield " ".join(f"train.table_{name}={value}" for name, value in change.items())
            break
    dims = range(8, max(t.dim for t in work.tables), 8)  # by eights, so that heads and groups divide it
    if at := bisect.bisect_left(dims, True, key=lambda dim: not fits(_with(work, {"dim": dim}))):
        yield f"rows of {dims[at - 1]} floats"


def _with(work: Work, change: Mapping[str, Any]) -> Work:
    """The same work with other settings of its tables; another dim is meant for the widest ones."""
    dim = max(t.dim for t in work.tables)
    kept = [t.dim < dim and "dim" in change for t in work.tables]
    tables = (t if keep else dataclasses.replace(t, **change) for t, keep in zip(work.tables, kept))
    return dataclasses.replace(work, tables=tuple(tables))


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least number of [low, high] from which on `holds` is true; it is at `high`."""
    return low + bisect.bisect_left(range(low, high), True, key=holds)

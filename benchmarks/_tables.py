"""Sharded tables: lookups a second beside TorchRec's, two ranks beside one, pooled features, peak memory.

All sides run as processes of one thread a rank, are warm before the first round, and take turns: in a
round each does some steps while the others wait. A value is the median of its rounds.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._lookups import Work
from benchmarks._process import PeerError, Worker, peer_python
from benchmarks.rows import Row
from recray.progress import say

LOOKUPS = 2048 * 20  # a step
OURS, PEER, POOLED = 20, 8, 40  # steps of a turn: about a second of ours and of the peer's
BARS = {("uniform", 1): 4, ("uniform", 2): 3, ("zipf", 1): 5, ("zipf", 2): 5}  # ours beside the peer
SCALING = {"f32": 1.25, "bf16": 1.4}  # two ranks beside one, by what is on the wire
LARGE = 50_000_000  # rows of the table whose memory is measured
LIMITS_GIB = {"f32": 18, "bf16": 10}  # of both its ranks together
WHY = {  # a bar of SCALING is missed
    "uniform": "memory is shared: no row crosses a wire whose type could matter",
    "zipf": "both ranks ask for the popular rows: what one adds up once, two do twice and then hand over",
}
APART = "ours apart"  # what two ranks would do if exchanging were free
CLOSE = 1e-4  # relative: both sides must hold the same rows after the same steps

Speeds = dict[str, list[float]]  # who -> lookups a second of each round


def table_rows(quick: bool) -> Iterator[Row]:
    """Unpooled lookups: ours, and the peer with and without its deduplication of ids."""
    sides: dict[str, Callable[[], Worker | None]] = {
        "ours 1": partial(ours, 1),
        "ours 2": partial(ours, 2),
        "ours 2 bf16": partial(ours, 2, wire="bf16"),
    }
    sides[APART] = apart
    if not quick:
        sides["ours 2 gloo"] = partial(ours, 2, transport="gloo")
    for ranks in (1, 2):
        sides[f"plain {ranks}"] = partial(torchrec, ranks)
        sides[f"dedup {ranks}"] = partial(torchrec, ranks, dedup=True)
    with started(sides) as workers:
        for kind in ("uniform", "zipf"):
            same_work(workers, kind)
        for kind in ("uniform", "zipf"):
            speeds = measured(workers, kind, rounds=3 if quick else 27)
            for ranks in (1, 2):
                yield beside_peer(workers, speeds, kind, ranks)
            yield from scaling(speeds, kind)


def pooled_rows(quick: bool) -> Iterator[Row]:
    """Sums of 20 rows, where FBGEMM's kernel is good."""
    sides: dict[str, Callable[[], Worker | None]] = {}
    for ranks in (1, 2):
        sides[f"ours {ranks}"] = partial(ours, ranks, pooled=True)
        sides[f"plain {ranks}"] = partial(torchrec, ranks, pooled=True)
    with started(sides) as workers:
        for kind in ("uniform", "zipf"):
            same_work(workers, kind)
        for kind in ("uniform", "zipf"):
            speeds = measured(workers, kind, rounds=3 if quick else 9, pooled=True)
            for ranks in (1, 2):
                yield beside_peer(workers, speeds, kind, ranks, pooled=True)


def gpu_rows(quick: bool) -> Iterator[Row]:
    """Unpooled lookups of one GPU beside one core; no row where there is none. TorchRec's CUDA kernels need
    a build of their own, so there is no peer of the GPU's kind."""
    if not torch.cuda.is_available():
        say("no GPU is here: nothing is measured")
        return
    with started({"ours 1": partial(ours, 1), "ours gpu": partial(ours, 1, device="cuda")}) as workers:
        for kind in ("uniform", "zipf"):
            same_work(workers, kind)
        for kind in ("uniform", "zipf"):
            rounds = 3 if quick else 9
            speeds: Speeds = defaultdict(list)
            for _ in range(rounds):
                for name, worker in workers.items():
                    (answer,) = worker.ask(kind=kind, steps=10 * OURS if "gpu" in name else OURS)
                    speeds[name].append((10 if "gpu" in name else 1) * OURS * LOOKUPS / answer["seconds"])
            (answer,) = workers["ours gpu"].ask(kind=kind, gather=10 * OURS)
            gathered = 10 * OURS * LOOKUPS / answer["seconds"]
            value = statistics.median(speeds["ours gpu"])
            given = {
                "optimizer": "row-wise adagrad", "rounds": rounds, "gather_rows/s": round(gathered),
                "memory_share": round(value / (gathered / 2), 3),
                "runs": [round(speed) for speed in speeds["ours gpu"]],
            }  # fmt: skip
            yield Row(
                name="sharded table on a GPU", work=f"1Mx64 {kind} 1 rank", metric="lookups/s", value=value,
                unit="lookups/s", peer="ours on one core", peer_value=statistics.median(speeds["ours 1"]),
                seeds=(0,), given=given,
            )  # fmt: skip


def ours(ranks: int, **work: Any) -> Worker:
    """Our table, a process a rank."""
    return _start(sys.executable, "benchmarks._our_table", ranks, work)


def apart() -> Worker:
    """Two processes that know nothing of each other, each with half of the table and of every step."""
    half = {"rank": 0, "ranks": 1, "rows": Work.rows // 2, "samples": Work.samples // 2}
    command = [sys.executable, "-m", "benchmarks._our_table", json.dumps(half)]
    return Worker([command, command], {"OMP_NUM_THREADS": "1"})


def torchrec(ranks: int, **work: Any) -> Worker | None:
    """TorchRec's, or None, said, where it is missing."""
    python = peer_python("torchrec")
    if python is None:
        return None
    return _start(python, "benchmarks._torchrec_peer", ranks, work)


def _start(python: str, module: str, ranks: int, work: Mapping[str, Any]) -> Worker:
    folder = tempfile.TemporaryDirectory(prefix="recray-bench-")
    shared = {"ranks": ranks, "store": f"{folder.name}/store", **work}
    commands = [[python, "-m", module, json.dumps({"rank": rank, **shared})] for rank in range(ranks)]
    return Worker(commands, {"OMP_NUM_THREADS": "1"}, folder)


@contextlib.contextmanager
def started(sides: Mapping[str, Callable[[], Worker | None]]) -> Iterator[dict[str, Worker]]:
    """Those that are warm, by name, started at once; they end with the block. A peer may fail, not ours."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name, start in sides.items():
            worker = start()
            if worker is not None:
                made[name] = stack.enter_context(worker)
        for name, worker in list(made.items()):
            try:
                worker.wait()
            except PeerError as error:
                if name.startswith("ours"):
                    raise
                say(f"torchrec does not run: {error}")
                del made[name]
        yield made


def same_work(workers: Mapping[str, Worker], kind: str) -> None:
    """Raise AssertionError unless all hold the same rows after the same steps (bf16 rounds them)."""
    sums = {
        name: sum(a["sum"] for a in worker.ask(kind=kind, check=True))
        for name, worker in workers.items()
        if name != APART
    }
    exact = {name: value for name, value in sums.items() if "bf16" not in name}
    if max(exact.values()) - min(exact.values()) > CLOSE * abs(exact["ours 1"]):
        raise AssertionError(f"not the same work: {sums}")


def measured(workers: Mapping[str, Worker], kind: str, *, rounds: int, pooled: bool = False) -> Speeds:
    """Each side's lookups a second and, under 'NAME cpu', a second of its processor time, which busy
    neighbours disturb less; as 'gather 1' and 'gather 2' rows a second that memory alone would allow."""
    made: Speeds = defaultdict(list)
    for turn in range(rounds):
        order = list(workers.items())
        for name, worker in order if turn % 2 else reversed(order):
            steps = POOLED if pooled else OURS if name.startswith("ours") else PEER
            answers = worker.ask(kind=kind, steps=steps)
            made[name].append(steps * LOOKUPS / max(a["seconds"] for a in answers))
            made[f"{name} cpu"].append(steps * LOOKUPS / sum(a["cpu_seconds"] for a in answers))
        for ranks in (1, 2):
            answers = workers[f"ours {ranks}"].ask(kind=kind, gather=OURS)
            made[f"gather {ranks}"].append(OURS * LOOKUPS / max(a["seconds"] for a in answers))
    return made


def beside_peer(
    workers: Mapping[str, Worker], speeds: Speeds, kind: str, ranks: int, *, pooled: bool = False
) -> Row:
    """One row: ours beside the better of the peer's two ways.

    `memory_share`: of the lookups a second that would be reached if a step were nothing but reading its
    rows at random and writing them back as quickly.
    """
    middle = {name: statistics.median(found) for name, found in speeds.items()}
    value = middle[f"ours {ranks}"]
    peers = {name: middle[f"{name} {ranks}"] for name in ("plain", "dedup") if f"{name} {ranks}" in middle}
    given = {
        "threads_a_rank": 1, "ranks": ranks, "rounds": len(speeds["ours 1"]), "optimizer": "row-wise adagrad",
        "gather_rows/s": round(middle[f"gather {ranks}"]), "wire": workers[f"ours {ranks}"].ready["wire"],
        "memory_share": round(value / (middle[f"gather {ranks}"] / 2), 3),
        "runs": [round(speed) for speed in speeds[f"ours {ranks}"]],
        **{f"peer_{name}": round(speed) for name, speed in peers.items()},
        "a_cpu_second": {name: round(middle[f"{name} {ranks} cpu"]) for name in ("ours", *peers)},
    }  # fmt: skip
    if ranks == 2 and "ours 2 gloo" in middle:
        given["over_gloo"] = round(middle["ours 2 gloo"])
    if peers:
        given["peer_versions"] = workers[f"{min(peers)} {ranks}"].ready["versions"]
    return Row(
        name="pooled table" if pooled else "sharded table",
        work=f"1Mx64 {kind} {ranks} rank{'s' * (ranks > 1)}" + " pooled" * pooled,
        metric="lookups/s", value=value, unit="lookups/s", peer="torchrec",
        peer_value=max(peers.values(), default=None),
        given={**given, "bar": 1 if pooled else BARS[kind, ranks]}, seeds=(0,),
    )  # fmt: skip


def scaling(speeds: Speeds, kind: str) -> Iterator[Row]:
    """Two ranks beside one on the same total work; the ratio is the median of each round's own.

    `apart`: the same ratio of two processes that exchange nothing: cores that share memory and caches allow
    no more. On one machine no row crosses a wire, so its type changes little.
    """
    free = statistics.median(two / one for two, one in zip(speeds[APART], speeds["ours 1"]))
    for wire, name in (("f32", "ours 2"), ("bf16", "ours 2 bf16")):
        ratios = [two / one for two, one in zip(speeds[name], speeds["ours 1"])]
        ratio = statistics.median(ratios)
        missed = max(0.0, 1 - ratio / SCALING[wire])
        told = {"missed_by": round(missed, 3), "why": WHY[kind]} if missed else {}
        yield Row(
            name=f"two ranks beside one, {wire} on the wire", work=f"1Mx64 {kind} 2 ranks",
            metric="lookups/s", value=statistics.median(speeds[name]), unit="lookups/s",
            ratio=ratio, seeds=(0,),
            given={"one_rank": round(statistics.median(speeds["ours 1"])), "bar": SCALING[wire],
                   "apart": round(free, 2), **told,
                   "ratios": [round(ratio, 2) for ratio in ratios]},
        )  # fmt: skip


def memory_rows(quick: bool) -> Iterator[Row]:
    """50 M x 64 (2 M with --quick) on two ranks: draw the table, train, write a checkpoint."""
    for dtype in LIMITS_GIB:
        yield memory_row(LARGE // 25 if quick else LARGE, dtype)


def memory_row(rows: int, dtype: str) -> Row:
    """The peak of both processes' resident bytes, pages that they share counted once."""
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as folder:
        with (
            ours(2, rows=rows, dtype=dtype, kinds=["uniform"], batches=8) as worker,
            Peak(worker.pids) as peak,
        ):
            seconds = max(answer["seconds"] for answer in worker.ask(kind="uniform", steps=OURS))
            trained = peak.bytes
            parts = worker.ask(write=folder)
    given = {
        "ranks": 2, "optimizer": "row-wise adagrad", "lookups/s": round(OURS * LOOKUPS / seconds),
        "peak_before_writing": trained, "file_bytes": sum(part["bytes"] for part in parts),
        "write_seconds": round(max(part["seconds"] for part in parts), 1),
    }  # fmt: skip
    limit = LIMITS_GIB[dtype] * 2**30 if rows == LARGE else None
    return Row(
        name=f"train and write a large table, {dtype}", work=f"{rows // 10**6}Mx64 uniform 2 ranks",
        metric="bytes", value=peak.bytes, unit="bytes", ratio=limit and limit / peak.bytes, seeds=(0,),
        given={**given, "limit_gib": limit and LIMITS_GIB[dtype]},
    )  # fmt: skip


class Peak:
    """The largest sum of some processes' proportional set sizes while the block runs, looked at 4 times a
    second: each page counts once, shared among those that map it."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._watched = [Path(f"/proc/{pid}/smaps_rollup") for pid in pids]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            with contextlib.suppress(OSError):  # one has ended
                self.bytes = max(self.bytes, sum(_proportional(file) for file in self._watched))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def _proportional(file: Path) -> int:
    """Bytes."""
    (line,) = (line for line in file.read_text().splitlines() if line.startswith("Pss:"))
    return int(line.split()[1]) * 1024

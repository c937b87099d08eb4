"""Feeding the training: how long a step waits for its batch, and what memory the log takes.

Waiting is measured around `next(batch)`, the step is the model's loss and its gradient: what the loop does
besides would only make the share smaller. Memory is a process of its own that makes every batch of an
epoch, once from mapped files and once from the log decoded into memory.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._sets import ml1m, there
from benchmarks.data import make_log
from benchmarks.rows import Row, usable_cores
from recray.data import feed
from recray.data.dataset import Dataset, open_dataset
from recray.data.prepare import prepare
from recray.models import build_model
from recray.models.base import Catalogue, Model
from recray.recipes import recipe

FULL, QUICK = 20_000_000, 3_000_000  # rows of the large log
TURNS, QUICK_TURNS, STEPS = 5, 2, 200  # turns each way of feeding takes, and steps of one
LIMIT = 0.02  # of a step's time


def feed_rows(quick: bool) -> Iterator[Row]:
    """The share of waiting on ml1m by the recipe sasrec, then the peak memory of feeding a large log."""
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        if there("ml1m"):
            yield waiting(ml1m(Path(scratch) / "ml1m"), QUICK_TURNS if quick else TURNS)
        yield from memory(Path(scratch), QUICK if quick else FULL)


def waiting(data: Dataset, turns: int) -> Row:
    """Seconds waited in STEPS steps with the batches made ahead by a thread, beside made when asked for."""
    asked = recipe("sasrec")
    model = build_model(asked.model, Catalogue(data.n_items, data.context_sizes), asked.options)
    model.train()
    size = asked.train.batch_size
    ways: dict[str, Callable[[Iterator[Any]], Iterator[Any]]] = {"ahead": feed.Prefetched, "asked": iter}
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    data.histories("train")  # decoded once a run, and not by a step
    _profile(model, model.batches(data, batch_size=size, epoch=0, seed=0, rank=0, world=1))  # warm-up
    for turn in range(turns):
        for way, wrap in ways.items():
            made = model.batches(data, batch_size=size, epoch=turn, seed=0, rank=0, world=1)
            found[way].append(_profile(model, wrap(made)))
    shares = {way: [waited / (waited + worked) for waited, worked in runs] for way, runs in found.items()}
    seconds = {way: statistics.median(waited for waited, _ in runs) for way, runs in found.items()}
    step = statistics.median(worked / STEPS for _, worked in found["ahead"])
    share = statistics.median(shares["ahead"])
    given = {
        "share": round(share, 5), "limit": LIMIT, "kept": share <= LIMIT, "steps": STEPS, "batch": size,
        "share_without_thread": round(statistics.median(shares["asked"]), 5), "turns": turns,
        "shares": [round(s, 5) for s in shares["ahead"]], "step_ms": round(step * 1e3, 2),
        "threads": usable_cores(),
    }  # fmt: skip
    return Row(
        name="sasrec waits for its batches", work="ml1m", metric="seconds", value=seconds["ahead"],
        unit=f"s waited in {STEPS} steps", peer="no thread", peer_value=seconds["asked"], given=given,
        seeds=[0],
    )  # fmt: skip


def _profile(model: Model, batches: Iterator[Any]) -> tuple[float, float]:
    """(seconds waited, seconds worked) of STEPS steps, the first batch of the epoch included."""
    waited = worked = 0.0
    for _ in range(STEPS):
        start = time.perf_counter()
        batch = next(batches)
        got = time.perf_counter()
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
        done = time.perf_counter()
        model.zero_grad()
        waited, worked = waited + got - start, worked + done - got
    batches.close()  # type: ignore[attr-defined]
    return waited, worked


def memory(folder: Path, rows: int) -> Iterator[Row]:
    """Peak resident bytes of making an epoch's batches, the first time and when the files are there."""
    make_log(folder, rows)
    prepare(folder / "log.parquet", out=folder / "big")
    for log in folder.glob("log.*"):
        log.unlink()
    held, first, again = (_run(way, folder / "big") for way in ("held", "mapped", "mapped"))
    for name, run in (("the first time", first), ("the files there", again)):
        given = {
            "share": round(run["peak"] / held["peak"], 3), "idle_bytes": run["idle"],
            "private_bytes": run["private"], "peer_private_bytes": held["private"], "batches": run["batches"],
            "open_seconds": round(run["open_s"], 2), "peer_open_seconds": round(held["open_s"], 2),
            "batch_ms": round(run["batch_ms"], 3), "peer_batch_ms": round(held["batch_ms"], 3),
        }  # fmt: skip
        yield Row(
            name=f"feeding a log, {name}", work=f"{rows // 10**6}M rows", metric="bytes", value=run["peak"],
            unit="bytes at the peak", peer="log in memory", peer_value=held["peak"], given=given, seeds=[0],
        )  # fmt: skip


def _run(way: str, dataset: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks._feed", way, str(dataset)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(way: str, dataset: str) -> dict[str, float]:
    """In a process of its own: bytes at the peak, idle and private at the end, and how long it took."""
    import os

    from recray.data.batches import Negatives, sequence_batches

    feed.SMALL = 1 << 60 if way == "held" else 0
    os.environ["XDG_CACHE_HOME"] = f"{dataset}-cache"
    data = open_dataset(dataset)
    idle, start = _status("VmRSS"), time.perf_counter()
    histories = feed.histories(data)
    opened = time.perf_counter()
    made = sequence_batches(
        histories, data.n_items, max_len=50, batch_size=256, epoch=1, seed=0,
        negatives=Negatives(256, "popularity"),
    )  # fmt: skip
    batches = sum(1 for _ in made)
    each = (time.perf_counter() - opened) / batches * 1e3
    return {
        "peak": _status("VmHWM"), "idle": idle, "private": _status("RssAnon"), "batches": batches,
        "open_s": opened - start, "batch_ms": each,
    }  # fmt: skip


def _status(name: str) -> int:
    """Bytes, of /proc: unlike getrusage's, the peak there is not the parent's before this one began."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))

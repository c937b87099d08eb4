"""The measured process: `python -m recray.tuning.probe`, an order as JSON on standard input.

It pins itself, opens what it is told to, answers one request at a time, and writes one JSON file.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recray.storage import write_file
from recray.tuning.latency import Effort, interval_of_p99

BLOCK = 100  # requests between two collections of garbage; noise is taken to last about as long
Ask = Callable[[int], object]


def main() -> None:
    """Read the order, measure, leave the result; an error is left as one line."""
    order = json.load(sys.stdin)
    if order["core"] is not None:
        os.sched_setaffinity(0, {order["core"]})
    try:
        _set_threads(order["effort"]["threads"])
        module, _, name = order["call"].partition(":")
        ask, n = getattr(importlib.import_module(module), name)(**order["arguments"])
        found = timed(ask, n, Effort(**order["effort"]), parent=order["parent"])
    except Exception as error:
        text = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {text[0][:300] if text else 'no words'}"}
    write_file(Path(order["result"]), json.dumps(found).encode())


def timed(ask: Ask, n: int, effort: Effort, *, parent: int | None = None) -> dict[str, Any]:
    """Ask the n requests in turn until the interval is narrow or the cap is reached.

    Returns the fields of `latency.Measurement`. Garbage collection runs between blocks, not in them:
    a server that cares freezes its heap too, and what is left of it would be this process's own.
    Ends the process when its parent is gone.
    """
    if n < 1:
        raise ValueError("there is nothing to ask")
    for i in range(effort.warmup):
        ask(i % n)
    gc.collect()
    gc.freeze()
    blocks: list[NDArray[np.float64]] = []
    done, wall, cpu = 0, 0.0, 0.0
    look = float(effort.least)  # so many requests before the interval is looked at (again)
    while True:
        gc.disable()
        start, worked = time.perf_counter(), time.process_time()
        times = np.empty(BLOCK)
        for j in range(BLOCK):
            before = time.perf_counter_ns()
            ask((done + j) % n)
            times[j] = (time.perf_counter_ns() - before) * 1e-9
        cpu += time.process_time() - worked
        wall += time.perf_counter() - start
        gc.enable()
        gc.collect(0)
        blocks.append(times)
        done += BLOCK
        if parent is not None and os.getppid() != parent:
            sys.exit("the search that asked for this measurement is gone")
        over = wall >= effort.seconds or done >= effort.most
        if done >= look or over:
            look = done * 1.2
            low, high = interval_of_p99(blocks)
            p99 = float(np.percentile(np.concatenate(blocks), 99))
            if over or high - low <= effort.width * p99:
                break
    p50, p95 = (float(x) for x in np.percentile(np.concatenate(blocks), [50, 95]))
    return {
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "low": low,
        "high": high,
        "narrow": high - low <= effort.width * p99,
        "cpu": round(min(cpu / wall, 1.0), 4),
        "repeats": done,
        "seconds": round(wall, 3),
    }


def bundle_requests(bundle: str, requests: str, k: int) -> tuple[Ask, int]:
    """Requests to an opened bundle, one user at a time, as a replica answers them.

    requests: a JSON file, a list of {"history": item ids, "context": column -> value}.
    """
    from recray.bundles.bundle import open_bundle

    opened = open_bundle(bundle)
    asked: list[Mapping[str, Any]] = json.loads(Path(requests).read_bytes())

    def ask(i: int) -> object:
        return opened.recommend(history=asked[i]["history"], k=k, context=asked[i]["context"])

    return ask, len(asked)


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


if __name__ == "__main__":
    main()

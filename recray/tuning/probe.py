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
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recray.storage import write_file
from recray.tuning.latency import Effort, interval_of_p99, quiet_core

if TYPE_CHECKING:
    from recray.bundles.bundle import Bundle

BLOCK = 100  # requests between two collections of garbage; noise is taken to last about as long
Ask = Callable[[int], object]
Spent = dict[str, list[float]]
"""stage -> seconds, one entry a request"""


def main() -> None:
    """Read the order, measure, leave the result; an error is left as one line."""
    order = json.load(sys.stdin)
    if order["core"] is not None:
        os.sched_setaffinity(0, {order["core"]})
    try:
        _set_threads(order["effort"]["threads"])
        module, _, name = order["call"].partition(":")
        ask, n, *stages = getattr(importlib.import_module(module), name)(**order["arguments"])
        spent = stages[0] if stages else None
        found = timed(ask, n, Effort(**order["effort"]), parent=order["parent"], spent=spent)
    except Exception as error:
        text = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {text[0][:300] if text else 'no words'}"}
    write_file(Path(order["result"]), json.dumps(found).encode())


def timed(
    ask: Ask, n: int, effort: Effort, *, parent: int | None = None, spent: Spent | None = None
) -> dict[str, Any]:
    """Ask the n requests in turn until the interval is narrow or the cap is reached.

    Under a load (`effort.rate`) what is told are the times from arrival to answer: requests that come at
    random wait for those before them (`queued`). spent: see `Spent`; cleared after the warm-up.

    Returns the fields of `latency.Measurement`. Garbage collection runs between blocks, not in them:
    a server that cares freezes its heap too, and what is left of it would be this process's own.
    Ends the process when its parent is gone.
    """
    if n < 1:
        raise ValueError("there is nothing to ask")
    for i in range(effort.warmup):
        ask(i % n)
    for stage in (spent or {}).values():
        stage.clear()
    gc.collect()
    gc.freeze()
    blocks: list[NDArray[np.float64]] = []
    answered: list[NDArray[np.float64]] = []  # the same under the load
    line = Line(effort)
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
        answered.append(line.queued(times))
        done += BLOCK
        if parent is not None and os.getppid() != parent:
            sys.exit("the search that asked for this measurement is gone")
        over = wall >= effort.seconds or done >= effort.most
        if done >= look or over:
            look = done * 1.2
            low, high = interval_of_p99(answered)
            p99 = float(np.percentile(np.concatenate(answered), 99))
            if over or high - low <= effort.width * p99:
                break
    gc.unfreeze()
    p50, p95 = (float(x) for x in np.percentile(np.concatenate(answered), [50, 95]))
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
        "mean": float(np.concatenate(blocks).mean()),
        "stages": {} if spent is None else _stages(spent, np.concatenate(blocks)),
    }


class Line:
    """Requests that arrive at random, `effort.rate` a second, at one server that takes them in turn.

    The time from arrival to answer follows from the times that answering took (Lindley 1952): who comes
    waits for what is left of those before. Seeded, so that plans are compared under the same arrivals.
    """

    def __init__(self, effort: Effort) -> None:
        self._effort, self._left = effort, 0.0
        self._draw = np.random.default_rng(0)

    def queued(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64[n] of answering n more requests -> from arrival to answer; the same without a load."""
        if not self._effort.rate:
            return times
        made = np.empty_like(times)
        for i, gap in enumerate(self._draw.exponential(1 / self._effort.rate, len(times))):
            wait = max(0.0, self._left - gap)
            made[i] = wait + times[i]
            self._left = made[i] + self._effort.beside
        return made


def _stages(spent: Spent, whole: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    """p50 and p99 of each stage, and of the rest of the request."""
    times = {name: np.array(seconds) for name, seconds in spent.items()}
    times["rest"] = np.maximum(whole - np.sum(list(times.values()), axis=0), 1e-7)
    found = {}
    for name, seconds in times.items():
        p50, p99 = (float(x) for x in np.percentile(seconds, [50, 99]))
        found[name] = {"p50": p50, "p99": p99}
    return found


def bundle_requests(bundle: str, requests: str, k: int) -> tuple[Ask, int, Spent]:
    """Requests to an opened bundle, one user at a time, as a replica answers them.

    requests: a JSON file, a list of {"history": item ids, "context": column -> value}.
    """
    from recray.bundles.bundle import open_bundle

    return asked_in_turn(open_bundle(bundle), requests, k)


def asked_in_turn(opened: Bundle, requests: str, k: int) -> tuple[Ask, int, Spent]:
    """The same of a bundle that is open. Its recommender is told to note what its stages take."""
    asked: list[Mapping[str, Any]] = json.loads(Path(requests).read_bytes())

    recommender = opened.recommender
    now = {"search": 0.0}  # seconds of the request that is answered now
    if recommender.index is None:
        _noted(recommender, "_scanned", now, "search")
    else:
        _noted(recommender, "_encode", now, "encode")
        _noted(recommender.index, "search_without", now, "search")
    if recommender.ranker is not None and recommender.blend < 1:
        _noted(recommender, "_score", now, "rank")
    spent: Spent = {stage: [] for stage in now}

    def ask(i: int) -> object:
        now.update(dict.fromkeys(now, 0.0))
        answer = opened.recommend(history=asked[i]["history"], k=k, context=asked[i]["context"])
        for stage, seconds in now.items():
            spent[stage].append(seconds)
        return answer

    return ask, len(asked), spent


def _noted(thing: object, name: str, now: dict[str, float], stage: str) -> None:
    """Let a method of this one object add what each call takes to its stage."""
    method = getattr(thing, name)
    now[stage] = 0.0

    def call(*given: Any, **named: Any) -> Any:
        start = time.perf_counter()
        found = method(*given, **named)
        now[stage] += time.perf_counter() - start
        return found

    setattr(thing, name, call)


def measured_here(opened: Bundle, requests: str, k: int, effort: Effort) -> dict[str, Any]:
    """`timed` in this process, pinned for as long, without a child: for parts, that are put together."""
    core = quiet_core()
    before = os.sched_getaffinity(0) if core is not None else None
    try:
        if core is not None:
            os.sched_setaffinity(0, {core})
        ask, n, spent = asked_in_turn(opened, requests, k)
        return timed(ask, n, effort, spent=spent)
    finally:
        if before is not None:
            os.sched_setaffinity(0, before)


def _set_threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


if __name__ == "__main__":
    main()

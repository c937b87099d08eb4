"""What this machine can do: how quickly a rank here would work.

Every rate is the best of a few short runs, measured with what a step is made of: a plan is for a machine
that does nothing else.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable

import torch

from recray.memory import free_memory
from recray.training.layout import Layout
from recray.training.plan import Machine
from recray.training.routing import distinct

_COPIES = 4  # a byte between two ranks of one machine is written, read, written and read (wire.py)
_LATENCY = 50e-6  # seconds a message between them
_ROWS, _DIM = 1 << 19, 64  # a table of 128 MiB: beyond the caches
_IDS = 1 << 15


def measured_machine(*, memory: int | None = None, shared_by: int = 1) -> Machine:
    """One rank's machine: this one, or one of `shared_by` ranks that share its memory and its cores.

    `memory` in bytes is what each rank may use; by default its share of what is free here. Measures for
    about half a second, once a process. Ranks that share a machine talk through its memory.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bandwidth, row_s, id_s, flops, call_s = _rates(max(1, cores // shared_by))
    return Machine(
        memory=free_memory() // shared_by if memory is None else memory,
        bandwidth=bandwidth,
        row_s=row_s,
        id_s=id_s,
        flops=flops,
        call_s=call_s,
        **({"wire": bandwidth / _COPIES, "latency": _LATENCY} if shared_by > 1 else {}),
    )


@functools.cache
def _rates(threads: int) -> tuple[float, float, float, float, float]:
    """Bandwidth (bytes/s), seconds a random row, an id, flops/s, seconds a call: with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        table = torch.ones(_ROWS, _DIM)
        order = torch.randperm(_ROWS, generator=generator)
        cold = itertools.cycle(order.view(-1, _IDS).unbind())  # rows that are in no cache any more
        stream, copy = table.chunk(2)
        bandwidth = 2 * stream.nbytes / _best(lambda: copy.copy_(stream))
        row_s = _best(lambda: torch.nn.functional.embedding(next(cold), table)) / _IDS
        layout = Layout(_ROWS)
        square = torch.ones(512, 512)
        one = torch.ones(1)
        return (
            bandwidth,
            max(1e-9, row_s - 8 * _DIM / bandwidth),
            _best(lambda: distinct(layout.positions(next(cold)))) / _IDS,
            2 * 512**3 / _best(lambda: square @ square),
            _best(lambda: [one + one for _ in range(100)]) / 100,
        )
    finally:
        torch.set_num_threads(before)


def _best(run: Callable[[], object], seconds: float = 0.1) -> float:
    """The shortest of several runs, which take about so long together."""
    run()
    found, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        run()
        found = min(found, time.perf_counter() - start)
    return found

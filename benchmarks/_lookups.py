"""The work of the table benchmark, the same for ours and the peer: ids, upstream gradients, the clock.

A step looks up `samples` x `per` ids of a table, is given the gradient of what it found, and updates the
touched rows by row-wise Adagrad. The ranks share the samples of a step, so the work does not grow with
them. Each step has other ids than the one before: a list of them is made ahead and walked in a circle.

Shapes: n lookups of this rank in a step, D dims.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._process import Answer

KINDS = ("uniform", "zipf")
ZIPF = 1.05  # exponent: the k-th most popular row is asked for in proportion to k ** -ZIPF
START = 0.01  # every number of a table before the first step, on both sides, so that they can be compared
WARM_UP = 3  # steps


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank does. `store`: a file through which the ranks meet; wire, transport, dtype:
    ours only; dedup: TorchRec only, since ours always does."""

    rank: int = 0
    ranks: int = 1
    store: str = ""
    rows: int = 1_000_000
    dim: int = 64
    samples: int = 2048
    per: int = 20
    batches: int = 30
    kinds: tuple[str, ...] = KINDS
    pooled: bool = False
    lr: float = 0.01
    dedup: bool = False
    wire: str = "f32"
    transport: str = "auto"  # shared memory where the ranks share a machine; or "gloo"
    dtype: str = "f32"
    device: str = "cpu"

    @staticmethod
    def told() -> Work:
        """From the command line. The process has one thread from then on."""
        torch.set_num_threads(1)
        said = json.loads(sys.argv[1])
        return Work(**{**said, "kinds": tuple(said.get("kinds", KINDS))})

    @property
    def share(self) -> slice:
        """This rank's samples of a step."""
        return slice(self.samples * self.rank // self.ranks, self.samples * (self.rank + 1) // self.ranks)

    def ids(self, kind: str) -> list[Tensor]:
        """int64[samples of this rank, per] of each batch; the popular rows are scattered over the table."""
        rng = np.random.default_rng(0)
        shape = (self.batches, self.samples, self.per)
        if kind == "uniform":
            made = rng.integers(self.rows, size=shape)
        else:
            mass = np.cumsum(np.arange(1, self.rows + 1) ** -ZIPF)
            rank = np.searchsorted(mass, rng.random(shape) * mass[-1])
            made = rng.permutation(self.rows)[np.minimum(rank, self.rows - 1)]
        mine = [torch.from_numpy(np.ascontiguousarray(batch[self.share])) for batch in made]
        return [ids.to(self.device) for ids in mine]

    def gradient(self) -> Tensor:
        """float32[n, D] of what is looked up, or [samples of this rank, D] of what is pooled."""
        rng = np.random.default_rng(1)
        shape = (self.samples, self.dim) if self.pooled else (self.samples, self.per, self.dim)
        drawn = rng.standard_normal(shape, np.float32)[self.share]
        return torch.from_numpy(np.ascontiguousarray(drawn.reshape(-1, self.dim))).to(self.device)


class Lookups:
    """Answers of one side. `prepare`: ids -> what `step` and `read` take, made before the clock runs.

    {"kind", "steps"}    train on so many batches -> {"seconds", "cpu_seconds"}
    {"kind", "gather"}   only read the rows of so many batches out of a plain tensor -> {"seconds"}
    {"kind", "check"}    -> {"sum"}: of what the first batch now finds
    """

    def __init__(
        self,
        work: Work,
        prepare: Callable[[Tensor], Any],
        step: Callable[[Any], object],
        read: Callable[[Any], Tensor],
    ) -> None:
        self.ids = {kind: work.ids(kind) for kind in work.kinds}
        self.inputs = {kind: [prepare(ids) for ids in batches] for kind, batches in self.ids.items()}
        self.step, self.read, self.at, self.work = step, read, 0, work
        for kind in work.kinds:
            self(kind, WARM_UP)

    def __call__(self, kind: str, steps: int = 0, gather: int = 0, check: bool = False) -> Answer:
        if check:
            with torch.no_grad():
                return {"sum": float(self.read(self.inputs[kind][0]).double().sum())}
        if gather:
            return {"seconds": self._gather(kind, gather)}
        batches = self.inputs[kind]
        meet(self.work)
        started, cpu = time.perf_counter(), time.process_time()
        for number in range(self.at, self.at + steps):
            self.step(batches[number % len(batches)])
        self.at += steps
        finish(self.work)
        return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}

    def _gather(self, kind: str, steps: int) -> float:
        """The memory's own speed: the same rows at random out of a tensor of this rank's size."""
        rows = -(-self.work.rows // self.work.ranks)
        weight_ND = torch.full((rows, self.work.dim), START, device=self.work.device)
        flat = [ids.flatten() % rows for ids in self.ids[kind]]
        torch.nn.functional.embedding(flat[0], weight_ND)
        meet(self.work)
        started = time.perf_counter()
        for number in range(steps):
            torch.nn.functional.embedding(flat[number % len(flat)], weight_ND)
        finish(self.work)
        return time.perf_counter() - started


def finish(work: Work) -> None:
    """Wait for what a GPU was told to do."""
    if work.device != "cpu":
        torch.cuda.synchronize()


def meet(work: Work) -> None:
    """Nobody goes on before all ranks are here."""
    finish(work)
    if work.ranks > 1:
        torch.distributed.barrier()


def join(work: Work) -> None:
    """Make the process group of the ranks, by gloo."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{work.store}", rank=work.rank, world_size=work.ranks
    )

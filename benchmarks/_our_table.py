"""Our sharded table, a process a rank: `python -m benchmarks._our_table WORK`, as `_torchrec_peer`.

Besides the answers of `_lookups`: {"write": FOLDER} -> {"seconds"}: this rank's part of a checkpoint.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._lookups import START, Lookups, Work, join, meet
from benchmarks._process import Answer, serve
from recray.models.embeddings import DenseTable, unallocated_tables
from recray.training.heap import keep_freed_memory
from recray.training.row_files import file_name, write_rows
from recray.training.row_update import RowOptimizer
from recray.training.sharding import ShardedTable
from recray.training.tables import make_table
from recray.training.wire import GroupWire, make_wire

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def open_table(work: Work) -> ShardedTable:
    """This rank's rows."""
    device = torch.device(work.device)
    keep_freed_memory()
    if work.ranks > 1:
        join(work)
    with unallocated_tables():
        plain = DenseTable(work.rows, work.dim)
    table = make_table(
        plain,
        "item",
        GroupWire(device) if work.transport == "gloo" else make_wire(device),
        RowOptimizer("adagrad"),
        dtype=TYPES[work.dtype],
        wire_dtype=TYPES[work.wire],
        device=device,
    )
    table.weight.fill_(START)
    return table


class Ours(Lookups):
    """The answers of our side."""

    def __init__(self, work: Work) -> None:
        self.table, self.grad = open_table(work), work.gradient()
        super().__init__(work, lambda ids: ids, self._step, self._read)

    # THE TWO PLACES WHERE OUR TABLE IS USED -----------------------------------------------------------
    def _read(self, ids: Tensor) -> Tensor:
        found: Tensor = self.table(ids)
        return found.sum(1) if self.work.pooled else found.view(-1, self.work.dim)

    def _step(self, ids: Tensor) -> None:
        self._read(ids).backward(self.grad)  # type: ignore[no-untyped-call]
        self.table.step(self.work.lr)

    # --------------------------------------------------------------------------------------------------
    def __call__(
        self, kind: str = "", steps: int = 0, gather: int = 0, check: bool = False, write: str = ""
    ) -> Answer:
        if not write:
            return super().__call__(kind, steps, gather, check)
        meet(self.work)
        started = time.perf_counter()
        table = self.table
        path = Path(write) / file_name(table.name, table.start, table.stop)
        write_rows(path, {"weight": table.weight, **table.slots})
        return {"seconds": time.perf_counter() - started, "bytes": path.stat().st_size}


def start() -> tuple[Answer, Ours]:
    """The table of one rank."""
    ours = Ours(Work.told())
    return {"wire": type(ours.table.wire).__name__}, ours


if __name__ == "__main__":
    serve(start)

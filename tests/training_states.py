"""States of made-up tables as the ranks of a run write them, and ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recray.training.checkpoint import (
    EpochReport,
    Gather,
    Position,
    State,
    TableRows,
    open_state,
)
from recray.training.layout import Layout

Table = dict[str, Tensor]  # all positions: "weight" and slots
IDENTITY = {"recipe": "a" * 64, "code version": "0.2", "dataset": "b" * 64}
SLOTS = ((), ("sum",), ("m", "v", "steps"))


def quickly() -> Iterator[None]:
    """On tensors this small a second thread is only waited for; so is the disk."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield
    torch.set_num_threads(threads)


class Meeting:
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.said, self.barrier = [b""] * world, threading.Barrier(world, timeout=30)

    def gather(self, rank: int, message: bytes) -> list[bytes]:
        self.said[rank] = message
        self.barrier.wait()
        told = list(self.said)
        self.barrier.wait()
        assert len({len(each) for each in told}) == 1
        return told


def on_ranks(world: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    """What `work(rank, gather)` gives on each rank, or the exception it ends with."""
    meeting = Meeting(world)

    def run(rank: int) -> Any:
        try:
            return work(rank, lambda message: meeting.gather(rank, message))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def table(
    num_rows: int, dim: int, dtype: torch.dtype = torch.float32, slots: tuple[str, ...] = ("sum",)
) -> Table:
    made = {"weight": torch.randn(num_rows, dim).to(dtype)}
    return made | {slot: torch.randn(num_rows, *([dim] if slot == "m" else [])) for slot in slots}


def state(
    tables: Mapping[str, Table], position: Position, world: int = 1, rank: int = 0, **more: Any
) -> State:
    """One rank's state; the dense part says the epoch."""
    rows = {}
    for name, tensors in tables.items():
        num_rows, dim = tensors["weight"].shape
        start, stop = Layout(num_rows, world).bounds(rank)
        mine = {key: value[start:stop].clone() for key, value in tensors.items()}
        rows[name] = TableRows(num_rows, dim, start, stop, mine)
    dense = {"layer.weight": torch.full((2, 3), float(position.epoch)), "seen": torch.tensor(position.step)}
    return State(position, dense, {"0.step": torch.tensor(1.5)}, rows, IDENTITY, rank, **more)


def position(*values: float | None) -> Position:
    """After one epoch of three steps for each of `values`, the validation metric."""
    at = Position(seed=3)
    for number, value in enumerate(values, start=1):
        best = value is not None and (at.best_value is None or value > at.best_value)
        report = EpochReport(
            epoch=number,
            loss=1 / 3,
            metric="ndcg@10",
            value=value,
            best=best,
            seconds=1,
            batches=6,
            step=3 * number,
        )
        at = at.after(report)
    return at


def read(folder: Path, name: str, world: int, rank: int, like: Table) -> Table:
    """A rank's share of a table."""
    start, stop = Layout(len(like["weight"]), world).bounds(rank)
    into = {key: torch.full_like(value[start:stop], -1) for key, value in like.items()}
    open_state(folder, IDENTITY).rows(name, start, stop, into)
    return into


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())

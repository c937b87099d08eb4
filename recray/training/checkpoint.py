"""The state of a training run on disk: enough to go on as if nothing had happened, at any world size.

    state.json                                  position, history, what wrote it, sha256 of the rest
    dense.safetensors                           every weight and buffer that is not in a table
    optimizer.safetensors                       "<parameter>.<slot>" of the dense part
    table-<name>-<start>-<stop>.safetensors     positions of a table: "weight" and its slots

Every rank writes its rows, rank 0 the rest, and `state.json` when all of it is there: a folder without
one is no state. There is no generator to keep: the loop seeds torch and the batches anew for each
(seed, epoch, rank), so a position is the number of the epoch and of the batches done in it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recray.errors import ArtefactError, RecrayError
from recray.manifest import digest
from recray.training import row_files
from recray.training.row_files import FRESH

STATE = "state.json"
DENSE = "dense.safetensors"
OPTIMIZER = "optimizer.safetensors"
FORMAT = 1
_TOLD = struct.Struct("<qq32s")  # what a rank tells of a file: start, stop, sha256
_FOLDER = re.compile(r"state-(\d+)-(\d+)")
Gather = Callable[[bytes], list[bytes]]


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """What one epoch gave. `value` is the validation metric, None without a validation split."""

    epoch: int  # counted from 1
    loss: float
    metric: str
    value: float | None
    best: bool
    seconds: float
    batches: int
    step: int = 0  # optimizer steps of the run when it ended
    step_s: float = 0.0  # seconds of an optimizer step in the mean, without the validation
    waited: float = 0.0  # share of the time of its batches that was spent waiting for data


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    batch: int = 0  # batches done of the epoch in progress
    loss_sum: float = 0.0  # of those batches
    best_epoch: int = 0  # 0 = none measured yet
    best_value: float | None = None
    seed: int = 0
    history: tuple[EpochReport, ...] = field(default_factory=tuple)

    def after(self, report: EpochReport) -> Position:
        """The position once `report`'s epoch is done."""
        done = dataclasses.replace(
            self, epoch=report.epoch, step=report.step, batch=0, loss_sum=0.0, history=(*self.history, report)
        )
        if not report.best:
            return done
        return dataclasses.replace(done, best_epoch=report.epoch, best_value=report.value)

    def exhausted(self, epochs: int, patience: int) -> bool:
        """Whether training ends here: all epochs done, or `patience` of them without a better one."""
        waited = self.epoch - self.best_epoch
        return self.epoch >= epochs or bool(patience and self.best_epoch and waited >= patience)

    @property
    def loss_mean(self) -> float:
        """Of the batches done of the epoch in progress; NaN where there is none."""
        return self.loss_sum / self.batch if self.batch else math.nan

    @property
    def folder(self) -> str:
        """The name of this position's state in a run's folder."""
        return f"state-{self.epoch:05d}-{self.step:08d}"

    @property
    def best_folder(self) -> str:
        """The name of the state whose weights a finished run leaves: the best epoch's, or this one."""
        if not self.best_epoch:
            return self.folder
        best = self.history[self.best_epoch - 1]
        return dataclasses.replace(self, epoch=best.epoch, step=best.step).folder


@dataclass(frozen=True)
class TableRows:
    """One rank's share of a table: the positions [start, stop) of `num_rows` (`layout.py` has the rows).

    `tensors` are the live ones, not copies: "weight" [stop - start, D] and slots [stop - start, ...].
    """

    num_rows: int
    dim: int
    start: int
    stop: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if any(len(tensor) != self.stop - self.start for tensor in self.tensors.values()):
            raise ValueError(f"not all tensors have the rows of positions {self.start} to {self.stop}")


@dataclass(frozen=True)
class State:
    """A position with the live tensors of one rank. Whatever is called here, all ranks call.

    `gather(message)` gives the messages of all ranks, equally long, in order of ranks. `identity` says
    what wrote the state (such as "recipe", "code version" and "dataset": hashes or versions).
    """

    position: Position
    dense: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    tables: Mapping[str, TableRows]
    identity: Mapping[str, str] = field(default_factory=dict)
    rank: int = 0
    gather: Gather = lambda message: [message]

    def save(self, run: Path) -> Path:
        """Write aside, rename to `run/<position.folder>`, remove what is not needed any more.

        For ranks that share `run`. This state stays and the best epoch's; what a write that died left
        goes. Gives the folder. Raises OSError on a rank that cannot write and RecrayError on the others;
        the states before are then as they were.
        """
        goal = run / self.position.folder
        scratch = _aside(goal)
        try:
            self._together(lambda: _make_way(run, scratch), first_only=True)
            self.write(scratch)
            self._together(lambda: _publish(scratch, goal, self.position.best_folder), first_only=True)
        finally:
            if self.rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
        return goal

    def write(self, folder: Path) -> None:
        """Write this rank's files into an existing folder, which it may share with other ranks.

        Rank 0's gets `state.json` once the files of all ranks are on disk. Raises as `save` does.
        """
        size = _TOLD.size * (len(self.tables) + 2)
        told = self._together(lambda: self._write_tensors(folder), size)
        self._together(lambda: self._write_json(folder, told), first_only=True)

    def _write_tensors(self, folder: Path) -> bytes:
        """Write this rank's rows and, as rank 0, the dense part; gives what is told of each file."""
        told = []
        for name, table in sorted(self.tables.items()):
            made = ""
            if table.start < table.stop:  # of more ranks than rows the last have none
                path = folder / row_files.file_name(name, table.start, table.stop)
                made = row_files.write_rows(path, table.tensors)
            told.append(_TOLD.pack(table.start, table.stop, bytes.fromhex(made)))
        first = self.rank == 0
        for name, tensors in ((DENSE, self.dense), (OPTIMIZER, self.optimizer)):
            made = row_files.write_rows(folder / name, tensors) if first else ""
            told.append(_TOLD.pack(0, int(first), bytes.fromhex(made)))
        return b"".join(told)

    def _write_json(self, folder: Path, told: list[bytes]) -> None:
        """Write `state.json` from what all ranks told of their files."""
        files = {}
        for message in told:
            for name, (start, stop, made) in zip(
                [*sorted(self.tables), DENSE, OPTIMIZER], _TOLD.iter_unpack(message)
            ):
                if start < stop:
                    path = row_files.file_name(name, start, stop) if name in self.tables else name
                    files[path] = made.hex()
        tables = {}
        for name, table in self.tables.items():
            row_files.parts_of(files, name, table.num_rows, where=folder)
            slots = sorted(set(table.tensors) - {"weight"})
            tables[name] = {"rows": table.num_rows, "dim": table.dim, "slots": slots}
        position, identity = dataclasses.asdict(self.position), dict(self.identity)
        state = {
            "format": FORMAT, "position": position, "identity": identity, "tables": tables, "files": files
        }  # fmt: skip
        with (folder / STATE).open("w") as file:
            json.dump({**state, "checksum": digest(state)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def _together(
        self, work: Callable[[], bytes | None], size: int = 0, *, first_only: bool = False
    ) -> list[bytes]:
        """Do `work` on all ranks, or on rank 0, and give what it gave on each, `size` bytes.

        Where it raises on one rank, it raises on all: none is left waiting for one that is gone.
        """
        failed: Exception | None = None
        message = bytes(1 + size)
        try:
            message = b"\1" + (b"" if first_only and self.rank else work() or b"")
        except Exception as error:
            failed = error
        told = self.gather(message)
        if failed is not None:
            raise failed
        broken = [rank for rank, said in enumerate(told) if said[:1] != b"\1"]
        if broken:
            ranks = ", ".join(map(str, broken))
            raise RecrayError(
                f"rank {ranks} could not write its part of the state", where=self.position.folder
            )
        return [said[1:] for said in told]


@dataclass(frozen=True)
class TableSpec:
    """What a state holds of a table: its rows N, floats D a row, and slots beside "weight"."""

    num_rows: int
    dim: int
    slots: tuple[str, ...]


@dataclass(frozen=True)
class Saved:
    """A state on disk. What is read is compared with the hashes: ArtefactError where it was altered."""

    folder: Path
    position: Position
    tables: Mapping[str, TableSpec]
    files: Mapping[str, str]  # name -> sha256

    def dense(self) -> dict[str, Tensor]:
        """Weights and buffers that are not in tables, by their names in the model."""
        return row_files.read_tensors(self.folder / DENSE, self.files[DENSE])

    def optimizer(self) -> dict[str, Tensor]:
        """Slots of the dense part, for `write_optimizer`."""
        return row_files.read_tensors(self.folder / OPTIMIZER, self.files[OPTIMIZER])

    def rows(self, table: str, start: int, stop: int, into: Mapping[str, Tensor]) -> None:
        """Fill the positions [start, stop) of a table, as `row_files.read_rows` does."""
        row_files.read_rows(self.folder, self.files, table, self._spec(table).num_rows, start, stop, into)

    def weights(self, table: str) -> row_files.Weights:
        """A whole table in order of positions, chunk by chunk."""
        spec = self._spec(table)
        return row_files.read_weights(self.folder, self.files, table, spec.num_rows, spec.dim)

    def _spec(self, table: str) -> TableSpec:
        if table not in self.tables:
            raise ArtefactError(f"has no table {table!r}", where=self.folder, fix=FRESH)
        return self.tables[table]


def open_state(folder: Path, identity: Mapping[str, str] | None = None) -> Saved:
    """Read `state.json`; the tensors stay on disk.

    Raises ArtefactError when it is damaged, lists a file that is not there, or was written by another
    `identity` (None: by whatever).
    """
    try:
        raw = json.loads((folder / STATE).read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"it has format {raw['format']}, this version reads {FORMAT}")
        if raw.pop("checksum") != digest(raw):
            raise ArtefactError("was altered since it was written", where=folder / STATE, fix=FRESH)
        history = tuple(EpochReport(**entry) for entry in raw["position"].pop("history"))
        position = Position(**raw["position"], history=history)
        tables = {
            name: TableSpec(entry["rows"], entry["dim"], tuple(entry["slots"]))
            for name, entry in raw["tables"].items()
        }
        files, wrote = dict(raw["files"]), dict(raw["identity"])
        if not {DENSE, OPTIMIZER} <= set(files) or any("/" in name for name in files):
            raise ValueError("its list of files is not one of a state")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{STATE} cannot be read ({error})", where=folder, fix=FRESH) from None
    if identity is not None and wrote != dict(identity):
        other = [name for name in sorted({*identity, *wrote}) if wrote.get(name) != identity.get(name)]
        raise ArtefactError(f"was written by another {' and another '.join(other)}", where=folder, fix=FRESH)
    for name in files:
        if not (folder / name).is_file():
            raise ArtefactError("is missing", where=folder / name, fix=FRESH)
    for name, spec in tables.items():
        row_files.parts_of(files, name, spec.num_rows, where=folder)
    return Saved(folder, position, tables, files)


def assemble_model(folder: Path, goal: Path) -> None:
    """Write a state's weights to the file `goal` as a model's state_dict, in bounded memory.

    Tables become "tables.<name>.weight", float32[N, D] in order of rows. Raises as `Saved` does; then
    what was written of `goal` is worth nothing.
    """
    saved = open_state(folder)
    tables = {f"tables.{name}.weight": saved.weights(name) for name in saved.tables}
    row_files.write_model(goal, saved.dense(), tables)


def last_state(run: Path) -> Path | None:
    """The newest state that `State.save` left in `run`."""
    found = [(match, path) for path in run.glob("state-*") if (match := _FOLDER.fullmatch(path.name))]
    return max(found, key=lambda each: (int(each[0][1]), int(each[0][2])), default=(None, None))[1]


def best_state(run: Path, position: Position) -> Path:
    """The state whose weights the run leaves, had it ended at `position`."""
    return run / position.best_folder


def read_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's slots as flat tensors, named `<parameter number>.<slot>`."""
    return {
        f"{number}.{slot}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def write_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the slots back; the groups (rates, decay) stay as the recipe made them."""
    slots: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, _, slot = key.partition(".")
        slots.setdefault(int(number), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _aside(goal: Path) -> Path:
    """Where a state lies that is not ready, or not needed any more."""
    return goal.with_name(f".{goal.name}.partial")


def _make_way(run: Path, scratch: Path) -> None:
    """An empty scratch folder; what writes that died left is removed."""
    for left in run.glob(".state-*.partial"):
        shutil.rmtree(left)
    scratch.mkdir()


def _publish(scratch: Path, goal: Path, best: str) -> None:
    """Rename a complete state into place, for good, then remove the states that are not needed."""
    _sync(scratch)
    if goal.exists():  # the run was resumed from an earlier state than its last
        os.rename(goal, _aside(goal.with_name(f"{goal.name}.old")))
    os.rename(scratch, goal)
    _sync(goal.parent)
    for path in goal.parent.iterdir():
        ours = path.match(".state-*.partial") or _FOLDER.fullmatch(path.name)
        if ours and path.name not in (goal.name, best):
            shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Put a folder's names on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""The state of a run after an epoch: enough to go on as if nothing had happened.

A folder of safetensors and one JSON. There is no generator state to keep: the loop seeds torch and
the batches anew for each (seed, epoch, rank), so the position is the epoch's number.

    model.safetensors      weights now            best.safetensors   weights of the best epoch, if another
    optimizer.safetensors  "<parameter>.<slot>"   state.json         position, history, sha256 of the rest
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from recray.errors import ArtefactError
from recray.manifest import sha256

_STATE = "state.json"
_FRESH = "delete the folder to start anew"


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


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimizer steps done
    best_epoch: int = 0  # 0 = none measured yet
    best_value: float | None = None
    seed: int = 0
    history: tuple[EpochReport, ...] = field(default_factory=tuple)

    def after(self, report: EpochReport, step: int) -> Position:
        """The position once `report`'s epoch is done."""
        done = dataclasses.replace(self, epoch=report.epoch, step=step, history=(*self.history, report))
        if not report.best:
            return done
        return dataclasses.replace(done, best_epoch=report.epoch, best_value=report.value)

    def exhausted(self, epochs: int, patience: int) -> bool:
        """Whether training ends here: all epochs done, or `patience` of them without a better one."""
        waited = self.epoch - self.best_epoch
        return self.epoch >= epochs or bool(patience and self.best_epoch and waited >= patience)


@dataclass(frozen=True)
class State:
    """A position with its tensors. `best` is None where the best epoch is the present one."""

    position: Position
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    best: Mapping[str, Tensor] | None = None

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """The weights that a finished run leaves."""
        return self.weights if self.best is None else self.best

    def save(self, run: Path) -> Path:
        """Write aside, rename to `run/state-<epoch>`, then remove the states before; gives the folder."""
        scratch = Path(tempfile.mkdtemp(prefix=".state.", suffix=".partial", dir=run))
        goal = run / f"state-{self.position.epoch:05d}"
        try:
            self.write(scratch)
            shutil.rmtree(goal, ignore_errors=True)
            os.rename(scratch, goal)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for old in run.glob("state-*"):
            if old != goal:
                shutil.rmtree(old, ignore_errors=True)
        return goal

    def write(self, folder: Path) -> None:
        """Write the files into an existing folder."""
        parts = {"model": self.weights, "optimizer": self.optimizer, "best": self.best}
        for name, tensors in parts.items():
            if tensors is not None:
                plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
                save_file(plain, folder / f"{name}.safetensors")
        state = {
            "position": dataclasses.asdict(self.position),
            "files": {p.name: sha256(p) for p in sorted(folder.glob("*.safetensors"))},
        }
        (folder / _STATE).write_text(json.dumps(state, indent=1))


def last_state(run: Path) -> Path | None:
    """The newest state that `State.save` left in `run`."""
    return max(run.glob("state-*"), default=None)


def load_state(folder: Path, *, weights_only: bool = False) -> State:
    """Read a state's folder; `weights_only` leaves the optimizer on disk.

    Raises ArtefactError when a file is missing or altered.
    """
    try:
        raw = json.loads((folder / _STATE).read_text())
        for name, want in raw["files"].items():
            if sha256(folder / name) != want:
                raise ArtefactError("was altered since it was written", where=folder / name, fix=_FRESH)
        tensors = {
            name.removesuffix(".safetensors"): load_file(folder / name)
            for name in raw["files"]
            if not (weights_only and name.startswith("optimizer"))
        }
        history = tuple(EpochReport(**entry) for entry in raw["position"].pop("history"))
        position = Position(**raw["position"], history=history)
        return State(position, tensors["model"], tensors.get("optimizer", {}), tensors.get("best"))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"cannot be read ({error})", where=folder, fix=_FRESH) from None


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

"""Trials and where they are kept: one JSON file each, named by the hash of everything that decides it.

A finished trial is on disk before the search goes on, so a search that was killed repeats none.
The budget is not part of the hash: the same trials serve another budget.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recray.manifest import digest
from recray.progress import warn
from recray.storage import Place, write_file
from recray.tuning.space import Point, Scalar


@dataclass(frozen=True)
class Outcome:
    """What trying a point gave: numbers to search by, and JSON detail that is kept beside them."""

    metrics: Mapping[str, float]
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting that was tried. `error` is one line when it failed; then it has no metrics."""

    hash: str
    number: int  # order of starting in its search, from 1
    point: Mapping[str, Scalar]
    metrics: Mapping[str, float] = field(default_factory=dict)
    detail: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    seconds: float = 0.0


class TrialCache:
    """The folder `place` of trial files; those of other contexts lie beside and are not seen.

    context: what else than the point decides the outcome (hashes of inputs, settings of the
    measurement, versions), as JSON. holds: whether a point is looked for; the others' trials are not seen.
    """

    def __init__(
        self,
        place: Place,
        context: Mapping[str, Any],
        holds: Callable[[Mapping[str, Any]], bool] = lambda point: True,
    ) -> None:
        self.place, self.context, self.holds = place, digest(context), holds

    def hash(self, point: Mapping[str, Scalar]) -> str:
        """The name of a point's trial, 64 hex digits."""
        return digest({"context": self.context, "point": dict(point)})

    def load(self) -> list[Trial]:
        """The finished trials that are seen, oldest number first; damaged files are passed over."""
        found = []
        for name in self._names():
            try:
                raw = json.loads((self.place / name).read_bytes())
                if raw.pop("context") == self.context and raw["error"] is None:
                    found.append(Trial(**raw))
            except (ValueError, TypeError, KeyError, AttributeError, OSError):
                continue  # half a file of a crashed machine is a trial that was not finished
        found = [trial for trial in found if self.holds(trial.point)]
        return sorted(found, key=lambda trial: (trial.number, trial.hash))

    def keep(self, trial: Trial) -> None:
        """Write a finished trial. A disk that is full costs only the chance to resume."""
        try:
            self._write(f"{trial.hash}.json", file_bytes(trial, self.context))
        except OSError as error:
            warn(f"trial {trial.number} cannot be kept for a later run: {error}")

    def _names(self) -> list[str]:
        if not self.place.remote:
            folder = self.place.local
            return [p.name for p in folder.glob("*.json")] if folder.is_dir() else []
        from pyarrow import fs

        entries = self.place.fs.get_file_info(fs.FileSelector(self.place.path, allow_not_found=True))
        return [entry.base_name for entry in entries if entry.base_name.endswith(".json")]

    def _write(self, name: str, data: bytes) -> None:
        if not self.place.remote:
            self.place.local.mkdir(parents=True, exist_ok=True)
            write_file(self.place.local / name, data)
            return
        self.place.fs.create_dir(self.place.path, recursive=True)
        with self.place.fs.open_output_stream((self.place / name).path) as sink:
            sink.write(data)  # an object appears whole or not at all


def file_bytes(trial: Trial, context: str) -> bytes:
    """The content of a trial's file."""
    return json.dumps({**dataclasses.asdict(trial), "context": context}, indent=1).encode()


def words(point: Mapping[str, Scalar], usual: Point | None = None) -> str:
    """A point for people: `codec=int8 candidates=100`, leaving out what is as usual."""
    shown = [f"{k}={v}" for k, v in point.items() if usual is None or k not in usual or usual[k] != v]
    return " ".join(shown) or "as trained"

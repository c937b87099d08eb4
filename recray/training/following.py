"""Between a run's controller and its driver: lines of JSON in a file that only grows. No Ray.

{"workers": 3, "pids": [...]}                a group of workers began
{"epoch": 4, "loss": ..., "workers": 3}      an epoch is whole, and its state kept
{"lost": [1]}                                the workers of these ranks died
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from recray import progress
from recray.connect import VERBOSE
from recray.errors import InputError, RecrayError
from recray.training.checkpoint import EpochReport
from recray.training.loop import epoch_words

Log = Callable[[EpochReport, int], None]  # an epoch and the number of workers that made it

EPOCHS = "epochs.jsonl"
_RESTARTS = 3  # groups that may die, one after the other, without a state between them
_PATIENCE_S = 30.0  # without workers before a person is told what is waited for


class Watch:
    """In the controller: writes the lines, and raises when it is enough.

    That is an error of ours, which trying again will not mend, or one loss too many.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.workers = path, 0
        self.died = 0  # groups, since the last state
        self.unborn = 0  # groups, since the last that found room

    def trying(self, workers: int) -> None:
        """A group of so many is to be started."""
        self.unborn += 1
        if self.unborn > _RESTARTS + 1:
            raise InputError(
                f"{_workers(workers)} found no room on the cluster in {self.unborn - 1} tries",
                fix="ask for fewer --workers, or stop what else runs there",
            )

    def started(self, pids: list[int]) -> None:
        """A group is at work in these processes."""
        self.unborn, self.workers = 0, len(pids)
        self._tell({"workers": len(pids), "pids": pids})

    def kept(self, metrics: Mapping[str, Any]) -> None:
        """A state lies in the storage."""
        self.died = 0
        if not metrics.get("partial"):
            self._tell({**metrics, "workers": self.workers})

    def lost(self, errors: Mapping[int, Exception]) -> None:
        """These ranks ended in an error."""
        ours = [error for error in errors.values() if isinstance(error, RecrayError)]
        if ours:
            raise max(ours, key=lambda error: bool(error.fix))  # one that knows what to do
        self._tell({"lost": sorted(errors)})
        self.died += 1
        if self.died > _RESTARTS:
            first = next(iter(errors.values()))
            what = (str(first).strip().splitlines() or [""])[0]
            raise RecrayError(
                f"training gave up after {_RESTARTS} restarts ({type(first).__name__}: {what})",
                fix=f"run it again to go on; {VERBOSE}=1 shows the workers' words",
            )

    def _tell(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Told:
    """In the driver: what the lines say to a person, and the epochs to the log."""

    def __init__(self, epochs: int, low: int, high: int, log: Log) -> None:
        self.epochs, self.low, self.log = epochs, low, log
        self.workers = low if low == high else 0
        self.idle_since: float | None = time.monotonic()

    def line(self, line: dict[str, Any]) -> None:
        """One line of the file."""
        if "lost" in line:
            self.idle_since = time.monotonic()
            ranks = ", ".join(map(str, line["lost"]))
            progress.warn(f"lost the worker of rank {ranks}: going on from the last state")
        elif "epoch" in line:
            progress.say(epoch_words(_report(line), self.epochs))
            self.log(_report(line), line["workers"])
        else:
            self.idle_since = None
            if line["workers"] != self.workers:
                self.workers = line["workers"]
                progress.say(f"now {_workers(self.workers)}")

    def idle(self) -> None:
        """Nothing was said: say what is waited for, once."""
        if self.idle_since is not None and time.monotonic() - self.idle_since > _PATIENCE_S:
            self.idle_since = None
            progress.say(f"waiting until the cluster has room for {_workers(self.low)}")


@contextlib.contextmanager
def followed(path: Path, told: Told) -> Iterator[None]:
    """While the block runs, tell each line that the controller adds to `path`."""
    done = threading.Event()
    path.touch(mode=0o600)
    *whole, _ = path.read_text().split("\n")  # a controller that was killed may have left half a line
    path.write_text("".join(f"{line}\n" for line in whole))
    known = [line for line in map(json.loads, whole) if "epoch" in line]
    if known:
        progress.say(f"going on after epoch {known[-1]['epoch']} of {told.epochs}")
    for line in known:  # some may have been told to nobody
        told.log(_report(line), line["workers"])

    start = path.stat().st_size

    def follow() -> None:
        with path.open() as file:
            file.seek(start)
            rest = ""
            while True:
                last = done.is_set()
                rest += file.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    told.line(json.loads(line))
                if last:
                    return
                told.idle()
                done.wait(0.2)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number > 1)}"


def _report(line: Mapping[str, Any]) -> EpochReport:
    known = {field.name for field in dataclasses.fields(EpochReport)}
    return EpochReport(**{name: value for name, value in line.items() if name in known})

"""Where each epoch's numbers go besides the run's own report: TensorBoard, MLflow, Weights & Biases.

`train.track` names them. They are written by the one process that a person started, once an epoch, and a
run that goes on appends to what is there. A service that fails is told of and left out: the training goes on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from recray import config, progress
from recray.errors import ConfigError
from recray.recipes import Recipe
from recray.storage import Place, write_file
from recray.training.checkpoint import EpochReport
from recray.training.following import Log


class Sink(Protocol):
    """Takes the numbers of one run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name, of epoch `step` counted from 1."""

    def close(self, whole: bool) -> None:
        """The process is done with the run, which is `whole` or was cut off and may go on."""


@dataclass(frozen=True)
class Run:
    """What a service is told of a run. `key` is its own and the same when it goes on."""

    name: str
    key: str
    logs: Path  # a folder on this machine that outlives the run
    settings: Mapping[str, Any]  # the flat recipe


class _TensorBoard:
    """Event files in `tensorboard/<name>-<key>`, next to the result."""

    def __init__(self, run: Run) -> None:
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self.writer = writer(str(run.logs / "tensorboard" / f"{run.name}-{run.key}"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self, whole: bool) -> None:
        self.writer.close()


class _MLflow:
    """A run of the experiment $MLFLOW_EXPERIMENT_NAME (recray) at $MLFLOW_TRACKING_URI."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, during which training waits
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.entities = importlib.import_module("mlflow.entities")
        self.client = importlib.import_module("mlflow").MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "recray")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        found = self.client.search_runs([experiment], f"tags.recray_run = '{run.key}'", max_results=1)
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        made = self.client.create_run(experiment, run_name=run.name, tags={"recray_run": run.key})
        self.id = made.info.run_id
        params = [self.entities.Param(key, str(value)) for key, value in run.settings.items()]
        self.client.log_batch(self.id, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        named = {name.replace("@", "_at_"): value for name, value in values.items()}  # @ is not allowed there
        metrics = [self.entities.Metric(name, value, now, step) for name, value in named.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self, whole: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if whole else "KILLED")


class _WandB:
    """A run of the project $WANDB_PROJECT (recray)."""

    def __init__(self, run: Run) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "recray"),
            name=run.name,
            id=run.key,
            resume="allow",
            config=dict(run.settings),
            dir=os.environ.get("WANDB_DIR", str(run.logs)),
            settings=wandb.Settings(silent=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, whole: bool) -> None:
        self.run.finish(exit_code=0 if whole else 1)


@dataclass(frozen=True)
class _Kind:
    make: Callable[[Run], Sink]
    package: str  # what pip installs
    settings: tuple[str, ...] = ()  # of these environment variables one must be set


SINKS = {
    "tensorboard": _Kind(_TensorBoard, "tensorboard"),
    "mlflow": _Kind(_MLflow, "mlflow-skinny", ("MLFLOW_TRACKING_URI",)),
    "wandb": _Kind(_WandB, "wandb", ("WANDB_API_KEY", "WANDB_MODE")),
}


def wanted(track: str) -> list[str]:
    """The services that `train.track` names. Raises ConfigError for one that cannot be used here."""
    names = list(dict.fromkeys(part.strip() for part in track.split(",") if part.strip()))
    for name in names:
        if name not in SINKS:
            raise config.unknown_name("train.track", name, SINKS)
        kind = SINKS[name]
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"train.track is {track}, and {name} is not installed", fix=f"pip install {kind.package}"
            )
        if kind.settings and not any(os.environ.get(setting) for setting in kind.settings):
            raise ConfigError(
                f"train.track is {track}, and {name} is not configured",
                fix=f"set {' or '.join(kind.settings)} in the environment",
            )
    return names


def sinks(names: list[str], run: Run) -> list[Sink]:
    """One of each service; what cannot be reached is said and left out."""
    made: list[Sink] = []
    for name in names:
        with _forgiving(name):
            made.append(SINKS[name].make(run))
    return made


class Tracker:
    """The epochs of one run, each logged once, also when the run goes on in another process.

    `folder` is the run's own: `tracked.json` there keeps the run's key and the last epoch logged.
    """

    def __init__(self, recipe: Recipe, target: Place, folder: Path) -> None:
        self.recipe, self.path = recipe, folder / "tracked.json"
        known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.key, self.last = known.get("key") or secrets.token_hex(4), known.get("epoch", 0)
        logs = Path("runs").absolute() if target.remote else target.local.parent
        settings = {"name": recipe.name, "model": recipe.model, **recipe.options}
        settings |= {f"train.{name}": value for name, value in config.as_dict(recipe)["train"].items()}
        names = wanted(recipe.train.track)
        if names:
            self._remember()  # before anything is begun under this key
        self.sinks = sinks(names, Run(target.name, self.key, logs, settings))

    def _remember(self) -> None:
        write_file(self.path, json.dumps({"key": self.key, "epoch": self.last}).encode())

    def log(self, epoch: EpochReport, workers: int) -> None:
        """Send an epoch that was not sent before."""
        if epoch.epoch <= self.last or not self.sinks:
            return
        self.last = epoch.epoch
        self._remember()  # before it is sent: rather missed than sent twice
        values = numbers(epoch, self.recipe.train.batch_size, workers)
        sound = []
        for sink in self.sinks:
            with _forgiving(type(sink).__name__.strip("_")):
                sink.log(epoch.epoch, values)
                sound.append(sink)
        self.sinks = sound

    def close(self, whole: bool) -> None:
        """End what was begun."""
        for sink in self.sinks:
            with _forgiving(type(sink).__name__.strip("_")):
                sink.close(whole)


@contextlib.contextmanager
def tracked(recipe: Recipe, target: Place, folder: Path) -> Iterator[Log]:
    """Inside the block, what sends an epoch to the services that the recipe names."""
    tracker, whole = Tracker(recipe, target, folder), False
    try:
        yield tracker.log
        whole = True
    finally:
        tracker.close(whole)


def numbers(epoch: EpochReport, batch_size: int, workers: int) -> dict[str, float]:
    """What is logged of an epoch; examples are counted in full batches, seconds hold the validation."""
    values = {"loss": epoch.loss, "seconds": epoch.seconds, "waited": epoch.waited, "workers": float(workers)}
    if epoch.value is not None:
        values[epoch.metric] = epoch.value
    if epoch.seconds > 0:
        values["examples_per_s"] = epoch.batches * batch_size / epoch.seconds
    return values


@contextlib.contextmanager
def _forgiving(name: str) -> Iterator[None]:
    """Say an error of a service, whatever it is, and go on."""
    try:
        yield
    except Exception as error:
        what = (str(error).strip().splitlines() or [""])[0]
        progress.warn(f"{name} is left out from here on ({type(error).__name__}: {what})")

"""The verb `train`: a dataset and a recipe in, a checkpoint out, resumable in between.

While a run lasts its states lie beside `out`, in `.<name>.run`. The same command run again goes on
from the last of them; when the checkpoint is written the folder goes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import recray
from recray import config, progress
from recray.errors import ConfigError, InputError
from recray.manifest import Artefact, digest, write_artefact
from recray.models import build_model, model_class
from recray.models.base import Catalogue, Model
from recray.models.saved import save_model
from recray.recipes import Recipe, Train
from recray.storage import Place, check_writable, place, write_file
from recray.training.checkpoint import EpochReport, Position, State, last_state, load_state
from recray.training.loop import epoch_words, fit

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


def train(
    dataset: Dataset,
    recipe: Recipe,
    *,
    workers: int = 0,
    gpu: bool = False,
    out: str | os.PathLike[str] | Place,
) -> Artefact:
    """Train the recipe's model and leave a checkpoint at `out`.

    `workers=0` trains in this process; more are Ray Train workers that share each batch. `gpu` asks
    for one device a worker. A model that is fitted in closed form is always fitted in this process.

    Raises ConfigError for a bad recipe, InputError for a place or dataset that cannot be used,
    TrainingError for a loss that is not finite (the run's last good state is kept).
    """
    target = place(out)
    check_writable(target)
    recipe = resolve(recipe, gpu=gpu)
    if workers < 0:
        raise ConfigError(f"workers is {workers}", fix="give 0 (this process) or more")
    started = time.perf_counter()
    catalogue = Catalogue(dataset.n_items, dataset.context_sizes)
    model = build_model(recipe.model, catalogue, recipe.options, seed=recipe.train.seed)
    if not model.gradient:
        if workers:
            progress.say(f"{recipe.model} is fitted in closed form: in this process, without workers")
        measured = dict(model.fit(dataset, seed=recipe.train.seed))
        model.eval()
        return _leave(target, dataset, recipe, model, {"fit": measured}, started)
    with _run_folder(target, dataset, recipe, workers) as run:
        if workers:
            from recray.training.on_ray import train_on_ray  # Ray is imported only when it is asked for

            state = train_on_ray(
                dataset, recipe, workers=workers, gpu=gpu, folder=run.folder, storage=run.storage
            )
            model.load_state_dict(state.kept)
            model.eval()
            position = state.position
        else:
            position = _train_here(model, dataset, recipe, run.folder)
        report = _report(position)
        progress.say(f"trained {recipe.name} in {time.perf_counter() - started:.1f} s{_kept(position)}")
        made = _leave(target, dataset, recipe, model, report, started)
        run.remove()
    return made


def resolve(recipe: Recipe, *, gpu: bool = False) -> Recipe:
    """The recipe with all of its model's options written out. Raises ConfigError where one is bad."""
    options = config.build(model_class(recipe.model).Config, recipe.options, where="options")
    check(recipe.train)
    settings = dataclasses.replace(recipe.train, device="cuda") if gpu else recipe.train
    return dataclasses.replace(recipe, options=config.as_dict(options), train=settings)


def check(train: Train) -> None:
    """Raise ConfigError for a number that cannot be trained with."""
    least = {"epochs": 1, "batch_size": 1, "valid_users": 1}
    least |= {"warmup_steps": 0, "patience": 0, "threads": 0, "seed": 0, "clip_norm": 0, "weight_decay": 0}
    for name, bound in least.items():
        if not getattr(train, name) >= bound:
            raise ConfigError(f"train.{name} is {getattr(train, name)}", fix=f"it must be {bound} or more")
    if not 0 < train.lr < float("inf"):
        raise ConfigError(f"train.lr is {train.lr}", fix="it must be above 0")


def _train_here(model: Model, dataset: Dataset, recipe: Recipe, folder: Path) -> Position:
    def keep(epoch: EpochReport, state: State) -> None:
        state.save(folder)
        progress.say(epoch_words(epoch, recipe.train.epochs))

    resume = last_state(folder)
    if resume:
        done = load_state(resume, weights_only=True).position.epoch
        progress.say(f"going on after epoch {done} of {recipe.train.epochs}")
    return fit(model, dataset, recipe.train, report=keep, resume=resume, bars=True).position


def _kept(position: Position) -> str:
    """Which epoch's weights are left, where that is not plain."""
    if not position.best_epoch:
        return ""
    best = position.history[position.best_epoch - 1]
    return f": kept epoch {best.epoch} of {position.epoch}, {best.metric} {best.value:.4f}"


def _report(position: Position) -> dict[str, Any]:
    history = [dataclasses.asdict(epoch) for epoch in position.history]
    valid = {}
    if position.best_epoch:
        best = position.history[position.best_epoch - 1]
        valid = {best.metric: best.value, "epoch": best.epoch}
    return {"history": history, "valid": valid, "epochs": position.epoch, "steps": position.step}


def _leave(
    target: Place, dataset: Dataset, recipe: Recipe, model: Model, report: dict[str, Any], started: float
) -> Artefact:
    """Write the checkpoint artefact."""

    def fill(folder: Path) -> None:
        save_model(folder, model.cpu())

    catalogue = {"n_items": model.catalogue.n_items, "context": dict(model.catalogue.context)}
    seconds = round(time.perf_counter() - started, 3)
    return write_artefact(
        target,
        "checkpoint",
        fill,
        parents={"dataset": dataset.artefact},
        recipe=config.as_dict(recipe),
        report={"catalogue": catalogue, "seconds": seconds, **report},
    )


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its states: `folder` on this machine, `storage` where every worker reaches it."""

    folder: Path
    storage: Place

    def clear(self) -> None:
        """Remove what an earlier run left, here and on remote storage; the lock stays."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()
        if self.storage.remote and self.storage.exists():
            self.storage.fs.delete_dir(self.storage.path)

    def remove(self) -> None:
        self.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def _run_folder(target: Place, dataset: Dataset, recipe: Recipe, workers: int) -> Iterator[RunFolder]:
    """The folder of this very run, locked; what another recipe or dataset left there is removed.

    Raises InputError when another process is training into the same place.
    """
    folder, storage = run_places(target)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = {
        "recipe": digest(config.as_dict(recipe)),
        "dataset": dataset.artefact.hash,
        "version": recray.__version__,
        "engine": "ray" if workers else "process",
    }
    run = RunFolder(folder, storage)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError("another run is training into this place", where=target) from None
        known = folder / "run.json"
        before = _read(known)
        if before != identity:
            if before:
                differs = ", ".join(name for name in identity if before.get(name) != identity[name])
                progress.say(f"starting anew: an unfinished run was here, with another {differs}")
            run.clear()
            write_file(known, json.dumps(identity, indent=1).encode())
        yield run


def run_places(target: Place) -> tuple[Path, Place]:
    """(local folder, shared storage) of a run that makes `target`."""
    if not target.remote:
        folder = target.local.with_name(f".{target.local.name}.run")
        return folder, place(folder)
    address, mark, query = target.uri.partition("?")
    parent, _, name = address.rstrip("/").rpartition("/")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "recray" / "runs" / digest(target.uri)[:16]
    return folder, place(f"{parent}/.{name}.run{mark}{query}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import recray
from recray import config, progress
from recray.errors import ConfigError, InputError, RecrayError
from recray.manifest import Artefact, digest, write_artefact
from recray.models import build_model, model_class
from recray.models.base import Catalogue, Model, Ranker, Retriever
from recray.models.saved import WEIGHTS, catalogue_report, load_state, save_model
from recray.recipes import Recipe, Train
from recray.storage import Place, check_writable, place, write_file
from recray.training.beginning import begun, behind
from recray.training.checkpoint import (
    EpochReport,
    Position,
    State,
    assemble_model,
    best_state,
    last_state,
    open_state,
)
from recray.training.following import Log
from recray.training.loop import TrainingError, epoch_words, fit, pick_device
from recray.training.metrics import tracked, wanted
from recray.training.two_stages import choose_share, first_stage, mine
from recray.training.work import check_room, set_beside

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_WORTH_S = 30.0  # seconds of a run that are worth the second of measuring what the plan would have said


def train(
    dataset: Dataset,
    recipe: Recipe,
    *,
    workers: int | tuple[int, int] = 0,
    gpu: bool = False,
    retriever: Artefact | None = None,
    out: str | os.PathLike[str] | Place,
    after: Callable[[EpochReport], None] = lambda epoch: None,
) -> Artefact:
    """Train the recipe's model and leave a checkpoint at `out`.

    `workers=0` trains in this process; more are Ray Train workers that share each batch, and a range
    (least, most) follows the nodes of the cluster. `gpu` asks for one device a worker. Of the models that
    are fitted in closed form only those that share the work among ranks use workers. `retriever` is the
    checkpoint behind whose candidates a ranker is to stand; it is then trained on them, in this process.

    `after` (of `workers=0`) is called after each epoch once its state is kept, and again for those of a
    run that goes on; what it raises ends the run, which may be gone on with.

    Raises ConfigError for a bad recipe, InputError for a place or dataset that cannot be used,
    TrainingError for a loss that is not finite (the run's last good state is kept).
    """
    target = place(out)
    check_writable(target)
    recipe = resolve(recipe, gpu=gpu)
    check_workers(workers)
    started = time.perf_counter()
    kind, catalogue = model_class(recipe.model), Catalogue.of(dataset)
    first = None if retriever is None else first_stage(retriever, dataset, recipe, alone=not workers)
    parents = behind(recipe, dataset) | ({} if retriever is None else {"retriever": retriever})
    if not kind.gradient and not (workers and kind.shares_fit):
        model, measured = _fit_here(dataset, recipe, catalogue, told=bool(workers))
        return _leave(target, dataset, recipe, model, {"fit": measured}, started)
    if not workers:  # a worker asks for itself, where it runs
        check_room(recipe, catalogue, pick_device(recipe.train.device))
    with (
        _run_folder(target, dataset, recipe, bool(workers), parents) as run,
        tracked(recipe, target, run.folder) as log,
    ):
        if workers:
            from recray.training.on_ray import fitted, train_on_ray  # Ray is imported only when asked for

            finished = train_on_ray(
                dataset,
                recipe,
                run.identity,
                workers=workers,
                gpu=gpu,
                folder=run.folder,
                storage=run.storage,
                log=log,
            )
            if not kind.gradient:
                weights, told = finished.best / WEIGHTS, fitted(finished.best)
                check_finite(recipe.model, load_file(weights))
                made = _leave(target, dataset, recipe, weights, told, started)
                run.remove()
                return made
            position, best = open_state(finished.newest).position, finished.best
        else:
            position, best = _train_here(dataset, recipe, run, _both(log, after), first)
        seconds = time.perf_counter() - started
        report = _report(position)
        if seconds > _WORTH_S:
            report["plan"] = _beside(recipe, dataset, position, workers)
        progress.say(f"trained {recipe.name} in {seconds:.1f} s{_kept(position)}")
        if first is not None:
            best, report["two_stages"] = _together(best, run.folder, dataset, recipe, first)
        made = _leave(target, dataset, recipe, best, report, started, parents)
        run.remove()
    return made


def resolve(recipe: Recipe, *, gpu: bool = False) -> Recipe:
    """The recipe with all of its model's options written out. Raises ConfigError where one is bad."""
    kind = model_class(recipe.model)
    options = config.build(kind.Config, recipe.options, where="options")
    check(recipe.train)
    if gpu and not kind.gradient:
        raise ConfigError(
            f"{recipe.model} is fitted without a GPU, and one is asked for", fix="train it without --gpu"
        )
    settings = dataclasses.replace(recipe.train, device="cuda") if gpu else recipe.train
    if getattr(options, "loss", "") == "labels":  # lists of what was taken say nothing of labels
        settings = dataclasses.replace(settings, valid_users=0)
    return dataclasses.replace(recipe, options=config.as_dict(options), train=settings)


def check(train: Train) -> None:
    """Raise ConfigError for a number that cannot be trained with."""
    least = {"epochs": 1, "batch_size": 1, "accumulate": 1, "candidates": 1}
    least |= dict.fromkeys(("warmup_steps", "patience", "threads", "seed", "valid_users", "save_steps"), 0)
    least |= dict.fromkeys(("clip_norm", "weight_decay", "table_lr", "table_l2", "adversarial"), 0)
    least |= {"teach_top": 1, "sparse": 0}
    if train.seed >= 1 << 63:
        raise ConfigError(f"train.seed is {train.seed}", fix="it must be below 2**63")
    for name, bound in least.items():
        if not getattr(train, name) >= bound:
            raise ConfigError(f"train.{name} is {getattr(train, name)}", fix=f"it must be {bound} or more")
    if not 0 < train.lr < float("inf"):
        raise ConfigError(f"train.lr is {train.lr}", fix="it must be above 0")
    if not (0 <= train.teach_weight <= 1 and 0 < train.teach_temperature < float("inf")):
        raise ConfigError("train.teach_weight is a share, and train.teach_temperature above 0", where="train")
    if train.sparse >= 1 or train.bits not in (0, *range(2, 9)):
        raise ConfigError(
            "train.sparse is a share below 1, and train.bits 0 or within 2 and 8", where="train"
        )
    wanted(train.track)


def check_workers(workers: int | tuple[int, int]) -> None:
    """Raise ConfigError for a number or a range of workers that cannot be."""
    if isinstance(workers, int):
        if workers < 0:
            raise ConfigError(f"workers is {workers}", fix="give 0 (this process) or more")
    elif not (len(workers) == 2 and 1 <= workers[0] <= workers[1]):
        raise ConfigError(f"workers is {workers}", fix="a range is (least, most), of 1 or more")


def _fit_here(
    dataset: Dataset, recipe: Recipe, catalogue: Catalogue, *, told: bool
) -> tuple[Model, dict[str, float]]:
    """Fit a model in closed form; gives it, and what it measured. `told`: say that it is done here."""
    if told:
        progress.say(f"{recipe.model} is fitted in one process, without workers")
    model = build_model(recipe.model, catalogue, recipe.options, seed=recipe.train.seed)
    model.see(dataset)
    measured = dict(model.fit(dataset, seed=recipe.train.seed))
    check_finite(recipe.model, model.state_dict())
    return model.eval(), measured


def check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    """Raise TrainingError where a solution overflowed, or there was none."""
    for part, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            words = f"{name} has no solution here: its {part} is not finite"
            raise TrainingError(words, fix="choose other options, such as a larger regularization")


def _both(log: Log, after: Callable[[EpochReport], None]) -> Log:
    def told(epoch: EpochReport, workers: int) -> None:
        log(epoch, workers)
        after(epoch)

    return told


def _train_here(
    dataset: Dataset, recipe: Recipe, run: RunFolder, log: Log, first: Retriever | None = None
) -> tuple[Position, Path]:
    """Train in this process; gives where it ended, and the folder of the best state."""

    def keep(epoch: EpochReport | None, state: State) -> None:
        state.save(run.folder)
        if epoch is not None:
            progress.say(epoch_words(epoch, recipe.train.epochs))
            log(epoch, 1)

    resume = last_state(run.folder)
    if resume:
        done = open_state(resume, run.identity).position
        progress.say(f"going on after epoch {done.epoch} of {recipe.train.epochs}")
        for epoch in done.history:  # one may have been kept and not logged
            log(epoch, 1)
    model = begun(recipe, dataset)
    if first is not None:
        assert isinstance(model, Ranker)
        model.mined = mine(first, dataset, recipe.train.candidates, run.folder)
    position = fit(
        model, dataset, recipe.train, report=keep, resume=resume, identity=run.identity, bars=True
    ).position
    return position, best_state(run.folder, position)


def _together(
    best: Path, folder: Path, dataset: Dataset, recipe: Recipe, first: Retriever
) -> tuple[Path, dict[str, Any]]:
    """(the file of the trained ranker, what it and its retriever are together: see `choose_share`)."""
    weights = folder / WEIGHTS
    assemble_model(best, weights)
    ranker = build_model(recipe.model, Catalogue.of(dataset), recipe.options)
    assert isinstance(ranker, Ranker)
    load_state(ranker, load_file(weights), where=weights)
    return weights, choose_share(first, ranker, dataset, recipe.train.candidates, recipe.train)


def _kept(position: Position) -> str:
    """Which epoch's weights are left, where that is not plain."""
    if not position.best_epoch:
        return ""
    best = position.history[position.best_epoch - 1]
    return f": kept epoch {best.epoch} of {position.epoch}, {best.metric} {best.value:.4f}"


def _beside(
    recipe: Recipe, dataset: Dataset, position: Position, workers: int | tuple[int, int]
) -> dict[str, Any]:
    """See `set_beside`; empty where nothing can be planned: the training is done, and is not to be lost."""
    ranks = workers if isinstance(workers, int) else workers[0]
    try:
        return set_beside(recipe, dataset, position, ranks=max(1, ranks))
    except RecrayError as error:
        progress.warn(f"no plan is set beside the run ({error})")
        return {}


def _report(position: Position) -> dict[str, Any]:
    history = [dataclasses.asdict(epoch) for epoch in position.history]
    valid = {}
    if position.best_epoch:
        best = position.history[position.best_epoch - 1]
        valid = {best.metric: best.value, "epoch": best.epoch}
    return {"history": history, "valid": valid, "epochs": position.epoch, "steps": position.step}


def _leave(
    target: Place,
    dataset: Dataset,
    recipe: Recipe,
    made: Model | Path,
    report: dict[str, Any],
    started: float,
    parents: Mapping[str, Artefact] = MappingProxyType({}),
) -> Artefact:
    """Write the checkpoint artefact: of a model, of the file of one, or of a state's folder."""

    def fill(folder: Path) -> None:
        if isinstance(made, Path) and made.name == WEIGHTS:
            shutil.copyfile(made, folder / WEIGHTS)
        elif isinstance(made, Path):
            assemble_model(made, folder / WEIGHTS)
        else:
            save_model(folder, made.cpu())

    catalogue, ids = catalogue_report(Catalogue.of(dataset)), dataset.items.digest()
    seconds = round(time.perf_counter() - started, 3)
    return write_artefact(
        target,
        "checkpoint",
        fill,
        parents={"dataset": dataset.artefact, **parents},
        recipe=config.as_dict(recipe),
        report={"catalogue": catalogue, "item_ids": ids, "seconds": seconds, **report},
    )


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its states: `folder` on this machine, `storage` where every worker reaches it."""

    folder: Path
    storage: Place
    identity: Mapping[str, str]  # what a state must be of, to be gone on from

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
def _run_folder(
    target: Place, dataset: Dataset, recipe: Recipe, on_ray: bool, parents: Mapping[str, Artefact]
) -> Iterator[RunFolder]:
    """The folder of this very run, locked; what another recipe or dataset left there is removed.

    Raises InputError when another process is training into the same place.
    """
    folder, storage = run_places(target)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = {
        "recipe": digest(config.as_dict(recipe)),
        "dataset": dataset.artefact.hash,
        **{role: parents[role].hash if role in parents else "" for role in ("retriever", "start", "teacher")},
        "version": recray.__version__,
        "engine": "ray" if on_ray else "process",
    }
    run = RunFolder(folder, storage, {name: identity[name] for name in ("recipe", "dataset", "version")})
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "recray" / "runs" / digest(target.uri)[:16]
    return folder, target.beside(f".{target.name}.run")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}

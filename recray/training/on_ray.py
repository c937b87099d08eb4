"""Ray's door of the training wing: the loop on the workers of one Ray Train run.

Each worker opens the dataset by its URI and runs `loop.fit` as its rank. Every rank hands its own files
of a state to Ray Train, which keeps them as one folder: the newest and that of the best epoch. A group
that loses a worker, or that is resized because nodes came or went, begins again at the newest, and so
does a driver that is started again with the same storage. The driver reads what happens from a file
that the controller appends to: the controller runs on the driver's machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerGroupCallback
from ray.train.v2.api.report_config import CheckpointConsistencyMode, CheckpointUploadMode

from recray import config, connect
from recray.errors import ArtefactError, InputError, RecrayError
from recray.manifest import digest
from recray.models import model_class
from recray.models.base import Catalogue, Model
from recray.models.saved import save_model
from recray.recipes import Recipe
from recray.storage import Place, place, write_file
from recray.training.beginning import begun
from recray.training.checkpoint import EpochReport, State
from recray.training.following import EPOCHS, Log, Told, Watch, followed
from recray.training.loop import fit, pick_device
from recray.training.wire import make_wire
from recray.training.work import check_room

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

Workers = int | tuple[int, int]  # so many, or a range that follows the nodes of the cluster

FITTED = "fit.json"  # beside model.safetensors: what a model in closed form measured while it was fitted
_NAME = "train"
_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of the states it keeps
_COPY = "last_good_snapshot.json"
_SCRATCH = ".recray-"  # where a rank writes a state
_LOOK_S = 30.0  # between looks at whether the cluster has grown: a resize costs some ten seconds
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are polled so often: 2 s is longer than an epoch
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}
_ELASTIC = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}  # the size was counted on nodes that may be gone


@dataclass(frozen=True)
class Finished:
    """Folders of two states on this machine; often they are one.

    Of a model in closed form there are no states: the folder holds model.safetensors and `FITTED`.
    """

    newest: Path
    best: Path  # of the epoch with the best metric; without a metric the newest


def train_on_ray(
    dataset: Dataset,
    recipe: Recipe,
    identity: Mapping[str, str],
    *,
    workers: Workers,
    gpu: bool,
    folder: Path,
    storage: Place,
    log: Log = lambda epoch, workers: None,
) -> Finished:
    """Run `recipe` on `workers` ranks and give the states back that are left.

    `identity` says what its states are of, `folder` is the run's place on this machine, `storage` the
    one that all workers reach. `log` is called in a thread of this process, after a restart also with
    epochs that it was told before.
    Raises the error of a worker as it was raised there; InputError when the cluster is too small.
    """
    low, high = (workers, workers) if isinstance(workers, int) else workers
    job = {
        "dataset": dataset.artefact.place.uri,
        "hash": dataset.artefact.hash,
        "recipe": config.as_dict(recipe),
        "identity": dict(identity),
        "storage": storage.uri,
    }
    with connect.session(num_cpus=max(low, os.cpu_count() or 1)) as address, _settings(low < high, address):
        _has_room(low, gpu)
        _mend(storage / _NAME)
        trainer = TorchTrainer(
            _worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=low if low == high else (low, high),
                use_gpu=gpu,
                elastic_resize_monitor_interval_s=_LOOK_S,
            ),
            run_config=RunConfig(
                name=_NAME,
                storage_path=storage.path,
                storage_filesystem=storage.fs if storage.remote else None,
                failure_config=FailureConfig(max_failures=-1),  # `Watch` says when it is enough
                # the best state; the newest is kept beside it (Ray Train's checkpoint_manager.py)
                checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score"),
                callbacks=[
                    _Controller(Watch(folder / EPOCHS), None if storage.remote else storage.local / _NAME)
                ],
            ),
        )
        told = Told(recipe.train.epochs, low, high, log)
        with followed(folder / EPOCHS, told), _as_raised(storage):
            result = trainer.fit()
        if result.checkpoint is None:
            raise RecrayError("the run ended without a checkpoint", where=storage)
        best = result.best_checkpoints[-1][0] if result.best_checkpoints else result.checkpoint
        return Finished(_here(result.checkpoint, folder), _here(best, folder))


def fitted(folder: Path) -> dict[str, Any]:
    """What the report of a model in closed form says, from the folder of its run."""
    return {"fit": json.loads((folder / FITTED).read_text())}


def _here(checkpoint: Checkpoint, folder: Path) -> Path:
    """Its files on this machine: where they lie, or fetched into the run's folder."""
    if checkpoint.filesystem.type_name == "local":
        return Path(checkpoint.path)
    goal = folder / Path(checkpoint.path).name
    if not goal.exists():
        checkpoint.to_directory(goal)
    return goal


# -- in each worker ------------------------------------------------------------------------------------


def _worker(job: Mapping[str, Any]) -> None:
    """One rank. Runs inside a Ray Train worker."""
    from recray.data.dataset import open_dataset

    here = ray.train.get_context()
    recipe = config.build(Recipe, job["recipe"])
    torch.set_num_threads(
        recipe.train.threads or max(1, (os.cpu_count() or 1) // here.get_local_world_size())
    )
    outbox = _Outbox(place(job["storage"]))
    try:
        dataset = open_dataset(job["dataset"])
        if dataset.artefact.hash != job["hash"]:
            raise InputError("was changed while the run was going on", where=dataset.artefact.place)
        catalogue, seed = Catalogue.of(dataset), recipe.train.seed
        gradient, last = model_class(recipe.model).gradient, ray.train.get_checkpoint()
        model = begun(recipe, dataset)
        with contextlib.ExitStack() as stack:
            if not gradient:
                return _solve(outbox, model, dataset, seed) if last is None else None
            ranks, local = here.get_world_size(), here.get_local_world_size()
            check_room(recipe, catalogue, pick_device(recipe.train.device), ranks=ranks, here=local)
            fit(
                model,
                dataset,
                recipe.train,
                rank=here.get_world_rank(),
                world=here.get_world_size(),
                report=functools.partial(_hand_over, outbox),
                resume=Path(stack.enter_context(last.as_directory())) if last else None,
                identity=job["identity"],
            )
    except RecrayError:
        outbox.settle()  # the states before the error are kept
        raise


def _hand_over(outbox: _Outbox, epoch: EpochReport | None, state: State) -> None:
    """Give a state to Ray Train; `epoch` is None in the middle of one."""
    if epoch is None:
        metrics = {"partial": True, "step": state.position.step, "score": 0}
    else:
        metrics = {**dataclasses.asdict(epoch), "score": epoch.epoch if epoch.best else 0}
    outbox.send(metrics, state.write)


def _solve(outbox: _Outbox, model: Model, dataset: Dataset, seed: int) -> None:
    """Fit a model in closed form, all ranks together: each ends with all of it, and rank 0 hands it over."""
    together: Any = model.fit
    measured = together(dataset, seed=seed, ranks=make_wire(model.device))

    def write(folder: Path) -> None:
        save_model(folder, model)
        (folder / FITTED).write_text(json.dumps(dict(measured)))

    outbox.send({"partial": True, "score": 0}, None if outbox.rank else write)


class _Outbox:
    """A rank's way to the storage: a state is written beside it and travels behind the next batches."""

    def __init__(self, storage: Place) -> None:
        here = ray.train.get_context()
        self.rank, self.kept, self.local = here.get_world_rank(), here.get_storage(), not storage.remote
        root = self.kept.experiment_fs_path if self.local else tempfile.gettempdir()
        self.scratch = Path(root) / f"{_SCRATCH}{digest(storage.uri)[:16]}-{self.rank}"
        shutil.rmtree(self.scratch, ignore_errors=True)  # a killed worker left it
        self.free = threading.Event()
        self.free.set()
        if self.rank == 0:
            self._sweep(here.get_world_size())

    def send(self, metrics: Mapping[str, Any], write: Callable[[Path], None] | None) -> None:
        """Report on every rank; `write` fills a folder with this rank's files, None where it has none.

        Waits for the state before, so that at most one lies here.
        """
        checkpoint = None
        if write is not None:
            self.free.wait()
            try:
                self.scratch.mkdir(parents=True)
                write(self.scratch)
            except OSError as error:
                raise RecrayError(
                    f"a state cannot be written ({error.strerror or error})",
                    where=self.scratch,
                    fix="make room and run it again to go on",
                ) from error
            self.free.clear()
            checkpoint = Checkpoint.from_directory(self.scratch)
        ray.train.report(
            dict(metrics),
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._deliver,
            delete_local_checkpoint_after_upload=False,
        )

    def settle(self) -> None:
        """Wait for what was sent."""
        ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED, timeout_s=60)

    def _deliver(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """In Ray Train's thread: into the folder `name`, beside the files of the other ranks."""
        if self.local:
            goal = Path(self.kept.build_checkpoint_path_from_name(name))
            goal.mkdir(exist_ok=True)
            for file in self.scratch.iterdir():
                file.rename(goal / file.name)
            made = Checkpoint(str(goal), self.kept.storage_filesystem)
        else:
            made = self.kept.persist_current_checkpoint(checkpoint, name)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.free.set()
        return made

    def _sweep(self, world: int) -> None:
        """Remove states that never became whole, and what is left of ranks that there are no more.

        No other rank has begun a state yet: for that all ranks meet in Ray Train's report.
        """
        from pyarrow import fs

        whole = ray.train.get_all_reported_checkpoints(CheckpointConsistencyMode.COMMITTED)
        known = {Path(each.checkpoint.path).name for each in whole}
        there = fs.FileSelector(self.kept.experiment_fs_path)
        for found in self.kept.storage_filesystem.get_file_info(there):
            half = found.base_name.startswith("checkpoint_") and found.base_name not in known
            gone = found.base_name.startswith(_SCRATCH) and int(found.base_name.rpartition("-")[2]) >= world
            if found.type == fs.FileType.Directory and (half or gone):
                self.kept.storage_filesystem.delete_dir(found.path)


# -- in the controller ---------------------------------------------------------------------------------


class _Controller(ReportCallback, WorkerGroupCallback):  # type: ignore[misc]
    """What Ray Train's controller tells of, for `following.Watch`."""

    def __init__(self, watch: Watch, experiment: Path | None) -> None:
        self.watch, self.experiment = watch, experiment

    def before_worker_group_start(self, context: Any) -> None:
        self.watch.trying(context.num_workers)

    def after_worker_group_start(self, group: Any) -> None:
        self.watch.started([each.metadata.pid for each in group.get_workers()])

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        if self.experiment and (written := self.experiment / _SNAPSHOT).exists():
            write_file(self.experiment / _COPY, written.read_bytes())  # Ray writes in place
        self.watch.kept(metrics[0])

    def after_worker_group_poll_status(self, status: Any) -> None:
        if status.errors:
            self.watch.lost(status.errors)


# -- in the driver -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _as_raised(storage: Place) -> Iterator[None]:
    """Turn Ray's wrappers into the error that a worker raised, and a Ctrl-C into KeyboardInterrupt."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except ray.train.TrainingFailedError as error:
        found = getattr(error, "controller_failure", error)
        if isinstance(found, RecrayError):
            raise found from None
        what = (str(found).strip().splitlines() or [""])[-1]  # a traceback ends in what it is about
        raise RecrayError(
            f"Ray Train failed ({type(found).__name__}: {what})", where=storage, fix="run it again to go on"
        ) from error
    except SystemExit:  # what Ray Train's own handler of Ctrl-C ends in, once the workers are stopped
        raise KeyboardInterrupt from None
    except RayActorError as error:
        if "exit_actor" in str(error):  # or in this, if the answer of the controller comes first
            raise KeyboardInterrupt from None
        what = str(error).strip().splitlines()[-1]
        raise RecrayError(f"the training controller died ({what})", fix="run it again to go on") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _settings(elastic: bool, address: str) -> Iterator[None]:
    """Ray Train's settings, inside the block; those that the user made come first."""
    wanted = _SETTINGS | (_ELASTIC if elastic else {})
    if address.startswith("127."):  # nobody takes this machine away while we use it
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _has_room(workers: int, gpu: bool) -> None:
    there = ray.cluster_resources()
    kind = "GPU" if gpu else "CPU"
    if there.get(kind, 0) < workers:
        raise InputError(
            f"{workers} workers want {workers} {kind}s, and the cluster has {there.get(kind, 0):g}",
            fix="ask for fewer --workers" + (" or leave --gpu out" if gpu else ""),
        )


def _mend(experiment: Place) -> None:
    """See to it that the controller can read which states there are.

    Raises ArtefactError when one of them is gone.
    """
    snapshot, copy = experiment / _SNAPSHOT, experiment / _COPY
    if not snapshot.exists():
        return
    try:
        kept = json.loads(snapshot.read_bytes())
    except ValueError:  # the machine went down while it was written; the states are older, and whole
        if not copy.exists():
            snapshot.fs.delete_file(snapshot.path)
            return
        kept = json.loads(copy.read_bytes())
        write_file(snapshot.local, copy.read_bytes())
    for each in kept["checkpoint_results"]:
        state = experiment / each["checkpoint_dir_name"]
        if not state.exists():
            raise ArtefactError(
                "a state of the unfinished run is gone", where=state, fix=f"delete {experiment} to start anew"
            )

"""Ray's door of the training wing: the loop on the workers of one Ray Train run.

Each worker opens the dataset by its URI and runs `loop.fit` as its rank. Rank 0 hands every epoch's
state to Ray Train as a checkpoint; a worker that dies brings the group back from the last of them,
and so does a driver that is started again with the same storage. The driver reads the epochs from a
file that the controller appends to: the controller runs on the driver's machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from recray import config, connect, errors, progress
from recray.errors import InputError, RecrayError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.recipes import Recipe
from recray.storage import Place, place
from recray.training.checkpoint import EpochReport, State, load_state
from recray.training.loop import TrainingError, epoch_words, fit

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_NAME = "train"
_EPOCHS = "epochs.jsonl"
_ERROR = "error.json"
_RESTARTS = 3  # worker groups that may die before the run is given up
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports are polled so often: 2 s is longer than an epoch
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}


def train_on_ray(
    dataset: Dataset, recipe: Recipe, *, workers: int, gpu: bool, folder: Path, storage: Place
) -> State:
    """Run `recipe` on `workers` ranks and give the last state back.

    `folder` is the run's place on this machine, `storage` the one that all workers reach.
    Raises the error of a worker as it was raised there; InputError when the cluster is too small.
    """
    job = {
        "dataset": dataset.artefact.place.uri,
        "hash": dataset.artefact.hash,
        "recipe": config.as_dict(recipe),
    }
    job["storage"] = storage.uri
    with connect.session(num_cpus=max(workers, os.cpu_count() or 1)) as address:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        if address.startswith("127."):  # nobody takes this machine away while we use it
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        _has_room(workers, gpu)
        trainer = TorchTrainer(
            _worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(
                name=_NAME,
                storage_path=storage.path,
                storage_filesystem=storage.fs if storage.remote else None,
                failure_config=FailureConfig(max_failures=_RESTARTS, controller_failure_limit=_RESTARTS),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                callbacks=[_Epochs(str(folder / _EPOCHS))],
            ),
        )
        _forget(storage / _ERROR)
        with _epochs_said(folder / _EPOCHS, recipe.train.epochs), _as_raised(storage):
            result = trainer.fit()
            _raise_left(storage)
        if result.checkpoint is None:
            raise RecrayError("the run ended without a checkpoint", where=storage)
        with result.checkpoint.as_directory() as at:
            return load_state(Path(at), weights_only=True)


def _worker(job: Mapping[str, Any]) -> None:
    """One rank. Runs inside a Ray Train worker."""
    from recray.data.dataset import open_dataset

    storage = place(job["storage"])
    if (storage / _ERROR).exists():
        return  # an earlier group met an error that trying again will not mend; the driver raises it
    here = ray.train.get_context()
    recipe = config.build(Recipe, job["recipe"])
    threads = recipe.train.threads or max(1, (os.cpu_count() or 1) // here.get_local_world_size())
    torch.set_num_threads(threads)
    try:
        dataset = open_dataset(job["dataset"])
        if dataset.artefact.hash != job["hash"]:
            raise InputError("was changed while the run was going on", where=dataset.artefact.place)
        torch.manual_seed(recipe.train.seed)
        model = build_model(recipe.model, Catalogue(dataset.n_items, dataset.context_sizes), recipe.options)
        with contextlib.ExitStack() as stack:
            last = ray.train.get_checkpoint()
            fit(
                model,
                dataset,
                recipe.train,
                rank=here.get_world_rank(),
                world=here.get_world_size(),
                report=_hand_over,
                resume=Path(stack.enter_context(last.as_directory())) if last else None,
            )
    except RecrayError as error:
        _leave(storage / _ERROR, error)
        if not isinstance(error, TrainingError):
            raise  # a rank that returned would leave the others waiting for it
    # every rank saw the same loss, so all of them end here


def _hand_over(epoch: EpochReport, state: State) -> None:
    """Give the epoch to Ray Train; its state comes from rank 0 alone."""
    metrics = {**dataclasses.asdict(epoch), "pid": os.getpid()}
    if ray.train.get_context().get_world_rank():
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory(prefix="recray-state-") as scratch:
        state.write(Path(scratch))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(scratch))


class _Epochs(ray.train.UserCallback):  # type: ignore[misc]
    """In the controller: one line of JSON an epoch, with the ranks' process ids, for the driver."""

    def __init__(self, path: str) -> None:
        self.path = path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        line = {**metrics[0], "pids": [each["pid"] for each in metrics]}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"lost": sorted(worker_exceptions)}) + "\n")


@contextlib.contextmanager
def _epochs_said(path: Path, epochs: int) -> Iterator[None]:
    """While the block runs, say each line that the controller adds to `path`."""
    done = threading.Event()
    path.touch(mode=0o600)
    *whole, _ = path.read_text().split("\n")  # a controller that was killed may have left half a line
    path.write_text("".join(f"{line}\n" for line in whole))
    if epoch := max((json.loads(line).get("epoch", 0) for line in whole), default=0):
        progress.say(f"going on after epoch {epoch} of {epochs}")

    def follow() -> None:
        with path.open() as file:
            file.seek(0, os.SEEK_END)
            rest = ""
            while True:
                last = done.is_set()
                rest += file.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    _say(json.loads(line), epochs)
                if last:
                    return
                done.wait(0.2)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(line: dict[str, Any], epochs: int) -> None:
    if "lost" in line:
        ranks = ", ".join(map(str, line["lost"]))
        progress.warn(f"lost the worker of rank {ranks}: going on from the last epoch's state")
        return
    known = {field.name for field in dataclasses.fields(EpochReport)}
    progress.say(epoch_words(EpochReport(**{k: v for k, v in line.items() if k in known}), epochs))


@contextlib.contextmanager
def _as_raised(storage: Place) -> Iterator[None]:
    """Turn Ray's wrappers into the error that a worker raised, and a Ctrl-C into KeyboardInterrupt."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except ray.train.TrainingFailedError as error:
        _raise_left(storage)
        found = [getattr(e, "_base_exc", e) for e in getattr(error, "worker_failures", {}).values()]
        first = found[0] if found else getattr(error, "controller_failure", error)
        what = (str(first).strip().splitlines() or [""])[0]
        raise RecrayError(
            f"training gave up after {_RESTARTS} restarts ({type(first).__name__}: {what})",
            where=storage,
            fix=f"run it again to go on from the last epoch; {connect.VERBOSE}=1 shows the workers' words",
        ) from error
    except SystemExit:  # what Ray Train's own handler of Ctrl-C ends in, once the workers are stopped
        raise KeyboardInterrupt from None
    except RayActorError as error:
        if "exit_actor" in str(error):  # or in this, if the answer of the controller comes first
            raise KeyboardInterrupt from None
        raise RecrayError("the training controller died", fix="run it again to go on") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _has_room(workers: int, gpu: bool) -> None:
    there = ray.cluster_resources()
    kind = "GPU" if gpu else "CPU"
    if there.get(kind, 0) < workers:
        raise InputError(
            f"{workers} workers want {workers} {kind}s, and the cluster has {there.get(kind, 0):g}",
            fix="ask for fewer --workers" + (" or leave --gpu out" if gpu else ""),
        )


def _leave(where: Place, error: RecrayError) -> None:
    data = {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    with where.fs.open_output_stream(where.path) as stream:
        stream.write(json.dumps(data).encode())


def _raise_left(storage: Place) -> None:
    """Raise what a worker left as it was raised there."""
    left = storage / _ERROR
    if not left.exists():
        return
    data = json.loads(left.read_bytes())
    _forget(left)
    kinds = {cls.__name__: cls for cls in _known_errors()}
    raise kinds.get(data["type"], RecrayError)(data["what"], where=data["where"], fix=data["fix"])


def _known_errors() -> list[type[RecrayError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [TrainingError, *(cls for cls in found if issubclass(cls, RecrayError))]


def _forget(left: Place) -> None:
    if left.exists():
        left.fs.delete_file(left.path)

"""Training on Ray Train workers: it ends in a checkpoint, also when a worker or the driver is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch.distributed
from safetensors.torch import load_file

from recray.data.dataset import Dataset
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.saved import WEIGHTS, load_model
from recray.recipes import Recipe, recipe
from recray.storage import place
from recray.training import on_ray
from recray.training.checkpoint import open_state
from recray.training.loop import TrainingError
from recray.training.run import RunFolder, train

# Ray itself uses what it deprecates
pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SMALL = ["options.dim=8", "options.blocks=1", "options.dropout=0", "train.batch_size=16", "train.patience=0"]
SMALL += ["train.threads=1"]


def small(*changes: str) -> Recipe:
    return recipe("sasrec", [*SMALL, *changes])


def lines_of(run: Path) -> list[dict[str, Any]]:
    """What the controller has told: epochs, groups of workers, losses of some."""
    try:
        *whole, _ = (run / "epochs.jsonl").read_text().split("\n")
        return [json.loads(line) for line in whole]
    except FileNotFoundError:
        return []


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(run) if "epoch" in line]


def workers_of(run: Path) -> list[int]:
    """The processes of the present group, in order of ranks."""
    pids: list[int] = [line["pids"] for line in lines_of(run) if "pids" in line][-1]
    return pids


def wait_for(what: Callable[[], Any], seconds: float = 150) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came in time"
        time.sleep(0.02)
    return found


def kill_while_it_hands_over(run: Path, rank: int) -> None:
    """Kill the worker of `rank` at the moment when a state of it is half on its way."""
    pid = workers_of(run)[rank]
    assert psutil.Process(pid).name().startswith("ray::")
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if not any((run / "train").glob(f".recray-*-{rank}/*")):
            continue
        os.kill(pid, signal.SIGSTOP)
        if any((run / "train").glob(f".recray-*-{rank}/*")):
            os.kill(pid, signal.SIGKILL)
            return
        os.kill(pid, signal.SIGCONT)
    raise AssertionError("no state was seen on its way")


def test_a_killed_worker_costs_at_most_the_work_since_the_last_state(
    ray_cluster: str, ring: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "checkpoint", tmp_path / ".checkpoint.run"
    seen: list[dict[str, Any]] = []
    changes = ("train.epochs=6", "train.save_steps=4")

    def kill_a_worker() -> None:
        wait_for(lambda: epochs_of(run))
        kill_while_it_hands_over(run, 1)
        wait_for(lambda: any("lost" in line for line in lines_of(run)))
        while run.exists():
            seen[:] = lines_of(run) or seen
            time.sleep(0.02)

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    made = train(ring, small(*changes), workers=2, out=out)
    killer.join(10)

    groups = [line["pids"] for line in seen if "pids" in line]
    assert len(groups) == 2
    assert set(groups[0]).isdisjoint(groups[1])
    assert sum("lost" in line for line in seen) == 1
    assert [line["epoch"] for line in seen if "epoch" in line] == list(range(1, 7)), "none is told twice"
    history = made.manifest.report["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 7))
    assert load_model(made).state_dict().keys()
    assert made.manifest.parents["dataset"]["hash"] == ring.artefact.hash
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    words = capfd.readouterr().err
    assert "lost the worker of rank" in words
    assert "epoch 6/6" in words

    alone = train(ring, small(*changes), workers=0, out=tmp_path / "alone")
    losses = [[h["loss"] for h in each.manifest.report["history"]] for each in (made, alone)]
    assert np.allclose(*losses, rtol=1e-4), "as if nobody had been killed, and in one process"


DRIVER = """
import sys
from recray.data.dataset import open_dataset
from recray.recipes import recipe
from recray.training.run import RunFolder, train
if __name__ == "__main__":
    train(open_dataset(sys.argv[1]), recipe("sasrec", sys.argv[3:]), workers=1, out=sys.argv[2])
"""


def test_a_killed_driver_is_run_again_and_goes_on(
    ray_cluster: str,
    ring: Dataset,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With so low a rate no weight changes: of epochs that are alike the first is the best."""
    out, run = tmp_path / "checkpoint", tmp_path / ".checkpoint.run"
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    words = [*SMALL, "train.epochs=25", "train.lr=1e-30"]
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen(
        [sys.executable, str(script), ring.artefact.place.uri, str(out), *words],
        env={**os.environ, "RAY_ADDRESS": ray_cluster, "PYTHONPATH": root},
        cwd=root,
    )
    try:
        wait_for(lambda: len(epochs_of(run)) >= 2 or driver.poll() is not None)
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    assert epochs_of(run)[-1]["epoch"] < 25, "the driver was killed too late to show anything"
    assert not out.exists()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in workers_of(run)))
    known = epochs_of(run)
    (run / "train" / "checkpoint_manager_snapshot.json").write_bytes(b'{"half":')  # killed while it wrote
    (run / "train" / "checkpoint_half").mkdir()  # and while a state was on its way
    monkeypatch.setattr(RunFolder, "remove", lambda self: None)
    capfd.readouterr()

    made = train(ring, recipe("sasrec", words), workers=1, out=out)
    said = capfd.readouterr().err
    assert f"going on after epoch {known[-1]['epoch']} of 25" in said
    assert f"epoch {known[-1]['epoch']}/25" not in said
    history = made.manifest.report["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 26))
    assert [h["loss"] for h in history[: len(known)]] == [line["loss"] for line in known]
    assert made.manifest.report["valid"]["epoch"] == 1
    left = [open_state(state).position.epoch for state in (run / "train").glob("checkpoint_*/")]
    assert sorted(left) == [1, 25], "the best and the newest, and nothing half"


def test_an_error_of_one_rank_is_the_caller_s_and_the_states_before_it_are_kept(
    ray_cluster: str, ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worker(job: Mapping[str, Any]) -> None:
        outbox = on_ray._Outbox(place(job["storage"]))
        for word in ("one", "two"):
            outbox.send({"score": 0}, lambda to, word=word: write(to / f"{word}-{outbox.rank}"))  # type: ignore
        if outbox.rank == 1:
            outbox.settle()
            raise TrainingError("the loss is nan", where="part-1", fix="lower train.lr")
        torch.distributed.barrier()

    def write(path: Path) -> None:
        path.write_text("x")

    monkeypatch.setattr(on_ray, "_worker", worker)
    with pytest.raises(TrainingError, match=r"^part-1: the loss is nan\. lower train\.lr$"):
        train(ring, small(), workers=2, out=tmp_path / "checkpoint")
    (state,) = (tmp_path / ".checkpoint.run" / "train").glob("checkpoint_*/")
    assert sorted(path.name for path in state.iterdir()) == ["two-0", "two-1"], "the files of both ranks"
    assert state.name in state.with_name("checkpoint_manager_snapshot.json").read_text()


def test_a_model_in_closed_form_is_fitted_by_all_ranks(
    ray_cluster: str, ring: Dataset, tmp_path: Path
) -> None:
    settings = recipe("ials", ["options.dim=8"])
    finished = on_ray.train_on_ray(
        ring, settings, {"recipe": "a"}, workers=2, gpu=False, folder=tmp_path, storage=place(tmp_path)
    )
    alone = build_model("ials", Catalogue(ring.n_items, ring.context_sizes), settings.options)
    measured = alone.fit(ring, seed=settings.train.seed)
    assert json.loads((finished.best / on_ray.FITTED).read_text()) == measured
    found, wanted = load_file(finished.best / WEIGHTS), alone.state_dict()
    assert found.keys() == wanted.keys()
    assert all(np.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5) for name in wanted)

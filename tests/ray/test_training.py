"""Training on Ray Train workers: it ends in a checkpoint, also when a worker or the driver is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from recray.data.dataset import Dataset
from recray.models.saved import load_model
from recray.recipes import Recipe, recipe
from recray.training.loop import TrainingError
from recray.training.run import train

# Ray itself uses what it deprecates
pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

SMALL = ["options.dim=8", "options.blocks=1", "train.batch_size=16", "train.patience=0", "train.threads=1"]


def small(*changes: str) -> Recipe:
    return recipe("sasrec", [*SMALL, *changes])


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The epochs that the controller has told of."""
    try:
        *whole, _ = (run / "epochs.jsonl").read_text().split("\n")
        return [json.loads(line) for line in whole]
    except FileNotFoundError:
        return []


def wait_for(what: Callable[[], Any], seconds: float = 150) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came in time"
        time.sleep(0.02)
    return found


def test_a_killed_worker_costs_at_most_an_epoch(
    ray_cluster: str, ring: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "checkpoint", tmp_path / ".checkpoint.run"
    seen: list[dict[str, Any]] = []

    def kill_a_worker() -> None:
        first = wait_for(lambda: lines_of(run))[0]
        assert psutil.Process(first["pids"][1]).name().startswith("ray::")
        os.kill(first["pids"][1], signal.SIGKILL)
        wait_for(lambda: any("lost" in line for line in lines_of(run)))
        while run.exists():
            seen[:] = lines_of(run) or seen
            time.sleep(0.02)

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    made = train(ring, small("train.epochs=15"), workers=2, out=out)
    killer.join(10)

    lost = next(i for i, line in enumerate(seen) if "lost" in line)
    before, after = seen[lost - 1]["epoch"], seen[lost + 1]["epoch"]
    assert before < 15, "the worker was killed too late to show anything"
    assert after in (before, before + 1)
    assert set(seen[lost + 1]["pids"]).isdisjoint(seen[lost - 1]["pids"])
    history = made.manifest.report["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 16))
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert load_model(made).state_dict().keys()
    assert made.manifest.parents["dataset"]["hash"] == ring.artefact.hash
    assert not run.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    words = capfd.readouterr().err
    assert "lost the worker of rank" in words
    assert "epoch 15/15" in words

    alone = train(ring, small("train.epochs=3"), workers=0, out=tmp_path / "alone")
    for here, there in zip(alone.manifest.report["history"], history):
        assert np.isclose(here["loss"], there["loss"], rtol=1e-2)  # dropout is drawn a rank, so not equal


DRIVER = """
import sys
from recray.data.dataset import open_dataset
from recray.recipes import recipe
from recray.training.run import train
if __name__ == "__main__":
    train(open_dataset(sys.argv[1]), recipe("sasrec", sys.argv[3:]), workers=1, out=sys.argv[2])
"""


def test_a_killed_driver_is_run_again_and_goes_on(
    ray_cluster: str, ring: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, run = tmp_path / "checkpoint", tmp_path / ".checkpoint.run"
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    words = [*SMALL, "train.epochs=25"]
    root = str(Path(__file__).parents[2])
    driver = subprocess.Popen(
        [sys.executable, str(script), ring.artefact.place.uri, str(out), *words],
        env={**os.environ, "RAY_ADDRESS": ray_cluster, "PYTHONPATH": root},
        cwd=root,
    )
    try:
        wait_for(lambda: len(lines_of(run)) >= 2 or driver.poll() is not None)
        assert driver.poll() is None
    finally:
        driver.kill()
        driver.wait()
    known = lines_of(run)
    assert known[-1]["epoch"] < 25, "the driver was killed too late to show anything"
    assert not out.exists()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in known[0]["pids"]))
    known = lines_of(run)
    capfd.readouterr()

    made = train(ring, recipe("sasrec", words), workers=1, out=out)
    said = capfd.readouterr().err
    assert f"going on after epoch {known[-1]['epoch']} of 25" in said
    assert f"epoch {known[-1]['epoch']}/25" not in said
    history = made.manifest.report["history"]
    assert [epoch["epoch"] for epoch in history] == list(range(1, 26))
    assert [h["loss"] for h in history[: len(known)]] == [line["loss"] for line in known]


def test_a_worker_s_error_reaches_the_caller_as_one_line(
    ray_cluster: str, ring: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"epoch 1, step \d+\. lower train\.lr"):
        train(ring, small("train.lr=1e30", "train.warmup_steps=0"), workers=1, out=tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()

"""Faults of training that take minutes: many kills, errors met on a worker, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from recray.data.dataset import Dataset
from recray.errors import ConfigError, InputError
from recray.training.run import train
from tests.ray.test_training import DRIVER, SMALL, epochs_of, lines_of, small, wait_for, workers_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray_cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.timeout(900),
]


def test_three_kills_in_one_run(ray_cluster: str, ring: Dataset, tmp_path: Path) -> None:
    out, run = tmp_path / "checkpoint", tmp_path / ".checkpoint.run"
    killed: list[int] = []

    def kill_thrice() -> None:
        for rank in (0, 1, 0):
            before = len(epochs_of(run))
            wait_for(lambda: len(epochs_of(run)) > before, 300)  # noqa: B023
            os.kill(workers_of(run)[rank], signal.SIGKILL)
            killed.append(rank)
            wait_for(lambda: sum("lost" in x for x in lines_of(run)) == len(killed), 300)

    killer = threading.Thread(target=kill_thrice, daemon=True)
    killer.start()
    made = train(ring, small("train.epochs=60"), workers=2, out=out)
    killer.join(10)
    assert len(killed) == 3
    assert [epoch["epoch"] for epoch in made.manifest.report["history"]] == list(range(1, 61))
    assert not run.exists()


def test_a_worker_s_bad_setting_is_told_as_it_is(ray_cluster: str, ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ndgc@10"):
        train(ring, small("train.metric=ndgc@10"), workers=2, out=tmp_path / "checkpoint")
    made = train(ring, small("train.epochs=1"), workers=2, out=tmp_path / "checkpoint")
    assert len(made.manifest.report["history"]) == 1, "the error of the run before is forgotten"


def test_more_workers_than_the_cluster_has(ray_cluster: str, ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="64 workers want 64 CPUs"):
        train(ring, small(), workers=64, out=tmp_path / "checkpoint")


def test_an_interrupt_stops_all_and_the_run_goes_on_later(ring: Dataset, tmp_path: Path) -> None:
    """The driver has a cluster of its own, which must be gone with it."""
    out, run = tmp_path / "checkpoint", tmp_path / ".checkpoint.run"
    root = str(Path(__file__).parents[2])
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"PYTHONPATH": root}
    words = [*SMALL, "train.epochs=200"]
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, ring.artefact.place.uri, str(out), *words],
        env=env,
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stderr is not None
    try:
        wait_for(lambda: len(epochs_of(run)) >= 2 or driver.poll() is not None, 300)
        tree = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGINT)
        said = driver.stderr.read()
        assert driver.wait(120) != 0
    finally:
        driver.kill()
        driver.stderr.close()
    assert "KeyboardInterrupt" in said
    assert not out.exists()
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in tree), 60)
    assert run.is_dir(), "what was learned is kept"

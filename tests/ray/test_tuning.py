"""A search on Ray Tune: it ends right, its actors are reused, and a killed driver repeats no trial."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recray.storage import place
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point, Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, TrialCache

# Ray itself uses what it deprecates
pytestmark = [
    pytest.mark.ray_cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

DRIVER = """
import sys, time
from pathlib import Path
from recray.storage import place
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, TrialCache

folder, pause = Path(sys.argv[1]), float(sys.argv[2])

def objective(point):
    time.sleep(pause)
    with (folder / "ran.log").open("a") as log:
        log.write(f"{point['x']}\\n")
    return Outcome({"q": float(point["x"])})

searcher = ConstrainedSearcher(Space.parse(["x=1..200"]), {"q": "max"}, sampler="tpe", seed=1)
cache = TrialCache(place(folder / "trials"), {"of": "driver"})
print(len(run(Sweep(searcher, cache, 10), objective, workers=2)))
"""


def sweep(folder: Path, trials: int) -> Sweep:
    searcher = ConstrainedSearcher(
        Space.parse(["x=1..30"]), {"q": "max"}, limits={"cost": 20}, sampler="tpe", startup=4
    )
    return Sweep(searcher, TrialCache(place(folder), {"of": "test"}), trials)


def test_a_search_on_ray_reuses_actors_and_a_failing_trial_fails_alone(
    ray_cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def objective(point: Point) -> Outcome:
        x = int(str(point["x"]))
        if x % 3 == 0:
            raise ValueError("thirds are broken")
        return Outcome({"q": float(x), "cost": float(x)}, {"pid": os.getpid()})

    found = run(sweep(tmp_path, 10), objective, workers=2, address=ray_cluster)
    assert [trial.number for trial in found] == list(range(1, 11))
    assert len({trial.point["x"] for trial in found}) == 10
    for trial in found:
        broken = int(str(trial.point["x"])) % 3 == 0
        assert trial.error == ("ValueError: thirds are broken" if broken else None)
    assert len({trial.detail["pid"] for trial in found if not trial.error}) <= 2
    told = capfd.readouterr()
    assert told.out == ""
    assert len([line for line in told.err.splitlines() if line.startswith("trial ")]) == 10
    assert "Traceback" not in told.err


def test_a_worker_that_dies_costs_no_more_than_its_trial(ray_cluster: str, tmp_path: Path) -> None:
    def objective(point: Point) -> Outcome:
        if point["x"] == 17:  # the first that seed 0 asks for
            os._exit(1)
        return Outcome({"q": float(str(point["x"])), "cost": 1.0})

    found = run(sweep(tmp_path, 4), objective, workers=1, address=ray_cluster)
    assert [t.error for t in found if t.point["x"] == 17] == ["the worker that ran it died"]
    assert sum(t.error is None for t in found) == 3


def test_a_killed_driver_repeats_no_finished_trial(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster, "PYTHONPATH": root}

    def command(pause: float) -> list[str]:
        return [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), str(pause)]

    with subprocess.Popen(command(0.5), env=environment, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 120
        while len(kept(tmp_path)) < 3:
            assert first.poll() is None, "the driver ended too early"
            assert time.monotonic() < until, "no trial came in time"
            time.sleep(0.05)
        first.kill()
    finished = kept(tmp_path)
    time.sleep(1)  # trials that were running end with their job
    ended = subprocess.run(
        command(0.0), env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "10\n"
    assert f"{len(finished)} trials were finished before and are kept" in ended.stderr
    assert finished < kept(tmp_path)
    ran = (tmp_path / "ran.log").read_text().split()
    assert len(kept(tmp_path)) == 10
    assert len(ran) <= 10 + 2, "only trials that were not finished may run again: one a worker"
    assert ended.stderr.count("\ntrial ") + ended.stderr.startswith("trial ") == 10 - len(finished)


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "trials").glob("*.json")}

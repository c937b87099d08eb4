"""A search on Ray Tune: it ends right, its actors are reused, and a killed driver repeats no trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recray.storage import place
from recray.tuning.halving import Halving, Rungs
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
from recray.tuning.halving import Halving, Rungs
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, TrialCache

folder, pause = Path(sys.argv[1]), float(sys.argv[2])

def objective(point, until):
    state = folder / f"{point['x']}.state"
    done = int(state.read_text()) if state.exists() else 0
    last = min(until or 9, 9)
    for epoch in range(done + 1, last + 1):
        time.sleep(pause)
        state.with_suffix(".new").write_text(str(epoch))
        state.with_suffix(".new").replace(state)
        with (folder / "ran.log").open("a") as log:
            log.write(f"{point['x']} {epoch}\\n")
    values = [float(point["x"] * epoch) for epoch in range(1, last + 1)]
    return Outcome({"q": values[-1]}, {"values": values, "standing": "waits" if last < 9 else "ended"})

searcher = ConstrainedSearcher(Space.parse(["x=1..200"]), {"q": "max"}, sampler="tpe", seed=1)
cache = TrialCache(place(folder / "trials"), {"of": "driver"})
started = TrialCache(place(folder / "started"), {"of": "driver"})
sweep = Sweep(searcher, cache, 10, rungs=Rungs(Halving(9, 1, 3), 10), started=started)
print(len(run(sweep, objective, workers=2)))
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


def test_trials_wait_at_their_rungs_and_go_on_on_any_worker(ray_cluster: str, tmp_path: Path) -> None:
    def objective(point: Point, until: int | None) -> Outcome:
        values = [float(str(point["x"])) * epoch for epoch in range(1, min(until or 9, 9) + 1)]
        standing = "waits" if len(values) < 9 else "ended"
        return Outcome({"q": values[-1]}, {"values": values, "standing": standing})

    def rungs() -> Rungs:
        return Rungs(Halving(9, 1, 3), 12)

    searcher = ConstrainedSearcher(Space.parse(["x=1..100"]), {"q": "max"}, sampler="tpe", startup=12)
    cache = TrialCache(place(tmp_path), {"of": "rungs"})
    found = run(Sweep(searcher, cache, 12, rungs=rungs()), objective, workers=2, address=ray_cluster)
    assert [trial.error for trial in found] == [None] * 12
    ran = {trial.point["x"]: len(trial.detail["values"]) for trial in found}
    assert set(ran.values()) <= {1, 3, 9}
    assert ran[max(ran)] == 9
    assert sum(ran.values()) <= 12 * 9 / 2
    assert [t.detail["standing"] == "ended" for t in found] == [len(t.detail["values"]) == 9 for t in found]
    again = Sweep(searcher, cache, 12, rungs=rungs())
    assert again.over, "a trial that was stopped is finished"


def test_a_killed_driver_repeats_no_finished_trial(ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster, "PYTHONPATH": root}

    def command(pause: float) -> list[str]:
        return [sys.executable, str(tmp_path / "driver.py"), str(tmp_path), str(pause)]

    with subprocess.Popen(command(0.2), env=environment, stderr=subprocess.DEVNULL) as first:
        until = time.monotonic() + 120
        while not (kept(tmp_path) and under_way(tmp_path)):
            assert first.poll() is None, "the driver ended too early"
            assert time.monotonic() < until, "no trial came in time"
            time.sleep(0.02)
        first.kill()
    time.sleep(1)  # trials that were running end with their job
    finished, cut = kept(tmp_path), under_way(tmp_path)
    ended = subprocess.run(
        command(0.0), env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "10\n"
    assert f"{len(finished)} trials were finished before and are kept" in ended.stderr
    assert finished < kept(tmp_path)
    assert len(kept(tmp_path)) == 10
    assert cut <= {
        json.loads(path.read_text())["point"]["x"] for path in (tmp_path / "trials").glob("*.json")
    }
    ran = (tmp_path / "ran.log").read_text().splitlines()
    assert len(ran) == len(set(ran)), "no epoch runs twice, not even of a trial that was cut off"
    assert len({line.split()[0] for line in ran}) == 10
    told = [line for line in ended.stderr.splitlines() if line.startswith("trial ")]
    assert len([line for line in told if "waits after" not in line]) == 10 - len(finished)


def under_way(folder: Path) -> set[int]:
    """The points that have a state, and no result yet."""
    ended = {json.loads(path.read_text())["point"]["x"] for path in (folder / "trials").glob("*.json")}
    return {int(path.stem) for path in folder.glob("*.state")} - ended


def kept(folder: Path) -> set[str]:
    return {path.name for path in (folder / "trials").glob("*.json")}

"""A job of 200 trials on two nodes, one of which is lost on the way, ends with the front it should have."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks._search_nodes import TRIALS
from benchmarks._search_planted import ALLOWED, OPTIMUM, fits, planted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray_cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="several local raylets need Linux"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cluster() -> Iterator[tuple[dict[str, str], Path]]:
    """A head and one worker: the environment of a client, and the folder of their state."""
    state = Path(f"/tmp/recray-soak-{os.getpid()}")  # short: sockets lie in it
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RECRAY_CLUSTER": str(state), "PYTHON": sys.executable, "CPUS": "1", "WORKERS": "1"}
    try:
        up = subprocess.run(
            [ROOT / "cluster/local/up.sh"], env=env, capture_output=True, text=True, timeout=300
        )
        assert up.returncode == 0, up.stderr
        lines = Path(up.stdout.strip()).read_text().splitlines()
        given = (line.removeprefix("export ").partition("#")[0].strip() for line in lines)
        yield {**env, **dict(word.split("=", 1) for word in given)}, state
    finally:
        subprocess.run([ROOT / "cluster/local/down.sh"], env=env, check=True, timeout=60)
        shutil.rmtree(state, ignore_errors=True)


def kept(folder: Path) -> list[dict[str, Any]]:
    """The trials that have ended so far."""
    return [json.loads(path.read_text()) for path in folder.glob("*.json")]


def test_a_search_that_loses_a_node_ends_with_the_right_front(
    cluster: tuple[dict[str, str], Path], tmp_path: Path
) -> None:
    env, state = cluster
    ray = Path(sys.executable).with_name("ray")
    words = [ray, "job", "submit", "--working-dir", ROOT, "--", "python", "-m", "benchmarks._search_nodes"]
    out = tmp_path / "trials"
    without = {name: value for name, value in env.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen([*words, out], env=without, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
        try:
            until = time.monotonic() + 600
            while len({trial["detail"]["node"] for trial in kept(out)}) < 2 or len(kept(out)) < 40:
                assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                assert time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.2)
            worker = int((state / "pids").read_text().split()[1])
            os.killpg(worker, signal.SIGKILL)
            before = len(kept(out))
            assert before < TRIALS, "it ended before the node was lost"
            assert job.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            job.kill()
            job.wait()
    said = next(
        json.loads(line)
        for line in reversed((tmp_path / "log").read_text().splitlines())
        if line.startswith("{")
    )
    found = kept(out)
    assert said["trials"] == TRIALS
    assert len(found) == TRIALS - said["failed"]
    assert said["failed"] <= 2
    assert len({json.dumps(trial["point"], sort_keys=True) for trial in found}) == len(found)
    assert all(trial["metrics"] == pytest.approx(planted(trial["point"])) for trial in found)
    best = max(trial["metrics"]["quality"] for trial in found if fits(trial["metrics"]))
    assert best == pytest.approx(said["best"])
    assert best >= (1 - ALLOWED / 100) * OPTIMUM

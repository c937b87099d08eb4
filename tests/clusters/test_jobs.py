"""`ray job submit` to the cluster of cluster/local: train, search, and read back what was made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from recray.data.dataset import Dataset
from recray.manifest import open_artefact
from recray.models.saved import load_model

pytestmark = [
    pytest.mark.ray_cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="several local raylets need Linux"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a client of a fresh local cluster."""
    state = Path(f"/tmp/recray-test-{os.getpid()}")  # short: sockets lie in it
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"RECRAY_CLUSTER": str(state), "PYTHON": sys.executable, "CPUS": "1"}
    try:
        up = subprocess.run(
            [ROOT / "cluster/local/up.sh"], env=env, capture_output=True, text=True, timeout=400
        )
        assert up.returncode == 0, up.stderr
        lines = Path(up.stdout.strip()).read_text().splitlines()
        given = (line.removeprefix("export ").partition("#")[0].strip() for line in lines)
        yield {**env, **dict(word.split("=", 1) for word in given)}
    finally:
        pids = [int(p) for p in (state / "pids").read_text().split()] if (state / "pids").exists() else []
        subprocess.run([ROOT / "cluster/local/down.sh"], env=env, check=True, timeout=60)
        left = [
            p for p in psutil.process_iter(["cmdline"]) if str(state) in " ".join(p.info["cmdline"] or ())
        ]
        shutil.rmtree(state)
        assert pids
        assert not left
        assert not (state / "token").exists()


def test_a_submitted_job_trains(cluster: dict[str, str], ring: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "checkpoint"
    words = ["--recipe", "sasrec", "--workers", "2", "--set", "train.epochs=2", "--set", "options.dim=8"]
    job = [ROOT / "cluster/jobs/train.sh", ring.artefact.place.uri, *words, "--out", out]
    done = subprocess.run(job, env=cluster, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = open_artefact(out, "checkpoint")
    assert len(made.manifest.report["history"]) == 2
    assert load_model(made).n_items == ring.n_items
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    # a bad run is a job that fails, with the line a person needs in its log
    bad = [ROOT / "cluster/jobs/train.sh", ring.artefact.place.uri, "--recipe", "sasrek", "--out", out]
    done = subprocess.run(bad, env=cluster, capture_output=True, text=True, timeout=400)
    assert done.returncode != 0
    assert "did you mean 'sasrec'" in done.stdout + done.stderr


def test_a_submitted_search_spreads_its_trials_over_the_nodes(
    cluster: dict[str, str], ring: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "search"
    words = ["--recipe", "sasrec", "--space", "train.lr=1e-4..1e-1@log", "options.dim=4,8", "--trials", "6"]
    words += ["--workers", "2", "--set", "train.epochs=9", "--set", "train.patience=0"]
    words += [
        "--set",
        "train.batch_size=1",
    ]  # so long that the first node is not done before the second is up
    job = [ROOT / "cluster/jobs/tune.sh", ring.artefact.place.uri, *words, "--out", out]
    done = subprocess.run(job, env=cluster, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    made = open_artefact(out, "search")
    trials = [json.loads(path.read_text()) for path in (out / "trials").iterdir()]
    assert [trial["error"] for trial in trials] == [None] * 6
    assert len({trial["detail"]["node"] for trial in trials}) >= 2
    epochs = made.manifest.report["epochs"]
    assert epochs["spent"] == sum(trial["detail"]["epochs"] for trial in trials) < epochs["all"] == 54
    assert load_model(open_artefact(out / "best", "checkpoint")).n_items == ring.n_items
    assert [p.name for p in tmp_path.iterdir()] == ["search"]
    # submitted again it has nothing left to try
    done = subprocess.run(job, env=cluster, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 trials were finished before and are kept" in done.stdout + done.stderr
    assert {path.name for path in (out / "trials").iterdir()} == {f"{trial['hash']}.json" for trial in trials}

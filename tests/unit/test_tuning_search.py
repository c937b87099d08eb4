"""`recray tune` with real training on a small synthetic world: epochs are spared, a kill costs none twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import recray
from recray.data.synthetic import WorldConfig, make, write_world
from recray.manifest import open_artefact

ROOT = Path(__file__).parents[2]
SPACE = ["train.lr=1e-4..1e-1@log", "options.dim=4,8,16"]
SMALL = [
    "train.epochs=9", "train.patience=0", "train.batch_size=32", "train.threads=1", "train.warmup_steps=10",
    "options.blocks=1",
]  # fmt: skip
TRIALS = 8
EPOCH = re.compile(r"^epoch \d+/9", re.MULTILINE)  # training says a line of each


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(make(WorldConfig(n_users=150, n_items=120, mean_length=10, seed=3)), folder)
    recray.prepare(folder / "log.parquet", out=folder / "data")
    return folder / "data"


def front(search: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((search / "front.json").read_bytes())
    return found


def test_halving_trains_at_most_half_of_the_epochs(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tuned"
    recray.tune(world, recipe="sasrec", space=SPACE, set=SMALL, trials=TRIALS, out=out)
    told, rows = capfd.readouterr().err, front(out)["trials"]
    spent = len(EPOCH.findall(told))
    assert spent <= TRIALS * 9 / 2
    assert recray.show(out)["report"]["epochs"] == {"spent": spent, "all": TRIALS * 9}
    assert recray.show(out)["report"]["picture"] == "trials.html"
    assert f"{spent} epochs were trained; every trial run out takes 72" in told
    best = max(rows, key=lambda row: row["metrics"]["ndcg@10"])
    assert best["epochs"] == 9
    assert {row["epochs"] for row in rows if row["stopped"]} <= {1, 3}
    assert told.count("going on after epoch") >= 2, "what waits is not trained again"
    left = open_artefact(out / "best", "checkpoint").manifest
    assert left.recipe["train"]["lr"] == best["point"]["train.lr"]
    assert len(left.report["history"]) == 9


def test_a_model_without_epochs_is_searched_to_the_end(world: Path, tmp_path: Path) -> None:
    recray.tune(world, recipe="ials", space=["options.dim=4,8"], trials=2, out=tmp_path / "tuned")
    assert [row["stopped"] for row in front(tmp_path / "tuned")["trials"]] == [False, False]
    assert recray.show(tmp_path / "tuned")["report"]["epochs"] == {"spent": 0, "all": 0}


def test_a_killed_search_goes_on_in_the_midst_of_a_trial(world: Path, tmp_path: Path) -> None:
    words = [
        "tune",
        str(world),
        "--recipe",
        "sasrec",
        "--trials",
        str(TRIALS),
        "--out",
        "tuned",
        "--space",
        *SPACE,
    ]
    command = [sys.executable, "-m", "recray", *words, *(part for each in SMALL for part in ("--set", each))]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = ""
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        for line in first.stderr:  # the one of three that went on is in the midst of its stretch
            before += line
            if line.startswith("epoch 2/9"):
                break
        first.send_signal(signal.SIGKILL)
        before += first.stderr.read()
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    found = front(tmp_path / "tuned")
    trained = len(EPOCH.findall(before)) + len(EPOCH.findall(ended.stderr))
    assert trained - found["epochs"]["spent"] in (0, 1), "at most the epoch that was cut is trained again"
    assert len(found["trials"]) == TRIALS
    assert "1 trials were finished before and are kept" in ended.stderr, "the worst of three has no chance"
    assert "2 trials were begun before and go on where they were" in ended.stderr
    assert "going on after epoch 2" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]

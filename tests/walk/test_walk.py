"""The whole path on a tiny world through the command line: every verb eats what the one before left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from recray.data.synthetic import WorldConfig, make, write_world
from recray.serving.on_ray import serving

pytestmark = pytest.mark.ray_cluster


class Shell:
    """Runs `recray` as a person would, in a folder of its own, on the session's cluster."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        self.env = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"}

    def __call__(self, *words: str) -> str:
        """Standard output of a command that must end well."""
        done = subprocess.run(
            [sys.executable, "-m", "recray", *words],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"recray {' '.join(words)}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr
        return done.stdout.strip()

    def made(self, *words: str) -> str:
        """The path that a command printed: one line, and an artefact is there."""
        path = self(*words)
        assert (self.folder / path / "manifest.json").is_file(), path
        return path

    def told(self, *words: str) -> Any:
        """The JSON that a command printed."""
        return json.loads(self(*words, "--json"))


@pytest.fixture
def recray(tmp_path: Path, ray_cluster: str) -> Shell:
    write_world(make(WorldConfig(n_users=250, n_items=130, mean_length=14, seed=5)), tmp_path / "world")
    return Shell(tmp_path, ray_cluster)


@pytest.mark.timeout(600)
def test_from_a_log_to_an_answer_over_http(recray: Shell) -> None:
    data = recray.made(
        "prepare", "world/log.parquet", "--items", "world/items.parquet", "--users", "world/users.parquet",
        "--context", "weekday,weather", "--out", "data",
    )  # fmt: skip
    fast = ("--set", "options.dim=32", "--set", "train.batch_size=16", "--set", "train.lr=0.005")
    popular = recray.made("train", data, "--recipe", "popularity", "--out", "popular")
    sasrec = recray.made(
        "train", data, "--recipe", "sasrec", "--workers", "2", *fast, "--set", "train.epochs=6",
        "--out", "sasrec",
    )  # fmt: skip
    neumf = recray.made(
        "train", data, "--recipe", "neumf", *fast, "--set", "train.epochs=2", "--out", "neumf"
    )

    ours, theirs = (recray.told("evaluate", which)["means"]["ndcg@10"] for which in (sasrec, popular))
    assert ours > 1.5 * theirs > 0

    plain = recray.made("bundle", sasrec, "--ranker", neumf, "--out", "plain")
    search = recray.made(
        "compress", sasrec, "--ranker", neumf, "--p99", "5s", "--size", "2MB", "--trials", "2",
        "--out", "search",
    )  # fmt: skip
    bundle = recray.made("bundle", search, "--out", "bundle")
    sizes = [recray.told("evaluate", which)["means"]["ndcg@10"] for which in (plain, bundle)]
    assert min(sizes) > theirs

    lineage = json.dumps(recray.told("show", bundle)["lineage"])
    for ancestor in (data, sasrec, neumf):
        hash_ = json.loads((recray.folder / ancestor / "manifest.json").read_bytes())["hash"]
        assert hash_ in lineage

    answer = recray.told("recommend", bundle, "--user", "u007", "-k", "5")
    items = [entry["item"] for entry in answer["items"]]
    assert len(set(items)) == 5

    with serving(recray.folder / bundle, port=0, name="walk") as url:
        request = urllib.request.Request(
            f"{url}/v1/recommend",
            json.dumps({"user": "u007", "k": 5}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            served = json.loads(reply.read())
    assert [entry["item"] for entry in served["items"]] == items
    assert served["generation"] == answer["generation"]

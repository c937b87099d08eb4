"""Training follows the nodes of its cluster: workers come with a node, and go with one."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from recray.data.dataset import Dataset
from tests.ray.test_training import SMALL

pytestmark = [pytest.mark.ray_cluster, pytest.mark.timeout(900)]

# A cluster of its own on loopback (see cluster/local/node.py), of one CPU a node. Workers are stopped while
# the test waits for the cluster, so that it does not matter who is quicker.
_SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import psutil
import ray
from ray._private import ray_constants, services
from ray.cluster_utils import Cluster
ray_constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from recray.data.dataset import open_dataset
from recray.recipes import recipe
from recray.training import on_ray
from recray.training.run import train

data, out, *changes = sys.argv[1:]
told = Path(out).with_name(f".{Path(out).name}.run") / "epochs.jsonl"

def lines():
    try:
        return [json.loads(line) for line in told.read_text().split("\\n")[:-1]]
    except FileNotFoundError:
        return []

def wait_for(what):
    until = time.monotonic() + 300
    while not any(map(what, lines())):
        assert time.monotonic() < until, lines()
        time.sleep(0.02)

def stop_workers(raylet):
    for pid in [line["pids"] for line in lines() if "pids" in line][-1]:
        if psutil.Process(pid).ppid() == raylet:
            os.kill(pid, signal.SIGSTOP)

def raylet(node):
    return node.all_processes["raylet"][0].process.pid

def come_and_go():
    wait_for(lambda line: line.get("epoch"))
    stop_workers(raylet(cluster.head_node))
    node = cluster.add_node(**small)
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    ray.get(coordinator.get_reserved_resources.remote("", True))  # it looks at the nodes every 20 s only
    wait_for(lambda line: line.get("epoch") and line["workers"] == 2)
    stop_workers(raylet(cluster.head_node))
    cluster.remove_node(node)

if __name__ == "__main__":
    small = {"node_ip_address": "127.0.0.1", "num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(True, head_node_args={**small, "include_dashboard": False}, shutdown_at_exit=False)
    try:
        os.environ["RAY_ADDRESS"] = cluster.address
        on_ray._LOOK_S = 1.0
        threading.Thread(target=come_and_go, daemon=True).start()
        made = train(open_dataset(data), recipe("sasrec", changes), workers=(1, 2), out=out)
        print(json.dumps(made.manifest.report["history"]))
    finally:
        ray.shutdown()
        cluster.shutdown()
"""


def test_a_run_grows_and_shrinks_with_its_cluster(ring: Dataset, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = str(Path(__file__).parents[2])
    words = [*SMALL, "train.epochs=12", "train.save_steps=4"]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, ring.artefact.place.uri, str(tmp_path / "out"), *words],
        env={**clean, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith(("now", "warning: lost", "epoch"))]
    resizes = [line for line in said if not line.startswith("epoch")]
    assert resizes[:2] == ["now 1 worker", "now 2 workers"]
    assert resizes[2].startswith("warning: lost the worker of rank")
    assert resizes[3:] == ["now 1 worker"]
    assert [line.partition("/")[0] for line in said if line.startswith("epoch")] == [
        f"epoch {number}" for number in range(1, 13)
    ]
    history = json.loads(done.stdout.splitlines()[-1])
    assert [epoch["epoch"] for epoch in history] == list(range(1, 13))
    assert history[-1]["loss"] < history[0]["loss"]

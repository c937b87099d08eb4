"""The files of cluster/: Kubernetes objects of the right form, scripts that refuse what cannot work."""

from __future__ import annotations

import os
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
JOBS = ROOT / "cluster" / "jobs"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERAY / f"{name}.yaml").read_text())
    return found


def cluster_of(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayService"])
def test_kinds(kind: str) -> None:
    found = load(kind.lower())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", kind)
    assert found["metadata"].get("name") or found["metadata"].get("generateName")


@pytest.mark.parametrize("name", ["raycluster", "rayjob", "rayservice"])
def test_clusters(name: str) -> None:
    spec = cluster_of(name)
    assert spec["rayVersion"] == metadata.version("ray")
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            assert container["image"].startswith("recray:")
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
            assert container["securityContext"]["runAsNonRoot"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_service_is_the_serve_graph() -> None:
    served = yaml.safe_load(load("rayservice")["spec"]["serveConfigV2"])
    graph = yaml.safe_load((ROOT / "deployments" / "serve" / "graph.yaml").read_text())
    for config in (served, graph):
        config["applications"][0]["args"].pop("bundle")
    assert served["applications"] == graph["applications"]
    head = cluster_of("rayservice")["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert served["http_options"]["port"] in [port["containerPort"] for port in head["ports"]]
    assert "RECRAY_TOKEN" in [variable["name"] for variable in head["env"]]


def test_the_job_is_a_command_we_have() -> None:
    from recray.cli.main import VERBS

    program, verb, *_ = load("rayjob")["spec"]["entrypoint"].split()
    assert program == "recray"
    assert verb in VERBS


@pytest.mark.parametrize(
    "script", sorted(ROOT.glob("cluster/*/*.sh")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_scripts_parse_and_may_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    "words, api, says",
    [
        (["d", "--out", "relative"], "http://127.0.0.1:1", "absolute"),
        (["d"], "http://127.0.0.1:1", "--out must be given"),
        (["d", "--out", "/x"], "", "no cluster"),
    ],
)
def test_a_job_that_cannot_work_is_refused(words: list[str], api: str, says: str) -> None:
    env = {**os.environ, "RAY_API_SERVER_ADDRESS": api}
    done = subprocess.run([JOBS / "train.sh", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert says in done.stderr


def test_going_down_without_a_cluster_is_fine(tmp_path: Path) -> None:
    env = {**os.environ, "RECRAY_CLUSTER": str(tmp_path / "none")}
    assert subprocess.run([ROOT / "cluster" / "local" / "down.sh"], env=env).returncode == 0

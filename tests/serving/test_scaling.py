"""The policy of `scaling` in Ray Serve's controller: one step up and down, and the graph that asks for it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from recray.serving.process import check_free
from tests.serving_bundles import small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(ray_cluster: str) -> Iterator[str]:
    """The address of a Serve instance for this module."""
    from ray import serve

    port = check_free("127.0.0.1", 0)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def details(name: str) -> dict[str, Any]:
    from ray.serve.context import _get_global_client

    told: dict[str, Any] = _get_global_client().get_serve_details()["applications"][name]
    return told


class Load:
    """So many requests a second, whatever comes back."""

    def __init__(self, url: str) -> None:
        self.rate, self.failed, self.answered, self._url = 1.0, 0, 0, url
        self._done = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(120)

    async def _run(self) -> None:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            tasks = []
            while not self._done.is_set():
                tasks.append(asyncio.create_task(self._one(client)))
                await asyncio.sleep(1 / self.rate)
            await asyncio.gather(*tasks)

    async def _one(self, client: httpx.AsyncClient) -> None:
        try:
            answer = await client.get(self._url)
            self.failed += answer.status_code != 200
        except httpx.HTTPError:
            self.failed += 1
        self.answered += 1


def test_one_replica_then_four_then_one_with_one_turn(root: str) -> None:
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from recray.serving.on_ray.scaling import POLICY

    policy = {"policy_function": POLICY, "policy_kwargs": {"calm_s": 8, "drain_s": 10}}
    app = {
        "name": "sleepers",
        "route_prefix": "/sleepers",
        "import_path": "tests.sleepers:build",
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
        "autoscaling_policy": policy,
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}))
    targets: list[int] = []

    def until(count: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            told = details("sleepers")["deployments"]["Ingress"]
            running = sum(one["state"] == "RUNNING" for one in told["replicas"])
            targets.append(told["target_num_replicas"])
            if (targets[-1], running) == (count, count):
                return
            time.sleep(0.25)
        raise AssertionError(f"never {count} replicas: {[n for n, _ in itertools.groupby(targets)]}")

    try:
        deadline = time.monotonic() + 120
        while details("sleepers")["status"] != "RUNNING":
            assert time.monotonic() < deadline, details("sleepers")["message"]
            time.sleep(0.1)
        with Load(f"{root}/sleepers") as load:
            load.rate = 4
            until(1)
            load.rate = 26  # 2.6 replicas' work: four, so that nobody waits for long
            until(4)
            load.rate = 2
            until(1)
        assert (load.failed, load.answered > 100) == (0, True)
    finally:
        serve.delete("sleepers")
    moves = [b - a for a, b in itertools.pairwise(targets) if a != b]
    assert sum(a * b < 0 for a, b in itertools.pairwise(moves)) == 1, "up, and then down"


def test_a_graph_with_a_target_is_deployed_with_the_policy(
    root: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from recray.serving.on_ray import serving
    from recray.serving.on_ray.scaling import POLICY

    bundle = small_bundle(tmp_path_factory.mktemp("scaled"))
    uri = bundle.artefact.place.uri
    with serving(uri, port=0, name="plain") as beside, serving(uri, port=0, name="held", p99="80 ms") as url:
        for one in (beside, url):
            answer = httpx.post(f"{one}/v1/recommend", json={"user": "u1", "k": 5}, timeout=60)
            assert answer.status_code == 200, answer.text
            want = [item.item for item in bundle.recommend(user="u1", k=5).items]
            assert [item["item"] for item in answer.json()["items"]] == want
        told = details("held")
        assert told["deployed_app_config"]["autoscaling_policy"]["policy_function"] == POLICY
        assert told["deployed_app_config"]["args"]["p99_ms"] == 80
        config = told["deployments"]["Ingress"]["deployment_config"]["autoscaling_config"]
        assert (config["metrics_interval_s"], config["downscale_delay_s"]) == (1, 0)
        with serving(uri, port=0, name="third", p99="80ms"):  # one more leaves the others as they are
            assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200

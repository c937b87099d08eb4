"""Events over real HTTP with two ingress replicas: the next answer of each knows them, whatever is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from recray.bundles.bundle import Bundle
from recray.errors import ConfigError
from recray.feedback.log import read
from tests.redis_server import RedisServer
from tests.serving_bundles import small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("serving"), ranker=False)


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Serve config whose ingress has two replicas that hold the models."""
    entry = {"name": "Ingress", "num_replicas": 2}
    app = {
        "import_path": "recray.serving.on_ray:build_app",
        "args": {"layout": "fused"},
        "deployments": [entry],
    }
    file = tmp_path_factory.mktemp("config") / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [app]}))
    return str(file)


def post(url: str, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
    """On a connection of its own, so that either replica may get it; a replica that dies is asked again."""
    for _ in range(20):
        answer = httpx.post(f"{url}/v1/{path}", json=body, timeout=60, **more)
        if answer.status_code != 500 or "recray" in answer.text:
            break
        time.sleep(0.2)
    return answer


def items(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item"] for item in answer.json()["items"]]


def did(user: str, item: str, **more: Any) -> dict[str, Any]:
    return {"user": user, "events": [{"item": item, **more}]}


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state") / "users"


@pytest.fixture(scope="module")
def url(ray_cluster: str, bundle: Bundle, two_replicas: str, folder: Path) -> Iterator[str]:
    from recray.serving.on_ray import serving

    uri = bundle.artefact.place.uri
    with serving(uri, config=two_replicas, port=0, name="state", state=str(folder)) as made:
        yield made


def test_the_very_next_answer_of_either_replica_knows_the_event(url: str, bundle: Bundle) -> None:
    done = []
    for turn in range(6):
        best = items(post(url, "recommend", {"user": "new", "k": 5}))[0]
        assert post(url, "events", did("new", best, time=1_700_000_000 + turn)).json()["accepted"] == 1
        done.append(best)
        want = [item.item for item in bundle.recommend(history=done, k=5).items]
        for _ in range(6):
            assert items(post(url, "recommend", {"user": "new", "k": 5})) == want
    assert len(set(done)) == 6, "what was consumed never came back"


def test_a_retry_doubles_nothing_and_a_killed_replica_loses_nothing(url: str, folder: Path) -> None:
    event = did("killed", "i1", event_id="e1", event="buy")
    assert post(url, "events", event).json()["repeated"] == 0
    with_it = items(post(url, "recommend", {"user": "killed"}))
    pids = _pids()
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(5):
        assert post(url, "events", event).json()["repeated"] == 1
        assert items(post(url, "recommend", {"user": "killed"})) == with_it
    mine = [line for line in read(folder, "events") if line["user"] == "killed"]
    assert {line["event_id"] for line in mine} == {"e1"}
    assert {line["event"] for line in mine} == {"buy"}
    until(lambda: len(_pids()) == 2)


def test_answers_are_logged_as_impressions(url: str, folder: Path) -> None:
    answer = post(url, "recommend", {"user": "u2", "k": 3}).json()
    shown = [item["item"] for item in answer["items"]]

    def logged() -> bool:
        return any(
            line["request_id"] == answer["request_id"] and line["items"] == shown
            for line in read(folder, "impressions")
        )

    until(logged)


def _pids() -> list[int]:
    import psutil

    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if "ServeReplica:state:Ingress" in words:
            found.append(process.pid)
    return found


def test_redis_killed_and_started_again(ray_cluster: str, bundle: Bundle, tmp_path: Path) -> None:
    from recray.serving.on_ray import serving

    server = RedisServer(tmp_path)
    server.start()
    logs = tmp_path / "logs"
    try:
        uri = bundle.artefact.place.uri
        with serving(uri, port=0, name="redis", state=server.url, feedback=str(logs)) as url:
            before = items(post(url, "recommend", {"user": "u1"}))
            assert post(url, "events", did("u1", before[0], event_id="e1")).json()["repeated"] == 0
            after = items(post(url, "recommend", {"user": "u1"}))
            assert before[0] not in after
            server.stop()
            answer = post(url, "recommend", {"user": "u1"})
            assert answer.json()["degraded"] == ["state unavailable"]
            assert items(answer) == before, "the bundle's own history"
            refused = post(url, "events", did("u1", before[1], event_id="e2"))
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200
            server.start()
            until(lambda: post(url, "recommend", {"user": "u1"}).json()["degraded"] == [])
            assert items(post(url, "recommend", {"user": "u1"})) == after, "nothing was lost"
            assert post(url, "events", did("u1", before[0], event_id="e1")).json()["repeated"] == 1
            assert post(url, "events", did("u1", before[1], event_id="e2")).json()["repeated"] == 0
            assert not {before[0], before[1]} & set(items(post(url, "recommend", {"user": "u1"})))
        assert {line["event_id"] for line in read(logs, "events")} == {"e1", "e2"}
    finally:
        server.stop()


def test_a_state_that_cannot_be_is_refused_before_anything_starts(
    ray_cluster: str, bundle: Bundle, tmp_path: Path
) -> None:
    from recray.serving.on_ray import serving

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot hold the state"):
        with serving(bundle.artefact.place.uri, port=0, name="never", state=str(tmp_path / "file")):
            pass

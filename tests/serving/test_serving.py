"""The serve graph on a real cluster: same answers, bad input, hang-ups, a killed replica, two apps."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from recray.bundles.bundle import Bundle
from recray.errors import InputError
from tests.serving_bundles import recommended, requests, small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deployments" / "serve"
TOKEN = "token-of-the-test"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("serving"))


def plain(bundle: Bundle) -> str:
    return bundle.artefact.place.uri


@pytest.fixture(scope="module")
def declared(ray_cluster: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """deployments/serve/graph.yaml with a bundle, a token and a free port, as the REST door deploys it."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from recray.serving import process

    raw = yaml.safe_load((FILES / "graph.yaml").read_text())
    raw["http_options"]["port"] = process.check_free("127.0.0.1", 0)
    token_file = tmp_path_factory.mktemp("token") / "token"
    token_file.write_text(TOKEN + "\n")
    raw["applications"][0]["args"] |= {"bundle": plain(bundle), "token_file": str(token_file)}
    raw["applications"][0]["name"] = "declared"
    config = ServeDeploySchema.model_validate(raw)
    serve.start(
        proxy_location=config.proxy_location,
        http_options=raw["http_options"],
        logging_config=raw["logging_config"],
    )
    try:
        url = "http://{host}:{port}".format(**raw["http_options"])
        _get_global_client().deploy_apps(config)
        process.wait_ready(url)  # more patient with a busy machine than Serve's own wait
        yield url
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def url(declared: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second application on the same cluster, split, with two replicas of the retriever."""
    from recray.serving.on_ray import serving

    raw = yaml.safe_load((FILES / "graph.yaml").read_text())
    for entry in raw["applications"][0]["deployments"]:
        if entry["name"] == "Retriever":
            del entry["autoscaling_config"]
            entry["num_replicas"] = 2
    file = tmp_path_factory.mktemp("config") / "two.yaml"
    file.write_text(yaml.safe_dump(raw))
    with serving(plain(bundle), config=str(file), port=0) as made:
        yield made


@pytest.fixture(scope="module")
def fused(declared: str, bundle: Bundle) -> Iterator[str]:
    """A third one, with the models in its ingress."""
    from recray.serving.on_ray import serving

    with serving(plain(bundle), port=0, name="fused") as made:
        yield made


@pytest.fixture(params=["url", "fused"])
def either(request: pytest.FixtureRequest) -> str:
    made: str = request.getfixturevalue(request.param)
    return made


def test_the_declared_graph_asks_for_its_token(declared: str, bundle: Bundle) -> None:
    with httpx.Client(base_url=declared, timeout=30) as client:
        assert client.post("/v1/recommend", json={"user": "u1"}).status_code == 401
        client.headers["authorization"] = f"Bearer {TOKEN}"
        answer = client.post("/v1/recommend", json={"user": "u1", "k": 5}).json()
    assert [i["item"] for i in answer["items"]] == [i.item for i in bundle.recommend(user="u1", k=5).items]


def test_an_answer_over_http_is_the_answer_in_process(either: str, bundle: Bundle) -> None:
    asks = list(requests(bundle))
    for ask, answer in zip(asks, recommended(either, asks, connections=8), strict=True):
        want, got = bundle.recommend(**ask), answer.json()
        assert answer.status_code == 200
        assert [i["item"] for i in got["items"]] == [i.item for i in want.items], ask
        assert [i["score"] for i in got["items"]] == pytest.approx([i.score for i in want.items], abs=1e-5)
        assert [i["source"] for i in got["items"]] == [i.source for i in want.items], ask
        assert (got["degraded"], got["generation"]) == (want.degraded, bundle.generation)
    with httpx.Client(base_url=either, timeout=30) as client:
        for item in bundle.items.ids_of([0, 7, 70]):
            got = client.get(f"/v1/items/{item}/similar?k=4").json()["items"]
            assert [i["item"] for i in got] == [i.item for i in bundle.similar(item, 4).items]


def test_bad_input_is_refused_and_the_server_keeps_answering(url: str) -> None:
    good = {"history": ["i1", "i2"], "k": 3}

    def endless() -> Iterator[bytes]:
        for _ in range(1600):
            yield b" " * 65536

    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"method": "POST", "url": "/v1/recommend", "content": b"{nonsense"}, {400}),
        ({"method": "POST", "url": "/v1/recommend", "json": {"k": 0}}, {422}),
        ({"method": "POST", "url": "/v1/recommend", "json": {"what": 1}}, {422}),
        ({"method": "POST", "url": "/v1/recommend", "json": {"filter": {"colour": "red"}}}, {422}),
        ({"method": "POST", "url": "/v1/recommend", "content": b" " * 100_000_000}, {413}),
        ({"method": "POST", "url": "/v1/recommend", "content": endless()}, {413}),
        ({"method": "GET", "url": "/v1/items/nowhere/similar"}, {404}),
        ({"method": "GET", "url": "/nowhere"}, {404}),
        ({"method": "DELETE", "url": "/v1/recommend"}, {405}),
    ]
    for case, statuses in cases:
        with httpx.Client(base_url=url, timeout=60) as client:
            try:
                answer = client.request(**case)
                assert answer.status_code in statuses, answer.text
                assert set(answer.json()["error"]) == {"code", "message", "where"}
            except httpx.WriteError:  # the server hung up on a body of 100 MB, after its answer
                assert 413 in statuses
        assert httpx.post(f"{url}/v1/recommend", json=good, timeout=30).status_code == 200


def test_a_small_bundle_is_fused_and_a_file_can_split_it(url: str, fused: str) -> None:
    from ray import serve

    running = {name: set(app.deployments) for name, app in serve.status().applications.items()}
    assert running["recray"] == {"Ingress", "Retriever", "Ranker"}
    assert running["fused"] == {"Ingress"}


def test_both_layouts_answer_the_same_bytes(url: str, fused: str, bundle: Bundle) -> None:
    """One after the other, so that batches are the same; request ids and timings are their own."""

    def asked(base: str) -> list[dict[str, Any]]:
        with httpx.Client(timeout=60) as client:
            told = [client.post(f"{base}/v1/recommend", json=ask).json() for ask in requests(bundle)]
        return [{key: one[key] for key in ("generation", "items", "degraded")} for one in told]

    assert asked(url) == asked(fused)


def test_clients_that_hang_up_harm_nobody(either: str) -> None:
    host, port = either.removeprefix("http://").split("/")[0].split(":")
    prefix = either.removeprefix(f"http://{host}:{port}")
    body = b'{"user": "u3"}'
    head = f"POST {prefix}/v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def scene() -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            stayed = []
            for _ in range(30):
                with socket.create_connection((host, int(port))) as leaver:
                    leaver.sendall(head + body)
                ask = client.post(f"{either}/v1/recommend", json={"user": "u1"})
                stayed.append(asyncio.create_task(ask))
                await asyncio.sleep(0.005)
            return [answer.status_code for answer in await asyncio.gather(*stayed)]

    assert asyncio.run(scene()) == [200] * 30


def test_a_killed_retriever_loses_no_request(url: str) -> None:
    from ray import serve

    handle = serve.get_deployment_handle("Retriever", "recray")
    pids: set[int] = set()
    deadline = time.monotonic() + 60
    while len(pids) < 2:
        assert time.monotonic() < deadline, "there are two replicas"
        pids.add(handle.pid.remote().result(timeout_s=30))

    async def scene() -> list[int]:
        statuses: list[int] = []
        start = time.monotonic()

        async def client(number: int) -> None:
            async with httpx.AsyncClient(timeout=60) as session:
                while time.monotonic() < start + 5 or len(statuses) < 60:
                    answer = await session.post(f"{url}/v1/recommend", json={"user": f"u{number}"})
                    statuses.append(answer.status_code)

        async def killer() -> None:
            while len(statuses) < 12:
                await asyncio.sleep(0.05)
            os.kill(min(pids), signal.SIGKILL)

        await asyncio.gather(killer(), *map(client, range(6)))
        return statuses

    assert [status for status in asyncio.run(scene()) if status != 200] == []


def test_serve_keeps_its_port_and_its_door_shut(url: str, bundle: Bundle) -> None:
    from recray.serving.on_ray import serving

    with pytest.raises(InputError, match="listens on port"):
        with serving(plain(bundle), port=1):
            pass


def test_a_signal_takes_the_application_away(
    url: str, ray_cluster: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import serve

    code = "import sys; from recray.serving.on_ray import run; run(sys.argv[1], port=0, address=sys.argv[2])"
    with subprocess.Popen(
        [sys.executable, "-c", code, plain(bundle), ray_cluster],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stderr is not None
        try:
            for line in child.stderr:
                if "serving" in line:
                    break
            assert "recray-2" in line
            assert "recray-2" in serve.status().applications
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) == 0
        finally:
            child.kill()
    assert "recray-2" not in serve.status().applications
    assert httpx.get(f"{url}/readyz", timeout=30).status_code == 200


def test_every_shipped_file_is_a_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    from recray.serving import on_ray, settings
    from recray.serving.on_ray.graph import options_of

    files = sorted(FILES.glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
        assert config.http_options.host == "127.0.0.1"
        assert config.applications[0].import_path == f"{on_ray.__name__}:{on_ray.build_app.__name__}"
        args, deployments = settings.read_file(str(file))
        assert set(deployments) == set(settings.DEPLOYMENTS if args["layout"] == "split" else ["Ingress"])
        assert set(args) < {field.name for field in dataclasses.fields(settings.GraphArgs)}
        for name, given in deployments.items():
            assert options_of(name, given)["max_ongoing_requests"] == (1000 if name == "Ingress" else 64)

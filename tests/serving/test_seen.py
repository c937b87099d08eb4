"""On a real cluster, in both layouts: answers made again, items that come and go, scraped metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import recray
from recray.bundles.bundle import Bundle
from recray.bundles.changes import change
from recray.feedback.log import read
from tests.serving_bundles import requests, small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ADMIN = "admin-of-the-test"
LOGS: dict[str, Path] = {}  # application -> the folder of its logs
LOOKS = 8  # connections of their own, so that both replicas are met


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module", params=["fused", "split"])
def url(
    request: pytest.FixtureRequest,
    ray_cluster: str,
    bundle: Bundle,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """Two replicas of every deployment; answers are kept."""
    from recray.serving.on_ray import serving

    folder = tmp_path_factory.mktemp("config")
    (folder / "token").write_text(ADMIN)
    names = ["Ingress"] if request.param == "fused" else ["Ingress", "Retriever", "Ranker"]
    app = {
        "import_path": "recray.serving.on_ray:build_app",
        "args": {
            "layout": request.param,
            "admin_token_file": str(folder / "token"),
            "answers": {"hours": 1},
            "trace": {"share": 1e-9},
            "price": {"hour": 0.2},
        },
        "deployments": [
            {"name": n, "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.1}} for n in names
        ],
    }
    (folder / "seen.yaml").write_text(yaml.safe_dump({"applications": [app]}))
    name = f"seen-{request.param}"
    LOGS[name] = folder / "state"
    with serving(
        bundle.artefact.place.uri,
        config=str(folder / "seen.yaml"),
        port=0,
        name=name,
        state=str(LOGS[name]),
    ) as made:
        yield made
    LOGS.clear()


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {ADMIN}"} if path.startswith("admin") else {}
    answer = httpx.post(f"{url}/{path}", json=body, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def until(ready: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_answers_are_made_again(url: str, bundle: Bundle) -> None:
    for ask in list(requests(bundle))[::11]:
        sent = post(url, "v1/recommend", ask)
        where = f"{url}/v1/why/{sent['request_id']}?k=1"
        until(lambda where=where: httpx.get(where, timeout=60).status_code == 200)  # type: ignore[misc]
        told = httpx.get(where, timeout=60).json()
        assert told["answered"] == {"items": sent["items"], "degraded": sent["degraded"]}
        assert told["again"] == told["answered"]
        assert told["equal"]
        assert len(told["reasons"]) == min(1, len(sent["items"]))


def test_a_request_is_traced_through_the_stages(url: str, bundle: Bundle) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    head = {"traceparent": f"00-{trace}-{parent}-01"}
    assert httpx.post(f"{url}/v1/recommend", json={"user": "u1"}, headers=head, timeout=60).status_code == 200
    (folder,) = LOGS.values()

    def spans() -> list[Any]:
        found = [line["resourceSpans"][0]["scopeSpans"][0]["spans"] for line in read(folder, "spans")]
        return [span for line in found for span in line]

    until(lambda: bool(spans()))
    assert {span["traceId"] for span in spans()} == {trace}
    assert [span["name"] for span in spans()] == ["recommend", "wait", "retrieve", "rank"]
    assert spans()[0]["parentSpanId"] == parent


def test_items_come_and_go_in_every_replica(url: str, bundle: Bundle, tmp_path: Path) -> None:
    ask = {"user": "u1", "k": 100}
    best = [item["item"] for item in post(url, "v1/recommend", ask)["items"]]
    given: dict[str, Any] = {"withdraw": best[:2], "add": [{"item": "new", "like": best[:1]}]}
    told = post(url, "admin/items", given)
    want = change(bundle, **given)
    assert told["generation"] == want.generation
    for _ in range(LOOKS):
        got = post(url, "v1/recommend", ask)
        assert got["generation"] == want.generation
        assert [one["item"] for one in got["items"]] == [one.item for one in want.recommend(**ask).items]
    file = tmp_path / "items.json"
    file.write_text(json.dumps({"restore": best[:1]}))
    told = recray.ship(file, url=url, token=ADMIN)
    for _ in range(LOOKS):
        got = [one["item"] for one in post(url, "v1/recommend", ask)["items"]]
        assert best[0] in got
        assert "new" in got
        assert best[1] not in got


def test_what_is_counted_is_scraped(url: str, bundle: Bundle) -> None:
    import ray

    (app,) = LOGS  # other applications of this cluster are scraped, too
    post(url, "v1/recommend", {"user": "u1"})
    httpx.post(f"{url}/v1/recommend", json={"k": 0}, timeout=60)
    port = ray.nodes()[0]["MetricsExportPort"]
    wanted = (
        "ray_recray_answers_total", "ray_recray_ms_bucket_total", "ray_recray_batch_count_total",
        "ray_recray_refused_total", "ray_recray_cpu_seconds_total", "ray_recray_memory_bytes",
        "ray_recray_busy_seconds_total",
        "ray_recray_price_core_second", "ray_recray_version",
    )  # fmt: skip

    def lines() -> list[str]:
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        mine = [line for line in text.splitlines() if line.startswith("ray_recray_")]
        return [line for line in mine if f'application="{app}"' in line]

    labels = ('code="invalid_value"', 'stage="total"', f'generation="{bundle.generation}"')

    def all_there() -> bool:  # replicas tell at their own times
        found = lines()
        names = all(any(line.startswith(name) for line in found) for name in wanted)
        return names and all(any(label in line for line in found) for label in labels)

    until(all_there)
    found = lines()
    assert all(f'generation="{bundle.generation}"' in line for line in found if "generation=" in line)
    assert not any(f'"{name}"' in line for line in found for name in ("u1", "i1", "new"))

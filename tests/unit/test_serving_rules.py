"""Pins, caps, diversity and filters over HTTP, in process: as the bundle answers, or refused in a line."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from recray.bundles.bundle import Bundle
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.schema import parse_recommend
from recray.serving.settings import Batch
from tests.serving_bundles import small_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("http"))


def asked(bundle: Bundle, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
    app = build_asgi(Ingress(bundle, Fused(bundle, Batch())))

    async def scene() -> list[tuple[int, Any]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answers = [await client.post("/v1/recommend", json=body) for body in bodies]
        return [(answer.status_code, answer.json()) for answer in answers]

    return asyncio.run(scene())


def test_each_field_answers_as_in_process(bundle: Bundle) -> None:
    far = [item.item for item in bundle.recommend("u1", k=1000).items][-2:]
    asks: list[dict[str, Any]] = [
        {"user": "u1", "k": 5, "pin": [far[0], {"item": far[1], "place": 4}]},
        {"user": "u1", "k": 5, "pin": [90, "unknown"], "exclude": ["i90"]},
        {"user": "u2", "k": 6, "caps": {"category": 2}},
        {"user": "u3", "k": 6, "diversity": 0.5},
        {
            "user": "u4",
            "k": 4,
            "filter": {"price": {"min": 2, "max": 9}},
            "caps": {"price": 1},
            "diversity": 1,
        },
    ]
    for ask, (status, body) in zip(asks, asked(bundle, *asks)):
        want = bundle.recommend(**ask)
        assert status == 200
        assert [(i["item"], i["source"]) for i in body["items"]] == [(i.item, i.source) for i in want.items]
        assert body["degraded"] == want.degraded
    assert bundle.recommend(**asks[0]).items[3].source == "pin"


@pytest.mark.parametrize(
    ("ask", "code", "where"),
    [
        ({"pin": "i1"}, "invalid_value", "body.pin"),
        ({"pin": [None]}, "invalid_value", "body.pin.0"),
        ({"pin": [{"item": "i1"}]}, "invalid_value", "body.pin.0"),
        ({"pin": [{"item": "i1", "place": 7}], "k": 3}, "invalid_value", "body"),
        ({"pin": ["i1", "i2"], "k": 1}, "invalid_value", "body"),
        ({"caps": {"colour": 1}}, "unknown_column", "body.caps.colour"),
        ({"caps": {"category": 0}}, "invalid_value", "body.caps.category"),
        ({"caps": []}, "invalid_value", "body.caps"),
        ({"diversity": 1.5}, "invalid_value", "body.diversity"),
        ({"diversity": True}, "invalid_value", "body.diversity"),
        ({"filter": {"colour": "red"}}, "unknown_column", "body.filter.colour"),
    ],
)
def test_what_cannot_be_asked_is_refused(bundle: Bundle, ask: Any, code: str, where: str) -> None:
    status, body = asked(bundle, ask)[0]
    assert status == 422, body
    assert body["error"]["code"] == code
    assert body["error"]["where"].startswith(where)
    assert "\n" not in body["error"]["message"]


def test_the_short_way_shares_no_list() -> None:
    one, other = parse_recommend({"user": "u"}), parse_recommend({})
    assert one.pin is not other.pin
    assert one.exclude is not other.exclude
    assert (other.user, one.diversity, one.caps) == (None, 0.0, None)

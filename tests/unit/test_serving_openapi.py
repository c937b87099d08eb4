"""Schemathesis over the OpenAPI document, against the door in process with a bundle behind it: no 5xx."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks._reliability_api import asked_of
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.settings import Batch
from tests.serving_bundles import small_bundle


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whatever_the_document_allows_or_forbids_is_answered_below_500(tmp_path: Path) -> None:
    told = asked_of(small_bundle(tmp_path), examples=4)
    assert told.faults == [], "a 503 that says when to come again is none"
    assert told.requests > 20
    assert {"/v1/recommend", "/v1/why/{request_id}", "/admin/items"} <= told.paths


def test_the_shortest_deadline_there_is_fails_nothing(tmp_path: Path) -> None:
    """What Schemathesis found: 5e-324 ms are 0 s."""
    bundle = small_bundle(tmp_path)
    app = build_asgi(Ingress(bundle, Fused(bundle, Batch())))
    short: list[dict[str, Any]] = [
        {"headers": {"x-deadline-ms": "5e-324"}, "json": {}},
        {"json": {"deadline_ms": 5e-324}},
    ]

    async def scene() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [(await client.post("/v1/recommend", **how)).status_code for how in short]

    assert set(asyncio.run(scene())) <= {200, 503}

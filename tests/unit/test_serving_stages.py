"""The three stages in process: the same answers as the bundle's own, whoever else asks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from recray.bundles.bundle import Bundle
from recray.serving.http import build_asgi
from recray.serving.schema import ApiError, RecommendRequest
from recray.serving.settings import Stage
from recray.serving.stages import Ingress, RankerStage, RetrieverStage, has_ranker
from tests.serving_bundles import requests, small_bundle


def graph(bundle: Bundle, stage: Stage | None = None) -> Ingress:
    """Ingress -> Retriever -> Ranker with plain calls for hops."""
    retriever, ranker = RetrieverStage(bundle, stage or Stage()), RankerStage(bundle, stage or Stage())
    return Ingress(
        bundle,
        retrieve=retriever.retrieve,
        similar=retriever.similar,
        rank=ranker.rank if has_ranker(bundle.artefact) else None,
    )


@pytest.fixture(scope="module", params=["ranked", "retrieved", "scored", "int8"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("serving")
    if request.param == "ranked":
        return small_bundle(folder)
    if request.param == "retrieved":
        return small_bundle(folder, ranker=False, index="hnsw")
    if request.param == "scored":
        return small_bundle(folder, retriever="item-knn")
    return small_bundle(folder, encoder_graph="onnx-int8", ranker_graph="onnx-int8", retriever_codec="int8")


@pytest.mark.parametrize("clients", [1, 16])
def test_the_graph_answers_as_the_bundle_does(bundle: Bundle, clients: int) -> None:
    asks = list(requests(bundle))
    ingress = graph(bundle, Stage(max_batch=8))

    async def scene() -> list[Any]:
        gate = asyncio.Semaphore(clients)

        async def one(ask: dict[str, Any]) -> Any:
            async with gate:
                return await ingress.recommend(RecommendRequest(**ask))

        return await asyncio.gather(*map(one, asks))

    for ask, reply in zip(asks, asyncio.run(scene()), strict=True):
        want = bundle.recommend(**ask)
        assert [i["item"] for i in reply.items] == [i.item for i in want.items], ask
        assert [i["source"] for i in reply.items] == [i.source for i in want.items], ask
        assert [i["score"] for i in reply.items] == pytest.approx([i.score for i in want.items], abs=1e-5)
        assert (reply.degraded, reply.generation) == (want.degraded, bundle.generation)


def test_similar_items_are_those_of_the_bundle(bundle: Bundle) -> None:
    ingress = graph(bundle)
    for item in bundle.items.ids_of(range(0, len(bundle.items), 10)):
        reply = asyncio.run(ingress.similar(item, 9))
        assert [i["item"] for i in reply.items] == [i.item for i in bundle.similar(item, 9).items]
    assert len(asyncio.run(ingress.similar(item, 1000)).items) <= len(bundle.items) - 1


def test_a_stage_of_another_generation_refuses(bundle: Bundle) -> None:
    ingress = graph(bundle)

    async def gone(ask: object) -> None:
        return None

    async def other() -> str:
        return "another"

    stale = Ingress(bundle, retrieve=gone, similar=gone, rank=None, generations=[other])
    for call in (stale.recommend(RecommendRequest(user="u1")), stale.similar("i0", 3), stale.ready()):
        with pytest.raises(ApiError) as error:
            asyncio.run(call)  # type: ignore[arg-type]
        assert (error.value.status, error.value.code) == (503, "generation_changing")
    assert asyncio.run(ingress.ready()) == bundle.generation


def test_over_http_without_ray(bundle: Bundle) -> None:
    app = build_asgi(graph(bundle))

    async def scene() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

            async def ask(**body: Any) -> tuple[int, Any]:
                answer = await client.post("/v1/recommend", json=body)
                return answer.status_code, answer.json()

            status, body = await ask(user="u1", k=5)
            want = bundle.recommend(user="u1", k=5)
            assert status == 200
            assert [i["item"] for i in body["items"]] == [i.item for i in want.items]
            status, body = await ask(user="nobody")
            assert (status, body["degraded"]) == (200, ["unknown user"])
            assert {i["source"] for i in body["items"]} == {"popular"}
            status, body = await ask(user="u1", k=1000, exclude=[])
            assert status == 200
            assert 0 < len(body["items"]) < 1000
            some = {"price": {"min": 3, "max": 7}, "category": {"not": ["book"]}}
            status, body = await ask(user="u1", k=5, filter=some)
            assert status == 200
            want = bundle.recommend(user="u1", k=5, filter=some)
            assert [i["item"] for i in body["items"]] == [i.item for i in want.items]
            for bad, code, where in (
                ({"filter": {"category": {"min": 3}}}, "invalid_value", "body"),
                ({"filter": {"colour": "red"}}, "unknown_column", "body.filter.colour"),
                ({"context": {"moon": "full"}}, "unknown_column", "body.context.moon"),
                ({"filter": {"price": "cheap"}}, "invalid_value", "body"),
                ({"filter": {"price": [1, "x", True]}}, "invalid_value", "body"),
                ({"filter": {"price": 10**30}}, "invalid_value", "body"),
            ):
                status, body = await ask(**bad)
                assert (status, body["error"]["code"], body["error"]["where"]) == (422, code, where)
            answer = await client.get("/v1/items/nowhere/similar")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_item")
            assert (await client.get("/readyz")).json()["generation"] == bundle.generation

    asyncio.run(scene())


def test_a_client_that_hangs_up_leaves_the_others_their_answers(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    ingress = graph(bundle, Stage(max_batch=4))

    async def scene() -> None:
        calls = [asyncio.create_task(ingress.recommend(RecommendRequest(user=f"u{n}"))) for n in range(24)]
        await asyncio.sleep(0.002)
        for call in calls[::3]:
            call.cancel()
        replies = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)
        for n, reply in enumerate(replies):
            if n % 3:
                assert [i["item"] for i in reply.items] == [
                    i.item for i in bundle.recommend(user=f"u{n}").items
                ]  # type: ignore[union-attr]

    asyncio.run(scene())

"""Both layouts in process: the same answers as the bundle's own and as each other's, whoever else asks."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from recray.bundles.bundle import Bundle
from recray.serving import stages
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress, Split
from recray.serving.schema import ApiError, RecommendRequest
from recray.serving.settings import Batch
from tests.serving_bundles import requests, small_bundle

Made = Callable[[Bundle, Batch], Ingress]


def fused(bundle: Bundle, batch: Batch | None = None) -> Ingress:
    """Models on a thread of the ingress."""
    return Ingress(bundle, Fused(bundle, batch or Batch()))


def split(bundle: Bundle, batch: Batch | None = None) -> Ingress:
    """Ingress -> Retriever -> Ranker with threads for other processes."""

    def hop(work: Callable[..., stages.Found]) -> Callable[..., Any]:
        async def ask(*asked: Any) -> stages.Found:
            return await asyncio.to_thread(work, bundle, *asked)

        return ask

    layout = Split(
        bundle,
        batch or Batch(),
        retrieve=hop(stages.retrieve),
        similar=hop(stages.similar),
        rank=hop(stages.rank) if bundle.artefact.holds("ranker") else None,
    )
    return Ingress(bundle, layout)


@pytest.fixture(params=[fused, split])
def graph(request: pytest.FixtureRequest) -> Made:
    made: Made = request.param
    return made


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


def test_a_generation_that_is_let_go_is_gone_without_a_collection_of_garbage(
    graph: Made, tmp_path: Path
) -> None:
    gc.collect()
    gc.disable()
    try:
        bundle = small_bundle(tmp_path)
        ingress = graph(bundle, Batch())
        asyncio.run(ingress.recommend(RecommendRequest(user="u1")))
        left = [weakref.ref(bundle), weakref.ref(ingress.layout)]
        del bundle, ingress
        patience = time.monotonic() + 20  # the thread that answered lets go a little later
        while any(one() is not None for one in left) and time.monotonic() < patience:
            time.sleep(0.01)
        assert [one() for one in left] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("clients", [1, 16])
def test_the_graph_answers_as_the_bundle_does(bundle: Bundle, graph: Made, clients: int) -> None:
    asks = list(requests(bundle))
    ingress = graph(bundle, Batch(size=8))

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


def test_similar_items_are_those_of_the_bundle(bundle: Bundle, graph: Made) -> None:
    ingress = graph(bundle, Batch())
    for item in bundle.items.ids_of(range(0, len(bundle.items), 10)):
        reply = asyncio.run(ingress.similar(item, 9))
        assert [i["item"] for i in reply.items] == [i.item for i in bundle.similar(item, 9).items]
    assert len(asyncio.run(ingress.similar(item, 1000)).items) <= len(bundle.items) - 1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in a replica: shared among several, a sum's last bits depend on who was there."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_both_layouts_answer_bit_for_bit_the_same(bundle: Bundle) -> None:
    """One after the other, so that batches are the same: only then are the last bits of a matmul."""
    one, other = fused(bundle), split(bundle)

    async def scene() -> None:
        for ask in requests(bundle):
            asked = RecommendRequest(**ask)
            first, second = await one.recommend(asked), await other.recommend(asked)
            assert first.items == second.items, ask
            assert (first.degraded, first.generation) == (second.degraded, second.generation)
            assert set(first.timing_ms) == set(second.timing_ms)

    asyncio.run(scene())


@pytest.mark.parametrize("limit", [1, 5, 64])
def test_what_waits_together_goes_as_one_batch(bundle: Bundle, limit: int) -> None:
    seen: list[int] = []

    async def retrieve(asked: stages.RetrieveBatch) -> stages.Found:
        seen.append(len(asked.wants))
        return stages.retrieve(bundle, asked)

    async def none(row: int, k: int) -> None:
        return None

    batch = Batch(size=limit, in_flight=1)
    ingress = Ingress(bundle, Split(bundle, batch, retrieve=retrieve, rank=None, similar=none))

    async def scene() -> None:
        asks = (ingress.recommend(RecommendRequest(user=f"u{n}")) for n in range(20))
        await asyncio.gather(*asks)

    asyncio.run(scene())
    assert sum(seen) == 20
    assert max(seen) == min(limit, 20)


def test_a_stage_of_another_generation_refuses(bundle: Bundle) -> None:
    async def gone(*asked: object) -> None:
        return None

    async def other() -> str:
        return "another"

    layout = Split(bundle, Batch(), retrieve=gone, similar=gone, rank=None, generations=[other])
    stale = Ingress(bundle, layout)
    for call in (stale.recommend(RecommendRequest(user="u1")), stale.similar("i0", 3), stale.ready()):
        with pytest.raises(ApiError) as error:
            asyncio.run(call)  # type: ignore[arg-type]
        assert (error.value.status, error.value.code) == (503, "generation_changing")
    assert asyncio.run(split(bundle).ready()) == bundle.generation
    assert asyncio.run(fused(bundle).ready()) == bundle.generation


def test_over_http_without_ray(bundle: Bundle, graph: Made) -> None:
    app = build_asgi(graph(bundle, Batch()))

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


def test_a_client_that_hangs_up_leaves_the_others_their_answers(tmp_path: Path, graph: Made) -> None:
    bundle = small_bundle(tmp_path)
    ingress = graph(bundle, Batch(size=4))

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

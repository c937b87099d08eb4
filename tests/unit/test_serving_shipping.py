"""Ships and rollbacks of real bundles under load, in both layouts, over HTTP, without Ray."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks._reliability_door import Board
from recray.bundles.bundle import Bundle, open_bundle
from recray.errors import ArtefactError
from recray.manifest import open_artefact
from recray.serving import parity, stages
from recray.serving.generations import Generation, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress, Split
from recray.serving.resident import Ack, Resident
from recray.serving.router import Follower, Router
from recray.serving.settings import Batch
from recray.serving.shipping import Shipper
from tests.serving_bundles import small_bundle

USERS = [f"u{n}" for n in range(0, 80, 5)]


def load(one: Generation, now: Bundle | None) -> Bundle:
    bundle = open_bundle(one.uri, threads=1)
    if now is not None:
        parity.sound(bundle)
    return bundle


class World:
    """Two replicas of each kind, which hops find by chance."""

    def __init__(self, first: Bundle, layout: str) -> None:
        self.board = Board(State(current=Generation(first.generation, first.artefact.place.uri)))
        self.draw = random.Random(5)
        kinds = 2 if layout == "split" else 0
        self.models = [[Resident(load, self.board.read()) for _ in range(2)] for _ in range(kinds)]
        seat = self.split if layout == "split" else self.fused
        self.doors: list[Resident[Ingress]] = [Resident(seat, self.board.read()) for _ in range(2)]
        self.followers = [Follower(door, self.board) for door in self.doors]
        self.routers = [Router(door, one.nudge) for door, one in zip(self.doors, self.followers)]
        self.steps = Shipper(
            self.routers[0], self.board, self.everyone, self.counts,
            opened=lambda uri: open_artefact(uri, "bundle"),
        )  # fmt: skip
        self.apps = [build_asgi(router, steps=self.steps) for router in self.routers]

    def fused(self, one: Generation, now: Ingress | None) -> Ingress:
        bundle = load(one, None)
        return Ingress(bundle, Fused(bundle, Batch(size=4)))

    def split(self, one: Generation, now: Ingress | None) -> Ingress:
        def hop(kind: int, work: Callable[..., stages.Found]) -> Callable[..., Any]:
            async def ask(*asked: Any) -> stages.Found | None:
                resident = self.draw.choice(self.models[kind])
                bundle = resident.get(one.name)
                return None if bundle is None else await asyncio.to_thread(work, bundle, *asked)

            return ask

        front = load(one, None)
        return Ingress(
            front,
            Split(
                front, Batch(size=4), retrieve=hop(0, stages.retrieve), rank=hop(1, stages.rank),
                similar=hop(0, stages.similar),
            ),
        )  # fmt: skip

    async def everyone(self) -> tuple[list[Ack], bool]:
        all_of = [*(one for kind in self.models for one in kind), *self.doors]
        acks = []
        for one in all_of:  # one after the other, so that requests meet replicas of many minds
            acks.append(await asyncio.to_thread(one.follow, self.board.read()))
        return acks, True

    async def counts(self) -> list[Any]:
        return [router.tallies for router in self.routers]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("shipping")
    return [small_bundle(folder / "a"), small_bundle(folder / "b", blend=0.0)]


@pytest.mark.parametrize("layout", ["fused", "split"])
def test_every_answer_is_that_of_its_stamp(bundles: list[Bundle], layout: str) -> None:
    world = World(bundles[0], layout)
    first, second = (bundle.generation for bundle in bundles)
    answers: list[tuple[str, dict[str, Any]]] = []
    done = asyncio.Event()

    async def client(number: int) -> None:
        app = httpx.ASGITransport(world.apps[number % 2])
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as session:
            while not done.is_set():
                user = USERS[len(answers) % len(USERS)]
                answer = await session.post("/v1/recommend", json={"user": user, "k": 8})
                assert answer.status_code == 200, answer.text
                answers.append((user, answer.json()))

    async def admin() -> None:
        app = httpx.ASGITransport(world.apps[1])
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as session:
            for step, body, now in (
                ("ship", {"bundle": bundles[1].artefact.place.uri}, second),
                ("rollback", {}, first),
                ("ship", {"bundle": bundles[1].artefact.place.uri, "canary": 0.5}, first),
                ("ship", {"bundle": bundles[1].artefact.place.uri}, second),
            ):
                told = await session.post(f"/admin/{step}", json=body)
                assert told.status_code == 200, told.text
                assert told.json()["generation"] == now
                begun = len(answers)
                while len(answers) < begun + 20:
                    await asyncio.sleep(0.01)
        done.set()

    async def scene() -> None:
        await asyncio.wait_for(asyncio.gather(admin(), *map(client, range(4))), 250)

    asyncio.run(scene())
    assert {answer["generation"] for _, answer in answers} == {first, second}
    wanted = {
        (user, bundle.generation): bundle.recommend(user=user, k=8).items
        for bundle in bundles
        for user in USERS
    }
    assert wanted["u0", first] != wanted["u0", second]
    for user, answer in answers:
        want = wanted[user, answer["generation"]]
        assert [item["item"] for item in answer["items"]] == [item.item for item in want]
        assert [item["score"] for item in answer["items"]] == pytest.approx(
            [item.score for item in want], abs=1e-5
        )


def test_an_altered_bundle_is_refused_before_anybody_loads_it(bundles: list[Bundle], tmp_path: Path) -> None:
    import shutil

    world = World(bundles[0], "fused")
    broken = tmp_path / "broken"
    shutil.copytree(bundles[1].artefact.place.uri, broken)
    part = next((broken / "ranker" / "tables").iterdir())
    part.write_bytes(part.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ArtefactError):
        open_artefact(broken)

    async def scene() -> httpx.Response:
        app = httpx.ASGITransport(world.apps[0])
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as session:
            return await session.post("/admin/ship", json={"bundle": str(broken)})

    answer = asyncio.run(scene())
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "bundle_refused")
    assert "altered" in answer.json()["error"]["message"]
    assert world.board.read().version == 1

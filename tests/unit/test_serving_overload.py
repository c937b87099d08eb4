"""Over HTTP, in process: short deadlines, stages that are late or away, queues that are too long."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from recray.bundles.bundle import Bundle
from recray.serving import stages
from recray.serving.admission import Door
from recray.serving.cache import Caching
from recray.serving.deadline import LIGHT, Deadlines, Pace
from recray.serving.generations import Generation, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress, Split
from recray.serving.resident import Resident
from recray.serving.router import Router
from recray.serving.schema import ApiError
from recray.serving.settings import Batch
from recray.serving.state import UserState, open_state
from tests.serving_bundles import small_bundle

PATIENCE_S = 60.0
SHORT = {"deadline_ms": 150}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("overload"))


def steady() -> Door:
    """A door that takes the loop to be on time, however busy this machine is."""
    door = Door(Deadlines(default_ms=PATIENCE_S * 1e3, max_ms=PATIENCE_S * 1e3))
    door._watch = lambda now: None  # type: ignore[method-assign]
    return door


class World:
    """A split graph whose stages are threads that can be held up, behind the HTTP door."""

    def __init__(
        self, bundle: Bundle, *, caching: Caching | None = None, users: UserState | None = None, size: int = 8
    ) -> None:
        self.bundle, self.ran = bundle, {"retrieve": 0, "rank": 0}
        self.open = {name: asyncio.Event() for name in self.ran}
        self.away = False
        for event in self.open.values():
            event.set()
        split = Split(
            bundle,
            Batch(size=size, in_flight=1, wait_ms=1e6),
            retrieve=self.stage("retrieve", stages.retrieve),
            rank=self.stage("rank", stages.rank),
            similar=self.stage("retrieve", stages.similar),
        )
        self.ingress = Ingress(bundle, split, caching)
        self.paces = split.paces
        state = State(current=Generation(bundle.generation, ""))
        held: Resident[Ingress] = Resident(lambda one, now: self.ingress, state)
        self.door = steady()
        app = build_asgi(Router(held, lambda: None), users=users, door=self.door)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=PATIENCE_S
        )

    def stage(self, name: str, work: Callable[..., stages.Found]) -> Callable[..., Awaitable[stages.Found]]:
        async def hop(*asked: Any) -> stages.Found:
            await self.open[name].wait()
            if self.away:
                raise ApiError(503, "unavailable", "a stage does not answer now", name)
            self.ran[name] += 1
            return await asyncio.to_thread(work, self.bundle, *asked)

        return hop

    async def ask(self, **body: Any) -> dict[str, Any]:
        answer = await self.client.post("/v1/recommend", json=body)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def slow(self, *, retrieve: float = 0.0, rank: float = 0.0, light: float = 0.0) -> None:
        """Let the graph believe that its stages take so many seconds for one request."""
        self.paces.retrieve, self.paces.rank = Pace(), Pace()
        for _ in range(3):
            self.paces.retrieve.add(1, retrieve)
            self.paces.rank.add(40, rank)
            self.paces.rank.add(40 // LIGHT, light)


def names(answer: dict[str, Any]) -> list[str]:
    return [item["item"] for item in answer["items"]]


def scene(world: Callable[[], World], play: Callable[[World], Awaitable[None]]) -> None:
    async def run() -> None:
        one = world()
        async with one.client:
            await asyncio.wait_for(play(one), PATIENCE_S * 2)

    asyncio.run(run())


def test_with_time_nothing_is_left_out(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        answer = await world.ask(user="u1")
        assert answer["degraded"] == []
        assert names(answer) == [item.item for item in bundle.recommend(user="u1").items]

    scene(lambda: World(bundle), play)


def test_less_time_gives_a_lighter_answer_and_says_so(bundle: Bundle) -> None:
    history = bundle.items.ids_of(range(5))
    request = bundle.request(history=history)
    few = stages.to_retrieve([request], 40)
    found = stages.retrieve(bundle, few)
    light = stages.rank(bundle, stages.to_rank([request], few, found, [0], LIGHT)[1])

    async def play(world: World) -> None:
        whole = await world.ask(history=history, deadline_ms=50_000)
        world.slow(rank=500.0)
        answer = await world.ask(history=history, deadline_ms=50_000)
        assert answer["degraded"] == ["light ranking: deadline"]
        assert names(answer) == bundle.items.ids_of(light.rows[0])
        assert {item["source"] for item in answer["items"]} == {"ranker"}
        world.slow(rank=500.0, light=200.0)
        answer = await world.ask(history=history, deadline_ms=50_000)
        assert answer["degraded"] == ["not ranked: deadline"]
        assert names(answer) == bundle.items.ids_of(found.rows[0][:10])
        world.slow(retrieve=100.0)
        answer = await world.ask(history=history, deadline_ms=50_000)
        assert answer["degraded"] == ["popular: deadline"]
        assert whole["degraded"] == []

    scene(lambda: World(bundle), play)


def test_what_is_popular_keeps_filters_exclusions_history_and_pins(bundle: Bundle) -> None:
    items = bundle.items.ids_of(range(len(bundle.items)))

    async def play(world: World) -> None:
        world.open["retrieve"].clear()
        for body in (
            {"history": items[:9], "exclude": items[20:25]},
            {"history": items[:9], "filter": {"category": "book"}, "k": 30},
            {"history": items[:9], "pin": [{"item": items[140], "place": 2}], "k": 5},
            {"history": items[:9], "caps": {"category": 2}, "k": 5},
        ):
            answer = await world.ask(**body, **SHORT)
            nobody = bundle.recommend(
                **{**body, "history": [], "exclude": items[:9] + body.get("exclude", [])}
            )
            assert names(answer) == [item.item for item in nobody.items]
            assert answer["degraded"] == ["popular: late"]
            assert answer["generation"] == bundle.generation
        assert world.ran == {"retrieve": 0, "rank": 0}

    scene(lambda: World(bundle), play)


@pytest.mark.parametrize("held_up", ["retrieve", "rank"])
def test_a_stage_that_hangs_does_not_keep_anybody(bundle: Bundle, held_up: str) -> None:
    async def play(world: World) -> None:
        world.open[held_up].clear()
        answers = await asyncio.gather(*(world.ask(user=f"u{n}", **SHORT) for n in range(20)))
        assert {word for answer in answers for word in answer["degraded"]} <= {
            "popular: late",
            "popular: deadline",
            "popular: overload",
        }
        assert all(len(answer["items"]) == 10 for answer in answers)
        world.open[held_up].set()
        for _ in range(2000):  # what hung comes back, and nobody is harmed
            if not world.ingress.layout.batches._busy:
                break
            await asyncio.sleep(0.01)
        assert (await world.ask(user="u1"))["degraded"] == []

    scene(lambda: World(bundle), play)


def test_an_earlier_answer_stands_in_without_what_is_excluded_since(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        first = await world.ask(user="u1")
        world.open["retrieve"].clear()
        out = names(first)[:3]
        answer = await world.ask(user="u1", exclude=out, **SHORT)
        assert answer["degraded"] == ["cached: late"]
        assert names(answer)[:7] == names(first)[3:]
        assert len(set(names(answer))) == 10, "what is popular fills it up"
        assert not set(out) & set(names(answer))
        assert (await world.ask(user="u2", **SHORT))["degraded"] == ["popular: late"]

    scene(lambda: World(bundle, caching=Caching(answers=10)), play)


def test_the_same_ask_is_answered_from_the_cache_until_an_event(bundle: Bundle, tmp_path: Path) -> None:
    users = open_state(str(tmp_path / "state"))
    assert users is not None

    async def play(world: World) -> None:
        first = await world.ask(user="u1")
        again = await world.ask(user="u1")
        assert (again["items"], again["degraded"]) == (first["items"], [])
        assert world.ran == {"retrieve": 1, "rank": 1}
        event = {"user": "u1", "events": [{"item": names(first)[0]}]}
        assert (await world.client.post("/v1/events", json=event)).status_code == 200
        after = await world.ask(user="u1")
        assert world.ran == {"retrieve": 2, "rank": 2}
        assert names(first)[0] not in names(after), "she has seen it"

    try:
        scene(lambda: World(bundle, caching=Caching(answers=10), users=users), play)
    finally:
        users.close()


def test_a_stage_that_is_away_leaves_what_is_at_hand(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        world.away = True
        answer = await world.ask(user="u1")
        assert answer["degraded"] == ["popular: unavailable"]
        similar = await world.client.get(f"/v1/items/{names(answer)[0]}/similar")
        assert similar.status_code == 503, "nothing stands in for that"

    scene(lambda: World(bundle), play)


def test_who_has_no_time_for_the_ranker_is_answered_before_the_others(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        history = bundle.items.ids_of(range(5))
        world.slow(rank=40.0, light=40.0)
        world.open["rank"].clear()
        patient = asyncio.create_task(world.ask(history=history, deadline_ms=PATIENCE_S * 1e3))
        hasty = asyncio.create_task(world.ask(history=history, deadline_ms=30_000))
        answer = await hasty
        assert answer["degraded"] == ["not ranked: deadline"]
        assert world.ingress.layout.batches.sizes[-1] == 2, "they went together"
        assert not patient.done()
        world.open["rank"].set()
        assert (await patient)["degraded"] == []

    scene(lambda: World(bundle), play)


def test_a_queue_that_is_too_long_is_not_joined(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        for _ in range(3):
            world.ingress.layout.batches.pace.add(1, 20.0)  # a batch takes that long
        world.open["retrieve"].clear()
        tasks = [asyncio.create_task(world.ask(user=f"u{n % 9}", deadline_ms=40_000)) for n in range(12)]
        _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        world.open["retrieve"].set()
        answers = await asyncio.gather(*tasks)
        words = [answer["degraded"] for answer in answers]
        assert ["popular: overload"] in words
        assert [] in words, "those before are answered in full"
        assert waiting

    scene(lambda: World(bundle, size=2), play)


def test_beyond_that_requests_are_sent_away_unread(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        await world.ask(user="u1")
        world.door.late_s = PATIENCE_S
        answer = await world.client.post("/v1/recommend", content=b"{nonsense")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "overloaded"
        assert world.door.inside == 0
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert (await world.client.get(path)).status_code == 200
        world.door.late_s = 0.0
        assert (await world.ask(user="u1"))["degraded"] == []
        assert (await world.client.post("/v1/recommend", content=b"{nonsense")).status_code == 400
        assert world.door.inside == 0

    scene(lambda: World(bundle), play)


def test_similar_items_have_a_deadline_and_the_same_door(bundle: Bundle) -> None:
    """Nothing stands in for them: what is not there in time is to be asked for again."""

    async def play(world: World) -> None:
        path = f"/v1/items/{bundle.items.id_of(0)}/similar"
        whole = await world.client.get(path, params={"k": 3})
        assert [one["item"] for one in whole.json()["items"]] == [
            one.item for one in bundle.similar(bundle.items.id_of(0), 3).items
        ]
        world.open["retrieve"].clear()
        answer = await world.client.get(path, headers={"x-deadline-ms": "100"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        world.open["retrieve"].set()
        world.door.late_s = PATIENCE_S
        assert (await world.client.get(path)).status_code == 503
        world.door.late_s = 0.12 * PATIENCE_S  # who comes in is kept from the models
        assert (await world.client.get(path)).status_code == 503
        world.door.late_s = 0.0
        assert (await world.client.get(path, headers={"x-deadline-ms": "soon"})).status_code == 422
        assert (await world.client.get(path, params={"k": 3})).json()["items"] == whole.json()["items"]
        assert world.door.inside == 0

    scene(lambda: World(bundle), play)


@pytest.mark.parametrize(
    ("body", "header", "status", "where"),
    [
        (b'{"deadline_ms": 0}', "9", 422, "body.deadline_ms"),
        (b'{"deadline_ms": "9"}', "9", 422, "body.deadline_ms"),
        (b'{"deadline_ms": true}', "9", 422, "body.deadline_ms"),
        (b"{}", "soon", 422, "header.x-deadline-ms"),
        (b"{}", "-1", 422, "header.x-deadline-ms"),
        (b'{"deadline_ms": 9000.5}', "60000", 200, ""),
    ],
)
def test_odd_deadlines(bundle: Bundle, body: bytes, header: str, status: int, where: str) -> None:
    async def play(world: World) -> None:
        answer = await world.client.post("/v1/recommend", content=body, headers={"x-deadline-ms": header})
        assert answer.status_code == status
        if where:
            assert answer.json()["error"]["where"] == where

    scene(lambda: World(bundle), play)


def test_a_store_that_hangs_costs_only_the_events(bundle: Bundle, tmp_path: Path) -> None:
    users, go = open_state(str(tmp_path / "state")), threading.Event()
    assert users is not None
    users._store.histories = lambda asked: go.wait(PATIENCE_S) and []  # type: ignore[assignment,method-assign]

    async def play(world: World) -> None:
        answer = await world.ask(user="u1", **SHORT)
        assert "state unavailable" in answer["degraded"]
        assert len(answer["items"]) == 10
        go.set()

    try:
        scene(lambda: World(bundle, users=users), play)
    finally:
        go.set()
        users.close()


def test_batches_on_a_thread_answer_late_ones_by_what_is_at_hand(bundle: Bundle) -> None:
    """As Fused runs them: the thread is taken, and whoever is late does not wait for it."""
    go = threading.Event()

    async def run() -> None:
        fused = Fused(bundle, Batch(size=4))
        taken = fused.batches._executor.submit(go.wait, PATIENCE_S)
        client = httpx.AsyncClient(
            transport=httpx.ASGITransport(build_asgi(Ingress(bundle, fused), door=steady())),
            base_url="http://test",
        )
        async with client:
            answer = await client.post("/v1/recommend", json={"user": "u1", **SHORT}, timeout=PATIENCE_S)
            assert answer.json()["degraded"] == ["popular: late"]
            go.set()
            await asyncio.wrap_future(taken)
            answer = await client.post("/v1/recommend", json={"user": "u1"}, timeout=PATIENCE_S)
            assert answer.json()["degraded"] == []
        fused.batches.close()

    try:
        asyncio.run(run())
    finally:
        go.set()


def test_the_document_says_what_may_come(bundle: Bundle) -> None:
    async def play(world: World) -> None:
        document = (await world.client.get("/openapi.json")).json()
        post = document["paths"]["/v1/recommend"]["post"]
        assert [one["name"] for one in post["parameters"]] == ["X-Deadline-Ms"]
        assert "Retry-After" in post["responses"]["503"]["headers"]
        words = json.dumps(document["components"]["schemas"]["RecommendResponse"])
        for word in ("light ranking", "not ranked", "cached", "popular", "overload", "deadline", "late"):
            assert f"'{word}'" in words
        assert "deadline_ms" in document["components"]["schemas"]["RecommendRequest"]["properties"]

    scene(lambda: World(bundle), play)


def test_where_models_are_spared_events_are_asked_for_all_the_same(bundle: Bundle, tmp_path: Path) -> None:
    users = open_state(str(tmp_path / "state"))
    assert users is not None

    async def play(world: World) -> None:
        bought = names(await world.ask(user="u1"))[0]
        body = {"user": "u1", "events": [{"item": bought}]}
        assert (await world.client.post("/v1/events", json=body)).status_code == 200
        world.slow(retrieve=1e6)
        answer = await world.ask(user="u1")
        assert world.ran == {"retrieve": 1, "rank": 1}, "no model was asked"
        assert "state unavailable" not in answer["degraded"]
        assert bought not in names(answer)

    scene(lambda: World(bundle, users=users), play)


def test_a_store_that_hangs_leaves_time_for_the_models(bundle: Bundle, tmp_path: Path) -> None:
    users, go = open_state(str(tmp_path / "state")), threading.Event()
    assert users is not None
    users._store.histories = lambda asked: go.wait(PATIENCE_S) and []  # type: ignore[assignment,method-assign]

    async def play(world: World) -> None:
        answer = await world.ask(user="u1", deadline_ms=6000)
        assert answer["degraded"] == ["state unavailable"]
        assert world.ran == {"retrieve": 1, "rank": 1}
        go.set()

    try:
        scene(lambda: World(bundle, users=users), play)
    finally:
        go.set()

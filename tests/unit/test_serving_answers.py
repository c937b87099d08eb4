"""The log of answers and GET /v1/why: bounded, private, and the same answer made again with its reasons."""

from __future__ import annotations

import asyncio
import json
import math
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from recray.bundles.bundle import Bundle, open_front
from recray.config import build
from recray.errors import ConfigError
from recray.feedback.log import read
from recray.feedback.store import SqliteStore
from recray.serving import aside, auth, stages
from recray.serving.answers import AnswerLog, Keeping, open_answers
from recray.serving.generations import Generation, State
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress, Split
from recray.serving.resident import Resident
from recray.serving.router import Router
from recray.serving.seen import Seen
from recray.serving.settings import Batch, GraphArgs
from recray.serving.state import UserState, settled
from tests.serving_bundles import requests, small_bundle

KEEPING = Keeping(hours=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("answers"))


def fused(bundle: Bundle) -> Ingress:
    return Ingress(bundle, Fused(bundle, Batch()))


def split(bundle: Bundle) -> Ingress:
    def hop(work: Callable[..., Any]) -> Any:
        async def ask(*asked: Any) -> Any:
            return await asyncio.to_thread(work, bundle, *asked)

        return ask

    async def ask_aside(work: str, *asked: Any) -> Any:
        return await asyncio.to_thread(aside.WORK[work], bundle, *asked)

    return Ingress(
        open_front(bundle.artefact.place),
        Split(
            open_front(bundle.artefact.place),
            Batch(),
            retrieve=hop(stages.retrieve),
            rank=hop(stages.rank),
            similar=hop(stages.similar),
            aside=ask_aside,
        ),
    )


class Door:
    """The HTTP door before a bundle in process, which keeps its answers in a folder."""

    def __init__(self, ingress: Ingress, folder: Path, keeping: Keeping = KEEPING) -> None:
        state = State(current=Generation(ingress.front.generation, ""))
        self.resident: Resident[Ingress] = Resident(lambda one, now: ingress, state)
        self.users = UserState(SqliteStore(folder / "state"))
        self.router = Router(self.resident, lambda: None)
        self.seen = Seen(kept=open_answers(folder, keeping), held=lambda: self.router.held)

    def ask(self, *calls: tuple[str, str, Any], again: Any = None) -> list[httpx.Response]:
        async def scene() -> list[httpx.Response]:
            app = build_asgi(self.router, users=self.users, seen=self.seen)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                found = []
                for method, path, body in calls:
                    found.append(await client.request(method, path, json=body))
                    if method == "POST":
                        await self.logged(found[-1].json()["request_id"])
                return found

        return asyncio.run(scene())

    async def logged(self, request_id: str) -> None:
        """Wait until an answer is in the log."""
        for _ in range(2000):
            if self.seen.kept is None or self.seen.kept.find(request_id):
                return
            await asyncio.sleep(0.01)

    def why(self, answer: httpx.Response, query: str = "") -> httpx.Response:
        return self.ask(("GET", f"/v1/why/{answer.json()['request_id']}{query}", None))[0]


def recommend(**body: Any) -> tuple[str, str, Any]:
    return "POST", "/v1/recommend", body


@pytest.mark.parametrize("layout", [fused, split])
def test_every_answer_is_made_again_to_the_last_bit(
    bundle: Bundle, tmp_path: Path, layout: Callable[[Bundle], Ingress]
) -> None:
    door = Door(layout(bundle), tmp_path)
    asks = list(requests(bundle))[::5]
    for ask, answer in zip(asks, door.ask(*[recommend(**ask) for ask in asks]), strict=True):
        told = door.why(answer, "?k=0").json()
        sent = answer.json()
        assert told["request_id"] == sent["request_id"]
        assert told["answered"] == {"items": sent["items"], "degraded": sent["degraded"]}, "bit by bit"
        assert told["again"] == told["answered"], ask
        assert (told["equal"], told["difference"]) == (True, 0.0)
        assert told["generation"] == sent["generation"]
        assert told["reasons"] == []


@pytest.mark.parametrize("layout", [fused, split])
def test_what_was_answered_together_is_made_again_together(
    bundle: Bundle, tmp_path: Path, layout: Callable[[Bundle], Ingress]
) -> None:
    door, asks = Door(layout(bundle), tmp_path), [{"user": f"u{n}", "k": 5 + n % 3} for n in range(24)]

    async def scene() -> list[Any]:
        app = build_asgi(door.router, seen=door.seen)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            sent = await asyncio.gather(*(client.post("/v1/recommend", json=ask) for ask in asks))
            for answer in sent:
                await door.logged(answer.json()["request_id"])
            where = [f"/v1/why/{answer.json()['request_id']}?k=1" for answer in sent]
            return [(await client.get(url)).json() for url in where]

    told = asyncio.run(scene())
    assert max(one["together"] for one in told) > 4, "they came at the same time"
    assert all(one["equal"] for one in told), "to the last bit"
    assert [one["asked"]["user"] for one in told] == [ask["user"] for ask in asks]


def test_a_batch_that_is_not_kept_whole_is_made_again_alone(bundle: Bundle, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path, KEEPING)
    for place in (0, 2):
        log._log.write([{"request_id": f"r{place}", "batch": ["b-1.0", place, 3], "items": []}])
    log._log.write([{"request_id": "r1", "batch": ["b-1.01", 1, 1], "items": []}])
    assert [line["request_id"] for line in log.find("r2")] == ["r2", "r2"]
    log._log.write([{"request_id": "late", "batch": ["b-1.0", 1, 3], "items": []}])
    assert [line["request_id"] for line in log.find("r2")] == ["r2", "r0", "late", "r2"]
    assert log.find("r") == []


def test_events_that_counted_count_again(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(fused(bundle), tmp_path)
    door.users = UserState(SqliteStore(tmp_path / "state"))

    async def scene() -> tuple[httpx.Response, httpx.Response]:
        app = build_asgi(door.router, users=door.users, seen=door.seen)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            events = {"user": "u1", "events": [{"item": "i5", "time": 1_700_000_000}]}
            await client.post("/v1/events", json=events)
            answer = await client.post("/v1/recommend", json={"user": "u1"})
            await client.post("/v1/events", json={"user": "u1", "events": [{"item": "i9"}]})
            await door.logged(answer.json()["request_id"])
            return answer, await client.get(f"/v1/why/{answer.json()['request_id']}")

    answer, why = asyncio.run(scene())
    assert why.json()["equal"], "what came later changes nothing"
    assert why.json()["events"] == [["i5", 1_700_000_000.0, 1.0]]
    assert why.json()["asked"] == {"user": "u1"}
    assert why.json()["answered"]["items"] == answer.json()["items"]


@pytest.mark.parametrize("layout", [fused, split])
def test_reasons_are_those_of_the_bundle(
    bundle: Bundle, tmp_path: Path, layout: Callable[[Bundle], Ingress]
) -> None:
    door = Door(layout(bundle), tmp_path)
    answer = door.ask(recommend(user="u1", k=4, context={"weather": "rain"}))[0]
    told = door.why(answer, "?k=2").json()["reasons"]
    want = bundle.recommend("u1", k=4, context={"weather": "rain"}, why=True).why[:2]
    assert [one["item"] for one in told] == [one.item for one in want]
    for one, other in zip(told, want):
        assert one["score"] == pytest.approx(other.score, abs=1e-6)
        assert one["additive"] == other.additive
        strongest = max(other.reasons, key=lambda reason: abs(reason.weight))
        assert one["reasons"][0]["weight"] == pytest.approx(strongest.weight, abs=1e-6)
        assert len(one["reasons"]) <= 10
    assert len(door.why(answer).json()["reasons"]) == 4


def test_what_cannot_be_told(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(fused(bundle), tmp_path)
    answer = door.ask(recommend(user="u1"))[0]
    for path, status, code in (
        ("/v1/why/nobody", 404, "unknown_answer"),
        ("/v1/why/a%20b", 404, "unknown_answer"),
        (f"/v1/why/{answer.json()['request_id']}?k=21", 422, "invalid_value"),
        (f"/v1/why/{answer.json()['request_id']}?n=1", 422, "unknown_field"),
    ):
        got = door.ask(("GET", path, None))[0]
        assert (got.status_code, got.json()["error"]["code"]) == (status, code)
    door.resident.held = {}
    assert door.why(answer).status_code == 410
    off = Door(fused(bundle), tmp_path / "off", Keeping())
    answer = off.ask(recommend(user="u1"))[0]
    got = off.why(answer)
    assert (got.status_code, got.json()["error"]["code"]) == (404, "no_answers")
    assert not list((tmp_path / "off").glob("*answers*")), "off unless it is asked for"


def test_a_name_that_comes_twice_is_its_newest_answer(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(fused(bundle), tmp_path)

    async def scene() -> list[Any]:
        app = build_asgi(door.router, seen=door.seen)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for user in ("u1", "u2"):
                head = {"x-request-id": "mine"}
                await client.post("/v1/recommend", json={"user": user}, headers=head)
                last = await client.post("/v1/recommend", json={"user": user})
                await door.logged(last.json()["request_id"])
            return [(await client.get("/v1/why/mine")).json()["asked"]]

    assert asyncio.run(scene()) == [{"user": "u2"}]


def test_answers_are_deleted_by_age_and_size(bundle: Bundle, tmp_path: Path) -> None:
    import os
    import time

    now = [time.time()]
    log = AnswerLog(tmp_path, Keeping(hours=1, bytes=1 << 20), clock=lambda: now[0])
    line = {"request_id": "r", "pad": "x" * 5000}
    for _ in range(1000):
        log._log.write([line])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 1 << 19 < size <= 1 << 20
    assert stat.S_IMODE(next(tmp_path.glob("*answers*")).stat().st_mode) == 0o600
    log.tidy()
    assert list(read(tmp_path, "answers"))
    now[0] += 3600
    for path in tmp_path.iterdir():
        os.utime(path, (now[0] - 3601, now[0] - 3601))
    log.tidy()
    assert list(read(tmp_path, "answers")) == []


def test_the_users_token_is_asked_for(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(fused(bundle), tmp_path)

    async def scene() -> list[int]:
        app = build_asgi(door.router, seen=door.seen, token_digest=auth.digest("t"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            heads: list[dict[str, str]] = [{}, {"authorization": "Bearer x"}, {"authorization": "Bearer t"}]
            return [(await client.get("/v1/why/a", headers=head)).status_code for head in heads]

    assert asyncio.run(scene()) == [401, 401, 404]


def test_a_share_of_the_answers(bundle: Bundle, tmp_path: Path) -> None:
    door = Door(fused(bundle), tmp_path, Keeping(hours=1, share=0.5))
    assert door.seen.kept is not None
    door.seen.kept._draw.seed(1)

    async def scene() -> None:
        app = build_asgi(door.router, seen=door.seen)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for _ in range(60):
                await client.post("/v1/recommend", json={"history": ["i1"], "k": 1})
        assert door.seen.kept is not None
        door.seen.kept.close()

    asyncio.run(scene())
    assert 15 < len(list(read(tmp_path, "answers"))) < 45


@pytest.mark.parametrize(
    "bad", [{"hours": -1}, {"hours": math.inf}, {"bytes": 10}, {"share": 0.0}, {"share": 1.5}]
)
def test_a_bad_setting_is_refused_in_a_line(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError) as error:
        build(GraphArgs, {"bundle": "b", "answers": bad})
    assert "\n" not in str(error.value)


def test_answers_need_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--feedback"):
        settled(GraphArgs(bundle="b", answers=KEEPING), 1)
    made = settled(GraphArgs(bundle="b", answers=KEEPING, state=str(tmp_path / "s")), 1)
    assert made.answers == KEEPING


def test_the_route_is_documented(bundle: Bundle, tmp_path: Path) -> None:
    document = Door(fused(bundle), tmp_path).ask(("GET", "/openapi.json", None))[0].json()
    assert set(document["paths"]["/v1/why/{request_id}"]["get"]["responses"]) >= {"200", "404", "410"}
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    fields = document["components"]["schemas"]["WhyResponse"]["properties"]
    assert all("description" in field or name == "request_id" for name, field in fields.items())

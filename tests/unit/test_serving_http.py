"""The HTTP door without Ray: every bad request gets its 4xx with a body, and the next one a 200."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterable
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from recray.serving import admin, auth, schema
from recray.serving.admission import Door, Visit
from recray.serving.http import Reply, build_asgi
from recray.serving.schema import MAX_BODY, ApiError, RecommendRequest


class Fake:
    """Answers the history back, so that a test sees what was understood."""

    async def recommend(self, ask: RecommendRequest) -> Reply:
        if ask.user == "boom":
            raise RuntimeError("secret-user boom")
        if ask.user == "away":
            raise ApiError(503, "unavailable", "a stage does not answer", "Ranker")
        items = [{"item": i, "score": 1.0, "source": "fake"} for i in ask.history or ["a"]]
        return Reply(items[: ask.k], "g1", [], {"total": 0.1})

    async def similar(self, item: str, k: int) -> Reply:
        if item == "nowhere":
            raise ApiError(404, "unknown_item", "no such item", "path.id")
        return Reply([{"item": item, "score": 1.0, "source": "fake"}], "g1")

    async def ready(self) -> str:
        return "g1"


def ask(method: str, url: str, *, token: str | None = None, **kwargs: Any) -> httpx.Response:
    app = build_asgi(Fake(), token_digest=token and auth.digest(token))

    async def scene() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            answer = await client.request(method, url, **kwargs)
            good = {"authorization": f"Bearer {token}"} if token else {}
            after = await client.post("/v1/recommend", json={"history": ["x"]}, headers=good)
            assert after.status_code == 200, "the server keeps answering"
            return answer

    return asyncio.run(scene())


def test_a_good_request() -> None:
    answer = ask("POST", "/v1/recommend", json={"history": ["b", 7], "k": 5, "user": 3})
    assert answer.status_code == 200
    body = answer.json()
    assert set(body) == {"request_id", "generation", "items", "degraded", "timing_ms"}
    assert [i["item"] for i in body["items"]] == ["b", "7"], "numbers are ids too"
    assert body["generation"] == "g1"
    assert body["degraded"] == []
    assert len(body["request_id"]) == 32


@pytest.mark.parametrize(
    ("body", "status", "code", "where"),
    [
        (b"", 400, "not_json", "body"),
        (b"{", 400, "not_json", "body"),
        (b"\xff\xfe", 400, "not_json", "body"),
        (b"[" * 5000, 400, "not_json", "body"),
        (b'{"k": NaN}', 400, "not_json", "body"),
        (b"[]", 422, "invalid_value", "body"),
        (b"null", 422, "invalid_value", "body"),
        (b'{"k": 0}', 422, "invalid_value", "body.k"),
        (b'{"k": 1001}', 422, "invalid_value", "body.k"),
        (b'{"k": -1}', 422, "invalid_value", "body.k"),
        (b'{"k": 2.5}', 422, "invalid_value", "body.k"),
        (b'{"k": "10"}', 422, "invalid_value", "body.k"),
        (b'{"k": true}', 422, "invalid_value", "body.k"),
        (b'{"k": null}', 422, "invalid_value", "body.k"),
        (b'{"k": 99999999999999999999999999}', 422, "invalid_value", "body.k"),
        (b'{"kk": 5}', 422, "unknown_field", "body.kk"),
        (b'{"user": ["u"]}', 422, "invalid_value", "body.user"),
        (b'{"user": ""}', 422, "invalid_value", "body.user"),
        (b'{"user": true}', 422, "invalid_value", "body.user"),
        (b'{"history": "abc"}', 422, "invalid_value", "body.history"),
        (b'{"history": ["a", null]}', 422, "invalid_value", "body.history.1"),
        (b'{"history": ["' + b"x" * 1001 + b'"]}', 422, "invalid_value", "body.history.0"),
        (b'{"exclude": null}', 422, "invalid_value", "body.exclude"),
        (b'{"filter": []}', 422, "invalid_value", "body.filter"),
        (b'{"filter": {"c": {"d": 1}}}', 422, "invalid_value", "body.filter.c"),
        (b'{"context": {"c": [1]}}', 422, "invalid_value", "body.context.c"),
        (b'{"history": [' + b'"a",' * 10_000 + b'"a"]}', 422, "invalid_value", "body.history"),
        (b" " * (MAX_BODY + 1), 413, "body_too_large", "body"),
    ],
)
def test_bad_bodies(body: bytes, status: int, code: str, where: str) -> None:
    answer = ask("POST", "/v1/recommend", content=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["where"]) == (code, where)
    assert error["message"]


def test_a_streamed_body_is_not_read_beyond_the_limit() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1600):  # 100 MB, without a content-length
            sent += 65536
            yield b" " * 65536

    answer = ask("POST", "/v1/recommend", content=endless())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert sent < 2 * MAX_BODY


@pytest.mark.parametrize(
    ("method", "url", "status", "code"),
    [
        ("GET", "/", 404, "unknown_route"),
        ("GET", "/v1/recommend", 405, "method_not_allowed"),
        ("PUT", "/healthz", 405, "method_not_allowed"),
        ("GET", "/v1/items/nowhere/similar", 404, "unknown_item"),
        ("GET", "/v1/items/a/similar?k=0", 422, "invalid_value"),
        ("GET", "/v1/items/a/similar?k=x", 422, "invalid_value"),
        ("GET", "/v1/items/a/similar?j=1", 422, "unknown_field"),
        ("GET", "/v1/items/a", 404, "unknown_route"),
    ],
)
def test_bad_routes(method: str, url: str, status: int, code: str) -> None:
    answer = ask(method, url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    if status == 405:
        assert answer.headers["allow"]


def test_ids_with_slashes_and_other_letters() -> None:
    answer = ask("GET", "/v1/items/a%2Fb%20%C3%A9/similar?k=3")
    assert answer.json()["items"][0]["item"] == "a/b é"


def test_failures_inside_say_nothing_of_the_request(caplog: pytest.LogCaptureFixture) -> None:
    answer = ask("POST", "/v1/recommend", json={"user": "boom"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal"
    assert "secret" not in answer.text
    answer = ask("POST", "/v1/recommend", json={"user": "away"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["where"] == "Ranker"


def test_tokens() -> None:
    body = {"json": {"history": ["a"]}}
    token = "t0ken-of-the-test"
    for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {token}"}):
        answer = ask("POST", "/v1/recommend", token=token, headers=header, **body)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    right = {"authorization": f"Bearer {token}"}
    assert ask("POST", "/v1/recommend", token=token, headers=right, **body).status_code == 200
    assert ask("GET", "/v1/nothing", token=token).status_code == 401
    for url in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert ask("GET", url, token=token).status_code == 200


def test_the_access_log_is_json_and_holds_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="recray.access"):
        headers = {"x-request-id": "abc-1"}
        ask("POST", "/v1/recommend", json={"user": "mary", "history": ["pills"]}, headers=headers)
    line = json.loads(caplog.records[0].getMessage())
    assert line["request_id"] == "abc-1"
    assert line["route"] == "/v1/recommend"
    assert line["status"] == 200
    assert line["generation"] == "g1"
    assert line["ms"] > 0
    assert not any(word in caplog.text for word in ("mary", "pills"))


def test_openapi_names_every_route_and_the_docs_load_nothing_else() -> None:
    document = ask("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        "/v1/recommend",
        "/v1/events",
        "/v1/items/{id}/similar",
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/docs",
    }
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    page = ask("GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/items/{id}/similar" in page.text
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "src=" not in page.text


def test_a_body_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "BODY_S", 0.05)

    async def stalling() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    answer = ask("POST", "/v1/recommend", content=stalling())
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "body_too_slow"


IDS = st.one_of(st.text(max_size=3), st.integers(), st.none(), st.text(min_size=1000, max_size=1001))
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "user": IDS,
        "history": st.one_of(st.none(), st.lists(IDS, max_size=4)),
        "exclude": st.lists(IDS, max_size=4),
        "k": st.one_of(st.none(), st.booleans(), st.integers(-1, 1001)),
        "context": st.just({"weather": "sun"}),
        "other": st.just(1),
    },
)


@given(BODIES)
def test_the_short_way_takes_only_what_the_model_takes_and_makes_the_same_of_it(body: dict[str, Any]) -> None:
    try:
        wanted = RecommendRequest.model_validate(body)
    except ValidationError:
        with pytest.raises(ApiError):
            schema.parse_recommend(body)
    else:
        assert schema.parse_recommend(body) == wanted


def test_most_requests_go_the_short_way() -> None:
    assert schema._is_plain({"user": "u", "history": ["a", "b"], "exclude": [], "k": 10})
    assert schema._is_plain({})
    assert not schema._is_plain({"history": ["a", 7]})
    assert schema.parse_recommend({"user": "u"}).exclude is not schema.parse_recommend({}).exclude


class Closed(Door):
    """Lets nobody in."""

    def enter(self, headers: Iterable[tuple[bytes, bytes]]) -> Visit:
        raise ApiError(503, "overloaded", "not now", retry_after_s=7)


def test_who_is_sent_away_is_answered_before_anything_around_the_application_is_asked() -> None:
    gate, asked = build_asgi(Fake(), door=Closed()), []

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await gate({**scope, "root_path": "/shop"}, receive, send)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.before(around, scope, receive, send)

    async def scene() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(outside), base_url="http://test"
        ) as client:
            answer = await client.post("/shop/v1/recommend", json={"history": ["x"]})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
            assert answer.json()["error"]["code"] == "overloaded"
            assert asked == []
            assert (await client.get("/shop/v1/recommend")).status_code == 405
            assert (await client.get("/shop/healthz")).status_code == 200
            assert len(asked) == 2

    asyncio.run(scene())


def test_who_came_in_before_is_counted_once() -> None:
    door = Door()
    gate, inside = build_asgi(Fake(), door=door), []

    async def around(scope: Scope, receive: Receive, send: Send) -> None:
        inside.append(door.inside)
        await gate(scope, receive, send)
        inside.append(door.inside)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.before(around, scope, receive, send)

    async def scene() -> None:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(outside), base_url="http://test"
        ) as client:
            assert (await client.post("/v1/recommend", json={"history": ["x"]})).status_code == 200
            assert (await client.post("/v1/recommend", content=b"{")).status_code == 400

    asyncio.run(scene())
    assert inside == [1, 1, 1, 1]
    assert door.inside == 0


def status_of(app: Any, method: str, path: str, root: str) -> int:
    """Of a request without a token, handed over as a server does."""
    scope = {"type": "http", "method": method, "path": path, "root_path": root, "query_string": b""}
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(app({**scope, "headers": [(b"host", b"any.example")]}, receive, send))
    return int(sent[0]["status"])


class Steps:
    """The admin's steps, of which none may be taken."""

    async def rollback(self) -> dict[str, Any]:
        raise AssertionError

    generations = rollback


ROUTES = [
    ("GET", "/admin/generations"),
    ("POST", "/admin/rollback"),
    ("GET", "/v1/items/i/similar"),
    ("POST", "/v1/recommend"),
]


@given(
    st.sampled_from(["", "/", "//", "/x", "/x/", "/x//", "/admin", "/admin/", "/v1", "/v1/", "/a/b/"]),
    st.text("/", max_size=2),
    st.sampled_from(ROUTES),
)
def test_no_prefix_leads_past_the_tokens(root: str, more: str, route: tuple[str, str]) -> None:
    user, other, (method, path) = auth.digest("u"), auth.digest("a"), route
    app = build_asgi(Fake(), token_digest=user, admin_digest=other, steps=cast(admin.Admin, Steps()))
    for above in (root, root.rstrip("/")):
        assert status_of(app, method, f"{above}{more}{path}", root) in (401, 404)


@pytest.mark.parametrize("root", ["", "/", "/x", "/x/"])
@pytest.mark.parametrize(("method", "path"), ROUTES[2:])
def test_a_prefix_is_the_same_with_a_slash_behind(root: str, method: str, path: str) -> None:
    path = f"{root.rstrip('/')}{path}"
    assert status_of(build_asgi(Fake(), token_digest=auth.digest("u")), method, path, root) == 401
    assert status_of(build_asgi(Fake()), method, path, root) == 200

"""The admin's door and who asks at it: tokens, bodies, errors in one line, and the verbs as clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import recray
from recray.cli.main import main
from recray.errors import InputError, RecrayError
from recray.serving import auth, client
from recray.serving.http import Reply, build_asgi
from recray.serving.items import ItemsRequest
from recray.serving.schema import ApiError, RecommendRequest

TOLD = {
    "generation": "b1",
    "previous": "a1",
    "next": None,
    "share": 0.0,
    "version": 3,
    "changed": True,
    "why": "shipped b1",
}


class Steps:
    """Takes note of what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def ship(self, bundle: str, share: float | None = None) -> dict[str, Any]:
        await asyncio.sleep(0.01)
        self.asked.append((bundle, share))
        if bundle == "broken":
            raise ApiError(422, "bundle_refused", "broken: was altered", "body.bundle")
        return TOLD

    async def rollback(self) -> dict[str, Any]:
        self.asked.append("rollback")
        return TOLD

    async def items(self, asked: ItemsRequest) -> dict[str, Any]:
        self.asked.append(asked.plain())
        return TOLD

    async def generations(self) -> dict[str, Any]:
        return {**TOLD, "counts": {}}

    def clicked(self, user: str, events: Sequence[tuple[str | None, str | None]]) -> None:
        self.asked.append((user, events))


class Nobody:
    """An Answerer that is not asked."""

    async def recommend(self, ask: RecommendRequest) -> Reply:
        return Reply([], "b1")

    async def similar(self, item: str, k: int) -> Reply:
        return Reply([], "b1")

    async def ready(self) -> str:
        return "b1"


def ask(
    method: str,
    path: str,
    *,
    token: str | None = None,
    admin: str | None = None,
    host: str = "127.0.0.1:8000",
    steps: Steps | None = None,
    **kwargs: Any,
) -> httpx.Response:
    app = build_asgi(
        Nobody(),
        token_digest=token and auth.digest(token),
        admin_digest=admin and auth.digest(admin),
        steps=steps or Steps(),
    )

    async def scene() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url=f"http://{host}"
        ) as session:
            return await session.request(method, path, **kwargs)

    return asyncio.run(scene())


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_on_this_machine_without_any_token() -> None:
    steps = Steps()
    answer = ask("POST", "/admin/ship", json={"bundle": "/b", "canary": 0.05}, steps=steps)
    assert (answer.status_code, answer.json()) == (200, TOLD)
    assert ask("POST", "/admin/rollback", json={}, steps=steps).status_code == 200
    assert steps.asked == [("/b", 0.05), "rollback"]
    for host in ("[::1]:8000", "[::1]"):
        assert ask("GET", "/admin/generations", host=host).json()["counts"] == {}
    assert ask("GET", "/admin/generations", host="localhost").status_code == 200


def test_a_page_in_a_browser_cannot() -> None:
    steps = Steps()
    text = {"content-type": "text/plain"}
    for path in ("/admin/ship", "/admin/rollback", "/admin/items"):
        answer = ask("POST", path, content=b'{"bundle": "/b"}', headers=text, steps=steps)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "not_json")
        answer = ask("POST", path, json={"bundle": "/b"}, host="evil.example:8000", steps=steps)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_admin_token")
    for host in ("evil.example", "[2001:db8::1]", "[2001:db8::1]:8000"):
        assert ask("GET", "/admin/generations", host=host).status_code == 403
    assert steps.asked == []


def test_a_users_token_is_not_the_admins() -> None:
    both: dict[str, Any] = {"token": "user-token", "admin": "admin-token"}
    for step, method in (("ship", "POST"), ("rollback", "POST"), ("items", "POST"), ("generations", "GET")):
        path = f"/admin/{step}"
        for headers in ({}, bearer("user-token"), bearer("wrong")):
            answer = ask(method, path, headers=headers, **both)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        answer = ask(method, path, headers=bearer("user-token"), token="user-token")
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "no_admin_token")
        body = (
            {"json": {"withdraw": ["i1"]} if step == "items" else {"bundle": "/b"}}
            if method == "POST"
            else {}
        )
        assert ask(method, path, headers=bearer("admin-token"), host="any.example", **body, **both).is_success
    assert ask("POST", "/v1/recommend", json={}, headers=bearer("admin-token"), **both).status_code == 401


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ([], "body"),
        ({}, "body.bundle"),
        ({"bundle": ""}, "body.bundle"),
        ({"bundle": 3}, "body.bundle"),
        ({"bundle": "/b", "canary": 0}, "body.canary"),
        ({"bundle": "/b", "canary": 1.0}, "body.canary"),
        ({"bundle": "/b", "canary": "5%"}, "body.canary"),
        ({"bundle": "/b", "force": True}, "body.force"),
    ],
)
def test_bad_bodies(body: Any, where: str) -> None:
    answer = ask("POST", "/admin/ship", json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["where"] == where
    assert (
        ask("POST", "/admin/ship", content=b"{", headers={"content-type": "application/json"}).status_code
        == 400
    )


def test_routes_and_their_document() -> None:
    assert ask("GET", "/admin/ship").status_code == 405
    assert ask("POST", "/admin/nothing", json={}).status_code == 404
    document = ask("GET", "/openapi.json").json()
    paths = {"/admin/ship", "/admin/rollback", "/admin/items", "/admin/generations"}
    assert paths <= set(document["paths"])
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
    assert "/admin/ship" in ask("GET", "/docs").text
    app = build_asgi(Nobody())

    async def without() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as one:
            return (await one.get("/admin/generations")).status_code

    assert asyncio.run(without()) == 404


def test_a_step_outlives_whoever_asked_for_it() -> None:
    steps = Steps()
    app = build_asgi(Nobody(), steps=steps)

    async def scene() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as one:
            call = asyncio.create_task(one.post("/admin/ship", json={"bundle": "/b"}))
            await asyncio.sleep(0.005)
            call.cancel()
            await asyncio.sleep(0.05)

    asyncio.run(scene())
    assert steps.asked == [("/b", None)]


class Door(BaseHTTPRequestHandler):
    """Answers what the test says, and keeps what it was asked."""

    status, body = 200, json.dumps(TOLD).encode()
    to: str | None = None  # where a redirect leads
    cut = False  # whether more was to come
    asked: tuple[str, str | None, Any] = ("", None, None)

    def do_POST(self) -> None:
        given = (
            None
            if self.command == "GET"
            else json.loads(self.rfile.read(int(self.headers["content-length"])))
        )
        type(self).asked = (self.path, self.headers["authorization"], given)
        self.send_response(self.status)
        if self.to is not None:
            self.send_header("location", self.to)
        if self.cut:
            self.send_header("content-length", str(len(self.body) + 9))
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Door]]:
    monkeypatch.delenv(auth.ADMIN_ENV, raising=False)
    with opened() as made:
        yield made


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    made = type("Made", (Door,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), made) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        made.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield made
        server.shutdown()
        thread.join()


def test_the_verbs_ask_a_server(door: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = recray.ship(tmp_path / "bundle", canary="5%", url=door.url, token="t")
    assert told == TOLD
    assert door.asked == ("/admin/ship", "Bearer t", {"bundle": str(tmp_path / "bundle"), "canary": 0.05})
    assert recray.rollback(url=f"{door.url}/")["generation"] == "b1"
    assert door.asked == ("/admin/rollback", None, {})
    assert main(["ship", "s3://shop/bundle", "--url", door.url]) == 0
    assert door.asked[2] == {"bundle": "s3://shop/bundle"}
    assert capsys.readouterr() == ("b1\n", "shipped b1\n")
    assert main(["rollback", "--url", door.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == TOLD


def test_the_verb_why_asks_a_server(door: Any, capsys: pytest.CaptureFixture[str]) -> None:
    reason = {"weight": 0.5, "item": "i7", "shared": {}}
    item = {"item": "i1", "score": 0.25, "source": "ranker"}
    told = {
        "generation": "g",
        "equal": True,
        "answered": {"items": [item, item | {"item": "i2"}], "degraded": []},
    }
    told["reasons"] = [{"item": "i1", "reasons": [reason]}]
    door.body = json.dumps(told).encode()
    assert recray.why("a b", k=3, url=door.url, token="t") == told
    assert door.asked == ("/v1/why/a%20b?k=3", "Bearer t", None)
    assert main(["why", "abc", "--url", door.url]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split() == ["i1", "0.25", "ranker", "i7", "+0.5"]
    assert len(said.out.splitlines()) == 2
    assert said.err == "generation g; the same again; not degraded\n"
    door.status = 401
    with pytest.raises(InputError, match=r"\$RECRAY_TOKEN"):
        recray.why("abc", url=door.url)


@pytest.mark.parametrize(
    ("status", "kind", "match"),
    [
        (401, InputError, "--token-file"),
        (403, InputError, auth.ADMIN_ENV),
        (409, InputError, "the words"),
        (422, InputError, "the words"),
        (500, RecrayError, "the words"),
        (503, RecrayError, "the words"),
    ],
)
def test_refusals_are_one_line(door: Any, status: int, kind: type[RecrayError], match: str) -> None:
    door.status = status
    error = {"code": "c", "message": "the words", "where": "body.bundle"}
    door.body = json.dumps({"request_id": "r", "error": error}).encode()
    with pytest.raises(kind, match=match) as raised:
        recray.ship("/b", url=door.url)
    assert type(raised.value) is kind
    assert "\n" not in str(raised.value)
    door.body = b"<html>"
    with pytest.raises(kind):
        recray.rollback(url=door.url)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("to", ["http://localhost:{port}/x", "ftp://elsewhere/x", "http://[::1"])
def test_no_redirect_is_followed(door: Any, status: int, to: str) -> None:
    with opened() as elsewhere:
        door.status, door.to = status, to.format(port=elsewhere.url.rpartition(":")[2])
        for verb in (recray.ship, recray.why):
            with pytest.raises(InputError) as raised:
                verb("/b", url=door.url, token="t")
            assert door.to in str(raised.value)
            assert "\n" not in str(raised.value)
        assert elsewhere.asked == ("", None, None), "nobody else hears of the token"


@pytest.mark.parametrize("status", [200, 409, 500])
def test_an_answer_that_is_cut_is_told_in_one_line(door: Any, status: int) -> None:
    door.status, door.cut = status, True
    with pytest.raises(RecrayError) as raised:
        recray.ship("/b", url=door.url, token="t")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("rest", ["[::1", "127.0.0.1:1/a b", "a b", "127.0.0.1:x", "127.0.0.1:99999", ""])
def test_what_is_no_address_is_refused_in_one_line(rest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollback", "--url", f"http://{rest}"]) == 2
    said = capsys.readouterr().err
    assert "is not a server's address" in said
    assert said.count("\n") == 1


@given(st.text(max_size=12) | st.text("[]:@/?#%. 1a\\", max_size=8))
def test_any_address_ends_in_an_error_of_ours(rest: str) -> None:
    def nobody(*_: object, **__: object) -> socket.socket:
        raise ConnectionRefusedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", nobody)
        with pytest.raises(InputError):
            recray.rollback(url=f"http://{rest}", token="t")


def test_what_speaks_no_http_is_no_server_of_ours() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            with server.accept()[0] as one:
                one.sendall(b"SSH-2.0-x\r\n")
                one.recv(1 << 16)

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(InputError, match="no server of ours answers"):
            recray.rollback(url=f"http://127.0.0.1:{server.getsockname()[1]}", token="t")
        thread.join()


def test_where_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:1", "ftp://x", "127.0.0.1:8000"):
        assert main(["rollback", "--url", url]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for share in ("0%", "100%", "-5%", "x", "5"):
        assert main(["ship", "/b", "--canary", share]) == 2
    assert client.share_of("5%") == client.share_of("0.05") == client.share_of(0.05) == 0.05

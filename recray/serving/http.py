"""The HTTP door as a plain ASGI application: routes, limits, errors with a body, an access log.

It knows no Ray: it asks an `Answerer`, which a test makes in process and a replica from handles.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recray import __version__
from recray.errors import InputError
from recray.serving import admin, admission, answers, auth, schema
from recray.serving.admission import Door
from recray.serving.docs import page
from recray.serving.schema import ApiError
from recray.serving.seen import Seen
from recray.serving.state import UserState

access = logging.getLogger("recray.access")
log = logging.getLogger("recray.serving")

RECOMMEND = "/v1/recommend"
VISIT = "recray.visit"  # in the scope of a request that came through the door already, or was sent away
_ASKED = re.compile(r"/v1/")  # what needs the token; health and documentation hold no data


@dataclass
class Reply:
    """What an Answerer answers: items best first, and why they are less than they could be."""

    items: list[dict[str, Any]]  # {item, score, source}
    generation: str
    degraded: list[str] = field(default_factory=list)
    timing_ms: dict[str, float] = field(default_factory=dict)
    batch: tuple[float, int, int] = (0.0, 0, 0)  # when it began, the place in it, and how many; see `Line`


class Answerer(Protocol):
    """What stands behind the door."""

    async def recommend(self, ask: schema.RecommendRequest) -> Reply: ...

    async def similar(self, item: str, k: int) -> Reply: ...

    async def ready(self) -> str:
        """The generation that every stage answers from. Raises ApiError (503) when one does not."""
        ...


def build_asgi(
    answerer: Answerer,
    *,
    token_digest: str | None = None,
    users: UserState | None = None,
    admin_digest: str | None = None,
    steps: admin.Admin | None = None,
    seen: Seen | None = None,
    door: Door | None = None,
) -> Gate:
    """The application; with a digest, /v1/* asks for that bearer token. users: takes and recalls events.
    steps: taken at /admin/* by whom `admin.check_token` lets in. seen: notes what is answered and refused.
    door: gives deadlines, and lets in who can be answered."""
    door, described = door or Door(), schema.openapi(__version__)
    admission.document(described)
    if steps is not None:
        admin.document(described)
    if seen is not None:
        answers.document(described)
    document, html = orjson.dumps(described), page(described)

    async def events(request: Request) -> Response:
        ask = schema.parse_body(await _json_body(request.scope, request.receive), schema.EventsRequest)
        if users is None:
            raise ApiError(404, "no_state", "this server keeps no events; start it with --state")
        request_id = request.scope["state"]["request_id"]
        new = await users.keep(ask, request_id)
        acted = [(one.request_id, one.event) for one, fresh in zip(ask.events, new) if fresh]
        if steps is not None and acted:
            steps.clicked(ask.user, acted)
        return _json({"request_id": request_id, "accepted": len(new), "repeated": new.count(False)})

    async def healthz(request: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(request: Request) -> Response:
        return _json({"status": "ready", "generation": await answerer.ready()})

    async def openapi(request: Request) -> Response:
        return Response(document, media_type="application/json")

    async def docs(request: Request) -> Response:
        return HTMLResponse(html, headers={"content-security-policy": _CSP})

    router = Router(
        [
            _similar(answerer, door, seen),
            Route("/v1/events", events, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/openapi.json", openapi),
            Route("/docs", docs),
            *(() if steps is None else admin.routes(steps, _body_of, _json)),
            *(() if seen is None else [seen.route(_json)]),
        ],
        redirect_slashes=False,
    )
    return Gate(router, _Recommend(answerer, users, seen, door), door, token_digest, admin_digest, seen)


def _similar(answerer: Answerer, door: Door, seen: Seen | None) -> Route:
    """GET /v1/items/{id}/similar, where nothing stands in for an answer that is late."""

    async def similar(request: Request) -> Response:
        visit = door.enter(request.scope["headers"])
        try:
            k = schema.parse_query(request.query_params, schema.SimilarQuery).k
            reply = await door.in_time(visit, answerer.similar(request.path_params["id"], k))
        finally:
            door.leave()
        if seen is not None:
            seen.similar(reply)
        return Response(_told(request.scope["state"], reply), media_type="application/json")

    return Route("/v1/items/{id:path}/similar", similar, methods=["GET"])


class _Recommend:
    """POST /v1/recommend, where the time goes: from message to message, with nothing between."""

    def __init__(self, answerer: Answerer, users: UserState | None, seen: Seen | None, door: Door) -> None:
        self._answerer, self._users, self._seen, self._door = answerer, users, seen, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise HTTPException(405, headers={"Allow": "POST"})
        visit = scope.get(VISIT) or self._door.enter(scope["headers"])
        if isinstance(visit, ApiError):
            raise visit
        try:
            ask = schema.parse_recommend(await _json_body(scope, receive))
            self._door.limit(ask, visit)
            missing = [] if self._users is None else await self._users.recall(ask)
            reply = await self._answerer.recommend(ask)
        finally:
            if VISIT not in scope:
                self._door.leave()
        reply.degraded += missing
        body = _told(scope["state"], reply)
        length = (b"content-length", str(len(body)).encode())
        headers = [length, (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        if self._users is not None:
            self._users.shown(scope["state"]["request_id"], ask.user, reply.generation, reply.items)
        if self._seen is not None:
            self._seen.answered(scope, ask, reply)


_CSP = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


class Gate:
    """Around every request: an id, the token, errors as bodies, one line in the access log."""

    def __init__(
        self,
        app: ASGIApp,
        recommend: ASGIApp,
        door: Door,
        token_digest: str | None,
        admin_digest: str | None,
        seen: Seen | None = None,
    ) -> None:
        self._app, self._recommend, self._door, self._seen = app, recommend, door, seen
        self._token_digest, self._admin_digest = token_digest, admin_digest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers, path = dict(scope["headers"]), _path(scope)
        scope = {**scope, "path": path, "root_path": ""}  # what is routed is what is checked here
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        if not schema.REQUEST_ID.fullmatch(request_id):
            request_id = os.urandom(16).hex()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        scope["app"] = self  # so the router raises what it does not know
        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if path.startswith(admin.PREFIX):
                admin.check_token(headers, scope["method"], self._token_digest, self._admin_digest)
            self._check_token(path, headers)
            if path == RECOMMEND:
                state["route"] = RECOMMEND
                await self._recommend(scope, receive, send_and_note)
            else:
                await self._app(scope, receive, send_and_note)
        except ApiError as error:
            if self._seen is not None:
                self._seen.refused(error.code)
            await _refused(error, request_id)(scope, receive, send_and_note)
        except HTTPException as error:
            await _no_route(scope, error)(scope, receive, send_and_note)
        except InputError as error:
            refusal = ApiError(422, "invalid_value", error.what, error.where or "body")
            await _refused(refusal, request_id)(scope, receive, send_and_note)
        except ClientDisconnect:
            status = 499  # nobody is left to answer
        except Exception:
            log.exception("request %s failed", request_id)
            if self._seen is not None:
                self._seen.refused("internal")
            if not status:
                refusal = ApiError(500, "internal", "the server failed; the fault is not in the request")
                await _refused(refusal, request_id)(scope, receive, send_and_note)
        finally:
            if access.isEnabledFor(logging.INFO):
                access.info(_access_line(scope, status, time.perf_counter() - start))

    async def before(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Have `app` answer, which leads here in the end, or answer at once where the door sends away."""
        path, method = scope.get("path", ""), scope.get("method")
        if method != "POST" or not path.endswith(RECOMMEND):
            await app(scope, receive, send)
            return
        try:
            scope[VISIT] = self._door.enter(scope["headers"])
        except ApiError as refusal:
            scope[VISIT], scope["root_path"] = refusal, path.removesuffix(RECOMMEND)
            await self(scope, receive, send)
            return
        try:
            await app(scope, receive, send)
        finally:
            self._door.leave()

    def _check_token(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self._token_digest is None or not _ASKED.match(path):
            return
        given = headers.get(b"authorization", b"").decode("latin-1")
        if not auth.allowed(given, self._token_digest):
            raise ApiError(401, "unauthorized", "a valid bearer token is needed", "header.authorization")


def _path(scope: Scope) -> str:
    """The path below the prefix that the application is mounted at."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def _access_line(scope: Scope, status: int, seconds: float) -> str:
    """No ids of users or items, no histories, no addresses: the route's pattern, not its path."""
    state = scope.get("state", {})
    route = state.get("route") or getattr(scope.get("route"), "path", None)
    return orjson.dumps(
        {
            "request_id": state.get("request_id"),
            "method": scope["method"][:16],
            "route": route,
            "status": status,
            "ms": round(seconds * 1e3, 2),
            **state.get("noted", {}),
        }
    ).decode()


class _Within:
    """A block that is given up after `seconds`, which raises TimeoutError; lighter than a task of its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._late = seconds, False

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if self._late and kind is asyncio.CancelledError:
            if self._task is not None and hasattr(self._task, "uncancel"):
                self._task.uncancel()
            raise TimeoutError from None

    def _end(self) -> None:
        self._late = True
        if self._task is not None:
            self._task.cancel()


async def _json_body(scope: Scope, receive: Receive) -> object:
    """The decoded body, read no further and no longer than allowed. Raises ApiError 400, 408, 413."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if declared.isdigit() and (len(declared) > 18 or int(declared) > schema.MAX_BODY):
        raise _too_large()
    try:
        with _Within(schema.BODY_S):
            body = await _read_body(receive)
    except TimeoutError:
        words = f"the body did not arrive within {schema.BODY_S:g} s"
        raise ApiError(408, "body_too_slow", words, "body") from None
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "not_json", f"the body is not JSON: {error}"[:300], "body") from None


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        if size > schema.MAX_BODY:
            raise _too_large()
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _body_of(request: Request) -> object:
    return await _json_body(request.scope, request.receive)


def _too_large() -> ApiError:
    return ApiError(413, "body_too_large", f"the body is above {schema.MAX_BODY} bytes", "body")


def _told(state: dict[str, Any], reply: Reply) -> bytes:
    """The body of an answer; what the access log says of it goes into the request's state."""
    state["noted"] = {
        "generation": reply.generation,
        "items": len(reply.items),
        "degraded": reply.degraded,
        "timing_ms": reply.timing_ms,
    }
    return orjson.dumps(
        {
            "request_id": state["request_id"],
            "generation": reply.generation,
            "items": reply.items,
            "degraded": reply.degraded,
            "timing_ms": reply.timing_ms,
        },
        option=orjson.OPT_SERIALIZE_NUMPY,
    )


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, headers, media_type="application/json")


def _refused(error: ApiError, request_id: str) -> Response:
    headers = {}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    if error.status == 503:
        headers["retry-after"] = str(error.retry_after_s)
    return _json(error.body(request_id), error.status, headers)


def _no_route(scope: Scope, error: HTTPException) -> Response:
    code = {404: "unknown_route", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    where = f"{scope['method'][:16]} {scope['path'][:200]}"
    refusal = ApiError(error.status_code, code, error.detail, where)
    made = _refused(refusal, scope["state"]["request_id"])
    for name, value in (error.headers or {}).items():  # Allow, beside 405
        made.headers[name] = value
    return made

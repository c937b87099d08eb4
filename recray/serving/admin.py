"""The admin's door: POST /admin/ship, /admin/rollback and /admin/items, GET /admin/generations.

Where an admin token is set, it opens them. Where no token is set at all, whoever names this machine by a
loopback address may come in, with a body that says it is JSON: a page of another site cannot send that.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recray.serving import auth
from recray.serving.items import ItemsRequest
from recray.serving.schema import ApiError, parse_body

PREFIX = "/admin/"


class Admin(Protocol):
    """What stands behind the door; see `shipping.Shipper`."""

    async def ship(self, bundle: str, share: float | None = None) -> dict[str, Any]: ...

    async def rollback(self) -> dict[str, Any]: ...

    async def items(self, asked: ItemsRequest) -> dict[str, Any]: ...

    async def generations(self) -> dict[str, Any]: ...

    def clicked(self, user: str, events: Sequence[tuple[str | None, str | None]]) -> None:
        """Count a user's events, as (id of the answer that showed the item, kind), and those answers."""
        ...


class ShipRequest(BaseModel):
    """Which bundle, and for whom."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bundle: str = Field(min_length=1, max_length=4096, description="Path or URI, as the replicas reach it.")
    canary: float | None = Field(
        None, gt=0, lt=1, description="Share of the users who get it at first; without: all of them."
    )


class Count(BaseModel):
    """What happened to the requests of a generation since the newest step that changed who answers."""

    requests: int
    errors: int
    clicks: int = Field(description="Answers that events named by their request_id.")
    refused: int = Field(description="Refused by a stage that did not hold it, then answered from another.")
    p99_ms: float | None


class Generations(BaseModel):
    """Who answers now."""

    generation: str = Field(description="The current one.")
    previous: str | None = Field(description="What a rollback leads to.")
    next: str | None = Field(description="Being loaded, or on canary.")
    share: float = Field(description="Of the users whom `next` answers.")
    version: int = Field(description="Counts the steps of this application.")
    changed: bool = Field(description="Whether this request changed anything.")
    why: str = Field(description="The newest step in words.")
    counts: dict[str, Count] = Field({}, description="By generation; of GET alone.")


def check_token(
    headers: Mapping[bytes, bytes], method: str, token_digest: str | None, admin_digest: str | None
) -> None:
    """Raises ApiError 401, 403 or 415 for who may not come in."""
    given = headers.get(b"authorization", b"").decode("latin-1")
    if admin_digest is not None:
        if not auth.allowed(given, admin_digest):
            raise ApiError(401, "unauthorized", "the admin's bearer token is needed", "header.authorization")
        return
    if token_digest is not None:
        words = f"no admin token is set; set {auth.ADMIN_ENV} where the server starts"
        raise ApiError(403, "no_admin_token", words, "header.authorization")
    host = headers.get(b"host", b"").decode("latin-1")
    named = host if host.endswith("]") else host.rpartition(":")[0] or host  # without a port
    if not auth.is_loopback(named):
        raise ApiError(403, "no_admin_token", "without an admin token only loopback may", "header.host")
    kind = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
    if method == "POST" and kind != "application/json":
        raise ApiError(415, "not_json", "the content-type must be application/json", "header.content-type")


def routes(
    admin: Admin,
    read: Callable[[Request], Awaitable[object]],
    told: Callable[[dict[str, Any]], Response],
) -> list[Route]:
    """The routes. read: the decoded body of a request; told: a JSON answer."""

    async def ship(request: Request) -> Response:
        ask = parse_body(await read(request), ShipRequest)
        return told(await _whole(admin.ship(ask.bundle, ask.canary)))

    async def rollback(request: Request) -> Response:
        return told(await _whole(admin.rollback()))

    async def items(request: Request) -> Response:
        return told(await _whole(admin.items(parse_body(await read(request), ItemsRequest))))

    async def generations(request: Request) -> Response:
        return told(await admin.generations())

    return [
        Route(f"{PREFIX}ship", ship, methods=["POST"]),
        Route(f"{PREFIX}rollback", rollback, methods=["POST"]),
        Route(f"{PREFIX}items", items, methods=["POST"]),
        Route(f"{PREFIX}generations", generations, methods=["GET"]),
    ]


async def _whole(work: Any) -> dict[str, Any]:
    """A step runs to its end, also when whoever asked for it hangs up.

    In a context of its own: Serve cancels what was called in a request's.
    """
    made: dict[str, Any] = await asyncio.shield(contextvars.Context().run(asyncio.ensure_future, work))
    return made


def document(described: dict[str, Any]) -> None:
    """Add these routes and their models to an OpenAPI document."""
    schemas = described["components"]["schemas"]
    for model in (ShipRequest, ItemsRequest, Generations):
        made = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(made.pop("$defs", {}))
        schemas[model.__name__] = made
    described["components"]["securitySchemes"]["admin"] = {"type": "http", "scheme": "bearer"}
    body = {"required": True, "content": _content("ShipRequest")}
    ship = _operation("ship", "Load a bundle beside the running one, look at it, then flip", 409, 422)
    paths = described["paths"]
    paths[f"{PREFIX}ship"] = {"post": {**ship, "requestBody": body}}
    items = _operation("items", "Withdraw items at once, restore them, or add new ones", 409, 422)
    body = {"required": True, "content": _content("ItemsRequest")}
    paths[f"{PREFIX}items"] = {"post": {**items, "requestBody": body}}
    words = "Back to the generation before, or without the canary"
    paths[f"{PREFIX}rollback"] = {"post": _operation("rollback", words, 409)}
    paths[f"{PREFIX}generations"] = {"get": _operation("generations", "Who answers now")}


_MEANING = {
    401: "the admin token is missing or wrong",
    403: "no admin token is set, and the client is not on this machine",
    409: "not now: another step is under way, or there is nothing to go back to",
    415: "the body does not say that it is JSON",
    422: "the bundle or the items are refused, or a field cannot be; the running generation is unharmed",
    503: "not every replica answers now; try again",
}


def _operation(name: str, summary: str, *errors: int) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "OK", "content": _content("Generations")}}
    for status in sorted({401, 403, 503, *errors, *((415,) if errors else ())}):
        responses[str(status)] = {"description": _MEANING[status], "content": _content("ErrorResponse")}
    return {"operationId": name, "summary": summary, "security": [{"admin": []}], "responses": responses}


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

"""What is asked and answered over HTTP, as models that validate and document themselves."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from recray.feedback.events import KEEP, Kept

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_BODY = 1_000_000  # bytes of a request body
BODY_S = 5.0  # what a body may take to arrive: a client that stalls holds a place that others wait for
MAX_K = 1000
MAX_LIST = 10_000  # ids in one list
MAX_ID = 1000  # characters of an id
MAX_EVENTS = 1000  # in one request
MAX_WORD = 64  # characters of an event's kind


class ApiError(Exception):
    """An answer that is an error: HTTP status, a code for machines, a message for people, a place."""

    def __init__(self, status: int, code: str, message: str, where: str = "", retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.where = status, code, message, where
        self.retry_after_s = retry_after_s  # of a 503

    def body(self, request_id: str) -> dict[str, Any]:
        error = {"code": self.code, "message": self.message, "where": self.where}
        return {"request_id": request_id, "error": error}


def _as_id(value: object) -> object:
    """JSON clients often hold ids as numbers; outside they are strings all the same."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Id = Annotated[
    str, BeforeValidator(_as_id, json_schema_input_type=str | int), Field(min_length=1, max_length=MAX_ID)
]
Scalar = str | bool | int | Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Scalars = Annotated[list[Scalar], Field(max_length=MAX_LIST)]
Number = int | Annotated[float, Field(allow_inf_nan=False)]


class Condition(_Strict):
    """What a column must hold, where it is more than one of some values."""

    not_: Scalar | Scalars | None = Field(None, alias="not", description="Values it must not have.")
    min: Number | None = Field(None, description="The least it may be.")
    max: Number | None = Field(None, description="The most it may be.")


class Pin(_Strict):
    """An item and its place."""

    item: Id
    place: int = Field(ge=1, le=MAX_K, description="From 1; at most k, and each once.")


class RecommendRequest(_Strict):
    """Who is asked for, what they did, and what may be answered."""

    user: Id | None = Field(None, description="A user; all that is known of them is used, events too.")
    history: list[Id] | None = Field(
        None, max_length=MAX_LIST, description="Item ids, oldest first, used in place of the stored ones."
    )
    k: int = Field(10, ge=1, le=MAX_K, description="How many items; fewer when the catalogue has fewer.")
    exclude: list[Id] = Field(default=[], max_length=MAX_LIST, description="Item ids never to answer.")
    filter: dict[str, Scalar | Scalars | Condition] | None = Field(
        None, description="Item column -> the value it must have, one of a list of values, or a condition."
    )
    context: dict[str, Scalar] | None = Field(None, description="Context column -> the value now.")
    pin: list[Id | Pin] = Field(
        default=[],
        max_length=MAX_K,
        description="Items that have places: an id takes the first that is free. What is excluded, known of "
        "the user or filtered out is not pinned.",
    )
    caps: dict[str, Annotated[int, Field(ge=1, le=MAX_K)]] | None = Field(
        None, description="Item column -> how many items of each of its values there may be at most."
    )
    diversity: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="How much it counts, beside scores, that items are unlike each other.",
    )

    deadline_ms: Number | None = Field(
        None,
        gt=0,
        description="The answer is wanted within that, waiting included; `degraded` says what it cost.",
    )

    _recent: Sequence[Kept] = PrivateAttr(())
    _due: float = PrivateAttr(math.inf)

    @property
    def recent(self) -> Sequence[Kept]:
        """The user's events since the bundle was built, oldest first: not sent, but looked up here."""
        return self._recent

    def remember(self, events: Sequence[Kept]) -> None:
        """Set `recent`."""
        self._recent = events

    @property
    def due(self) -> float:
        """When the answer must be there, by time.monotonic; -inf: without a model. See `admission`."""
        return self._due

    def limit(self, due: float) -> None:
        """Set `due`."""
        self._due = due

    def plain_pins(self) -> list[Any]:
        """The pins as `Bundle.request` takes them."""
        return [one.model_dump() if isinstance(one, Pin) else one for one in self.pin]

    def plain_filter(self) -> dict[str, Any] | None:
        """The filter as `Bundle.request` takes it."""
        if self.filter is None:
            return None
        told = {name: value for name, value in self.filter.items() if not isinstance(value, Condition)}
        asked = {
            name: value.model_dump(by_alias=True, exclude_none=True)
            for name, value in self.filter.items()
            if isinstance(value, Condition)
        }
        return told | asked


class SentEvent(_Strict):
    """One thing that the user did."""

    item: Id = Field(description="An item id; one that the model does not know is kept all the same.")
    time: Number | None = Field(
        None, ge=0, description="Seconds since 1970, at most a day ahead; by default when it arrives."
    )
    event: Annotated[str, Field(min_length=1, max_length=MAX_WORD)] | None = Field(
        None, description="What kind of event: view, click, buy, return, or a word of yours."
    )
    weight: Number | None = Field(
        None,
        ge=-1e6,
        le=1e6,
        description="By default 1, and 0 for a return; not above 0 is logged and is no part of a history.",
    )
    event_id: Id | None = Field(
        None,
        description="Names the event among the user's: the same again changes nothing. By default its time, "
        "item and kind do, or without a time its place in this request and the X-Request-Id.",
    )
    request_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = Field(
        None, description="Of the answer that showed the item."
    )


class EventsRequest(_Strict):
    """What a user did, in any order."""

    user: Id = Field(description="Who; a user whom the bundle does not know has a history from now on.")
    events: list[SentEvent] = Field(
        min_length=1,
        max_length=MAX_EVENTS,
        description=f"Each counts in the user's next answer, which reads the newest {KEEP}.",
    )


class EventsResponse(BaseModel):
    """All of the events are kept."""

    request_id: str
    accepted: int = Field(description="Events that are kept now, all that were sent.")
    repeated: int = Field(description="How many of them were known before, and changed nothing.")


class SimilarQuery(_Strict):
    """The query of GET /v1/items/{id}/similar."""

    k: int = Field(10, ge=1, le=MAX_K)


Model = TypeVar("Model", bound=BaseModel)


class Item(BaseModel):
    """One answered item."""

    item: str
    score: float
    source: str = Field(description="What proposed it: the model's stage, 'popular' or 'pin'.")


class RecommendResponse(BaseModel):
    """Best item first, where no pin and no diversity wants it otherwise."""

    request_id: str
    generation: str = Field(description="The bundle this was answered from.")
    items: list[Item]
    degraded: list[str] = Field(description="Why this is less than it could be; empty when it is not.")
    timing_ms: dict[str, float] = Field(description="wait, retrieve, rank; total.")


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    where: str


class ErrorResponse(BaseModel):
    """The body of every answer that is not 2xx."""

    request_id: str
    error: ErrorDetail


_PLAIN = RecommendRequest.model_construct()  # copied several times as quickly as one is made


def parse_recommend(body: object) -> RecommendRequest:
    """Validate a decoded JSON body. Raises ApiError (422)."""
    if not isinstance(body, dict):
        raise ApiError(422, "invalid_value", "the body must be a JSON object", "body")
    if _is_plain(body):
        return _PLAIN.model_copy(update={"exclude": [], "pin": [], **body})
    return parse_body(body, RecommendRequest)


def parse_body(body: object, model: type[Model]) -> Model:
    """Validate a decoded JSON body. Raises ApiError (422)."""
    if not isinstance(body, dict):
        raise ApiError(422, "invalid_value", "the body must be a JSON object", "body")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _refusal(error, body, "body") from None


def _is_plain(body: dict[Any, Any]) -> bool:
    """Whether a body is sound and holds nothing but text ids and a count, as most do; the model would say
    the same ten times as slowly."""
    for name, value in body.items():
        if name in ("history", "exclude"):
            if type(value) is not list or len(value) > MAX_LIST:
                return False
            for one in value:
                if type(one) is not str or not 0 < len(one) <= MAX_ID:
                    return False
        elif name == "user":
            if type(value) is not str or not 0 < len(value) <= MAX_ID:
                return False
        elif name == "deadline_ms":
            if type(value) is not int or value <= 0:
                return False
        elif name != "k" or type(value) is not int or not 1 <= value <= MAX_K:
            return False
    return True


def parse_query(query: Mapping[str, str], model: type[Model]) -> Model:
    """Validate a query string. Raises ApiError (422)."""
    values: dict[str, Any] = dict(query)
    if "k" in values:
        try:
            values["k"] = int(values["k"][:20])
        except ValueError:
            raise ApiError(422, "invalid_value", "k must be a whole number", "query.k") from None
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _refusal(error, values, "query") from None


def _refusal(error: ValidationError, given: Any, root: str) -> ApiError:
    """The first of the errors, with the path of what was given (not of the schema's unions)."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    unknown = first["type"] == "extra_forbidden"
    where = root
    for step in first["loc"]:
        try:
            given = given[step]
        except (KeyError, IndexError, TypeError):
            break
        where += f".{str(step)[:MAX_ID]}"
    if first["type"] == "missing":
        where += f".{first['loc'][-1]}"
    message = "no such field" if unknown else first["msg"]
    return ApiError(422, "unknown_field" if unknown else "invalid_value", message, where)


def openapi(version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of every route."""
    models = (RecommendRequest, RecommendResponse, EventsRequest, EventsResponse, ErrorResponse)
    schemas: dict[str, Any] = {}
    for model in models:
        made = model.model_json_schema(
            ref_template="#/components/schemas/{model}",
            mode="validation" if issubclass(model, _Strict) else "serialization",
        )
        schemas.update(made.pop("$defs", {}))
        schemas[model.__name__] = made
    k = {"type": "integer", "minimum": 1, "maximum": MAX_K, "default": 10}
    secured: list[dict[str, list[str]]] = [{"bearer": []}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "recray", "version": version, "summary": "Recommendations over HTTP"},
        "paths": {
            "/v1/recommend": _post("recommend", "The k best items for a user or a history", "Recommend"),
            "/v1/events": _post("events", "What a user did, for the next answer and training", "Events", 404),
            "/v1/items/{id}/similar": {
                "get": {
                    "operationId": "similar",
                    "summary": "The k items most like one item",
                    "security": secured,
                    "parameters": [
                        {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}},
                        {"name": "k", "in": "query", "required": False, "schema": k},
                    ],
                    "responses": _responses("RecommendResponse", 401, 404, 422, 503),
                }
            },
            "/healthz": {"get": _plain("healthz", "The ingress is alive")},
            "/readyz": {"get": _plain("readyz", "Every stage answers", 503)},
            "/openapi.json": {"get": _plain("openapi", "This document")},
            "/docs": {
                "get": {
                    "operationId": "docs",
                    "summary": "This document, for people",
                    "responses": {"200": {"description": "OK", "content": {"text/html": {}}}},
                }
            },
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


_MEANING = {
    400: "the body is not JSON",
    401: "the token is missing or wrong",
    404: "no such item, or a server that keeps no events",
    413: f"the body is above {MAX_BODY} bytes",
    422: "a field is unknown or has a value that cannot be",
    503: "a stage does not answer now; try again",
}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _responses(name: str, *errors: int) -> dict[str, Any]:
    made: dict[str, Any] = {"200": {"description": "OK", "content": _json(name)}}
    for status in errors:
        made[str(status)] = {"description": _MEANING[status], "content": _json("ErrorResponse")}
    return made


def _post(operation: str, summary: str, name: str, *errors: int) -> dict[str, Any]:
    """A route that takes a JSON body, `name`Request, and answers with a `name`Response."""
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "security": [{"bearer": []}],
            "requestBody": {"required": True, "content": _json(f"{name}Request")},
            "responses": _responses(f"{name}Response", 400, 401, *errors, 413, 422, 503),
        }
    }


def _plain(operation: str, summary: str, *errors: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}}}
    responses = {"200": {"description": "OK", "content": content}}
    responses |= {str(e): {"description": _MEANING[e], "content": _json("ErrorResponse")} for e in errors}
    return {"operationId": operation, "summary": summary, "responses": responses}

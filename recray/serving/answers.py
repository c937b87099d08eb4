"""GET /v1/why/{request_id}: an answer as it was sent, the same made once more, and the reasons for its items.

A log of answers, off unless it is asked for, holds what was asked, with the events that counted, and what was
answered. It names users and what they did: it lies in a folder that only our user reads, one log a machine,
and is deleted by age and size (`Keeping`). From what it holds and the bundle the answer follows, so it is
made again by the same path. What a matrix product makes of one line differs in the last bits with the lines
beside it, so an answer is made again in the batch it was in, all of whose requests are in the log (but where
only a share is kept, or a client hung up). What was answered by less for want of time is made in full.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from recray.errors import ConfigError
from recray.feedback.events import Kept
from recray.feedback.log import Limits, SegmentLog, find
from recray.serving import schema
from recray.serving.backlog import Backlog, folder_for
from recray.serving.schema import ApiError, Item, RecommendRequest

if TYPE_CHECKING:
    from recray.bundles.answer import Why
    from recray.serving.http import Reply
    from recray.serving.ingress import Ingress

LOG = "answers"
PATH = "/v1/why/{request_id}"
SEGMENTS = 12  # of a log: what is deleted at a time is one of them
MOST = 10  # reasons of an item, the strongest first
EXPLAINED = 20  # items of an answer at most: each costs some hundred answers


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How long, how many and how much of the answers are kept on each machine; 0 hours: none."""

    hours: float = 0.0
    bytes: int = 256 << 20
    share: float = 1.0  # of the answers, drawn by chance

    def __post_init__(self) -> None:
        if not 0 <= self.hours < math.inf or self.bytes < 1 << 16 or not 0 < self.share <= 1:
            words = f"hours {self.hours:g}, bytes {self.bytes}, share {self.share:g}"
            raise ConfigError(words, where="answers", fix="hours from 0, 64 KiB and more, a share of 0 to 1")

    @property
    def limits(self) -> Limits:
        """Of its log."""
        seconds, part = self.hours * 3600, SEGMENTS + 1  # the one that is written counts, too
        return Limits(
            segment_bytes=self.bytes // part,
            segment_s=seconds / part,
            total_bytes=self.bytes - self.bytes // part,
            total_s=seconds - seconds / part,
        )


_Line = tuple[str, RecommendRequest, Any, float]  # request id, what was asked, the reply, time


class AnswerLog(Backlog[_Line]):
    """One process's end of the log. One event loop owns it."""

    def __init__(self, folder: Path, keeping: Keeping, *, clock: Callable[[], float] = time.time) -> None:
        """Raises ConfigError for a folder that cannot be written."""
        self._folder, self._share, self._clock = folder, keeping.share, clock
        super().__init__(SegmentLog(folder, LOG, keeping.limits, clock), LOG, self._line)
        self._draw, self._name = random.Random(), uuid.uuid4().hex[:12]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="recray-answers")

    def keep(self, request_id: str, ask: RecommendRequest, reply: Reply) -> None:
        """Log an answer, a little later."""
        if self._share == 1 or self._draw.random() < self._share:
            self.add((request_id, ask, reply, self._clock()))

    async def found(self, request_id: str) -> list[dict[str, Any]]:
        """`find`, one at a time: each may read the whole log."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self.find, request_id)

    def find(self, request_id: str) -> list[dict[str, Any]]:
        """The newest answer of that id which is still kept, and behind it all of its batch, in order, where
        they are kept too; empty without one. Reads the log, so it belongs on a thread."""
        found = find(self._folder, LOG, b'{"request_id":"%b",' % request_id.encode())
        if not found:
            return []
        key, _, of = found[0]["batch"]
        batch = find(self._folder, LOG, b'"batch":["%b",' % key.encode(), of) if of > 1 else found
        batch.sort(key=lambda line: line["batch"][1])
        whole = [line["batch"][1] for line in batch] == list(range(of))
        return [found[0], *(batch if whole else found)]

    def close(self) -> None:
        """Write what waits, and let go of it."""
        super().close()
        self._reader.shutdown(wait=False)

    def _line(self, told: _Line) -> dict[str, Any]:
        request_id, ask, reply, at = told
        began, place, of = reply.batch
        return {
            "request_id": request_id,
            "batch": [f"{self._name}-{began!r}", place, of],
            "time": at,
            "generation": reply.generation,
            "asked": ask.model_dump(by_alias=True, exclude_defaults=True),
            "events": [list(one) for one in ask.recent],
            "items": reply.items,
            "degraded": reply.degraded,
        }


def open_answers(folder: Path | None, keeping: Keeping) -> AnswerLog | None:
    """The log in a folder, None where no answers are to be kept. Raises ConfigError."""
    return AnswerLog(folder_for("answers", folder), keeping) if keeping.hours else None


class Made(BaseModel):
    """Items and what was missing."""

    items: list[Item]
    degraded: list[str]


class ReasonOfItem(BaseModel):
    """One reason."""

    weight: float = Field(description="What it adds to the score.")
    item: str = Field(description="Of the history; empty for a user like this one, who is not named.")
    shared: dict[str, str] = Field(description="Features that both items have.")


class WhyItem(BaseModel):
    """What the score of one item is made of."""

    item: str
    score: float
    base: float = Field(description="The score without any of the reasons, where these are additive.")
    additive: bool = Field(description="Whether base and weights sum to the score; else each is a loss.")
    reasons: list[ReasonOfItem]


class WhyResponse(BaseModel):
    """An answer once more."""

    request_id: str
    time: float = Field(description="When it was answered, in seconds since 1970.")
    generation: str = Field(description="The bundle it was answered from.")
    asked: dict[str, Any] = Field(description="The body of the request.")
    events: list[list[Any]] = Field(description="Of the user since that bundle: item, time, weight.")
    answered: Made = Field(description="As it was sent, to the last bit.")
    again: Made = Field(description="The same, made now from the same bundle.")
    together: int = Field(description="In a batch of so many, as then; 1 where the others are not kept.")
    equal: bool = Field(description="Whether both have the same items and sources, scores to the last bit.")
    difference: float | None = Field(description="The largest of two scores; null where the items differ.")
    reasons: list[WhyItem] = Field(description="Of the first items that were answered.")


class WhyQuery(schema.SimilarQuery):
    """The query of GET /v1/why/{request_id}."""

    k: int = Field(10, ge=0, le=EXPLAINED, description="How many of its items are explained.")


async def explained(
    kept: Mapping[str, Any],
    batch: Sequence[Mapping[str, Any]],
    held: Callable[[str], Ingress | None],
    k: int,
) -> dict[str, Any]:
    """The body of a WhyResponse but for the id; batch: all that it was answered with, in order. Raises
    ApiError (410) where its bundle is gone."""
    ingress = held(kept["generation"])
    if ingress is None:
        words = f"generation {kept['generation']} is not loaded any more, so it cannot be answered again"
        raise ApiError(410, "generation_gone", words, "path.request_id")
    asks, place = [_asked(line) for line in batch], kept["batch"][1] if len(batch) > 1 else 0
    names = [one["item"] for one in kept["items"]]
    again, reasons = await ingress.explain(asks, place, names[:k])
    there = [one["item"] for one in again.items], [one["source"] for one in again.items]
    same = there == (names, [one["source"] for one in kept["items"]])
    scores = zip(kept["items"], again.items)
    return {
        **{name: kept[name] for name in ("time", "generation", "asked", "events")},
        "answered": {"items": kept["items"], "degraded": kept["degraded"]},
        "again": {"items": again.items, "degraded": again.degraded},
        "together": len(batch),
        "equal": same and kept["items"] == again.items,
        "difference": max((abs(a["score"] - b["score"]) for a, b in scores), default=0.0) if same else None,
        "reasons": [_told(one) for one in reasons],
    }


def _asked(line: Mapping[str, Any]) -> RecommendRequest:
    ask = RecommendRequest.model_validate(line["asked"])
    ask.remember([Kept(item, float(at), float(weight)) for item, at, weight in line["events"]])
    return ask


def _told(one: Why) -> dict[str, Any]:
    strongest = sorted(one.reasons, key=lambda reason: -abs(reason.weight))[:MOST]
    told = {name: getattr(one, name) for name in ("item", "score", "base", "additive")}
    return {**told, "reasons": [asdict(reason) for reason in strongest]}


def route(
    log: AnswerLog | None,
    held: Callable[[str], Ingress | None],
    told: Callable[[dict[str, Any]], Response],
) -> Route:
    """GET /v1/why/{request_id}. held: a generation that can answer here; told: a JSON answer."""

    async def asked(request: Request) -> Response:
        k = schema.parse_query(request.query_params, WhyQuery).k
        request_id = request.path_params["request_id"]
        if log is None:
            raise ApiError(404, "no_answers", "this server keeps no answers; set `answers` in its file")
        kept: list[dict[str, Any]] = []
        if schema.REQUEST_ID.fullmatch(request_id):
            kept = await log.found(request_id)
        if not kept:
            raise ApiError(
                404, "unknown_answer", "no answer of that id is kept on this machine", "path.request_id"
            )
        return told({"request_id": request_id, **await explained(kept[0], kept[1:], held, k)})

    return Route(PATH, asked, methods=["GET"])


def document(described: dict[str, Any]) -> None:
    """Add the route and its models to an OpenAPI document."""
    schemas = described["components"]["schemas"]
    made = WhyResponse.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    schemas.update(made.pop("$defs", {}))
    schemas["WhyResponse"] = made
    responses = {"200": {"description": "OK", "content": _content("WhyResponse")}}
    for status, meaning in _MEANING.items():
        responses[str(status)] = {"description": meaning, "content": _content("ErrorResponse")}
    k = WhyQuery.model_json_schema()["properties"]["k"]
    described["paths"][PATH] = {
        "get": {
            "operationId": "why",
            "summary": "An answer that is kept, made once more, and why its items are in it",
            "security": [{"bearer": []}],
            "parameters": [
                {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}},
                {"name": "k", "in": "query", "required": False, "schema": k},
            ],
            "responses": responses,
        }
    }


_MEANING = {
    401: "the token is missing or wrong",
    404: "no answer of that id is kept, or a server that keeps none",
    410: "the bundle it was answered from is not loaded any more",
    422: "a field of the query is unknown or has a value that cannot be",
    503: "a stage does not answer now; try again",
}


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}

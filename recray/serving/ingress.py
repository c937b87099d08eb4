"""Ids outside, rows inside: what stands behind the HTTP door, and where its models are.

Concurrent requests are gathered into one batch, which goes through retrieval and ranking as a whole:
`Fused` runs both on threads of this process, `Split` asks two other processes, one call each. The
answers are the same, since both run the functions of `stages`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from recray.bundles.bundle import Bundle, Front, Request
from recray.errors import InputError
from recray.manifest import Artefact
from recray.recommender import Source
from recray.serving import stages
from recray.serving.batching import Batcher, Sender
from recray.serving.http import Reply
from recray.serving.schema import ApiError, RecommendRequest
from recray.serving.settings import Batch

READY_S = 2.0  # what a stage may take to say that it is there
NOBODY = np.empty(0, np.int32)
Made = TypeVar("Made")


class Line(NamedTuple):
    """The answer to one request: its items as they are sent, and what its batch took."""

    items: list[dict[str, Any]]
    timing_ms: dict[str, float]


class Layout(Protocol):
    """Where the models are."""

    async def answer(self, request: Request) -> Line: ...

    def similar(self, row: int, k: int, /) -> Awaitable[stages.Found | None]: ...

    async def generations(self) -> Sequence[str]:
        """What each other process holds."""
        ...


Retrieve = Callable[[stages.RetrieveBatch], Awaitable[stages.Found | None]]
Rank = Callable[[stages.RankBatch], Awaitable[stages.Found | None]]


class Fused:
    """The models in this process, on `threads` threads that take a batch each."""

    def __init__(self, bundle: Bundle, batch: Batch, threads: int = 1) -> None:
        def answers(requests: Sequence[Request]) -> Sequence[Line]:
            return answered(bundle, requests)

        def similars(asks: Sequence[tuple[int, int]]) -> Sequence[stages.Found]:
            return [stages.similar(bundle, row, k) for row, k in asks]

        self.answer = Batcher(answers, max_size=batch.size, threads=threads)
        self._similar = Batcher(similars, max_size=1, threads=1)

    async def similar(self, row: int, k: int) -> stages.Found | None:
        return await self._similar((row, k))

    async def generations(self) -> Sequence[str]:
        return ()


class Split:
    """The models in other processes, which answer None when they hold another generation."""

    def __init__(
        self,
        front: Front,
        batch: Batch,
        *,
        retrieve: Retrieve,
        rank: Rank | None,
        similar: Callable[[int, int], Awaitable[stages.Found | None]],
        generations: Sequence[Callable[[], Awaitable[str]]] = (),
    ) -> None:
        async def answered(requests: Sequence[Request]) -> Sequence[Line | ApiError]:
            try:
                return await _through(front, requests, retrieve, rank)
            except ApiError as error:  # nobody of the batch is at fault
                return [error] * len(requests)

        self.answer: Sender[Request, Line] = Sender(
            answered, max_size=batch.size, in_flight=batch.in_flight, wait_s=batch.wait_ms / 1e3
        )
        self.similar, self._generations = similar, generations

    async def generations(self) -> Sequence[str]:
        return await asyncio.gather(*(ask() for ask in self._generations))


class Ingress:
    """Checks what is asked, has it answered, names what comes back."""

    def __init__(self, front: Front, layout: Layout) -> None:
        self.front, self._layout = front, layout
        front.items.rows_of([""])  # ids are looked up in a table that the first look-up makes
        front.users.rows_of([""])

    async def recommend(self, ask: RecommendRequest) -> Reply:
        start = time.perf_counter()
        asked = self._checked(ask)
        line = await self._layout.answer(asked)
        timing = {**line.timing_ms, "total": _ms(start)}
        return Reply(line.items, self.front.generation, list(asked.degraded), timing)

    async def similar(self, item: str, k: int) -> Reply:
        start = time.perf_counter()
        row = int(self.front.items.rows_of([item])[0])
        if row < 0:
            raise ApiError(404, "unknown_item", "no such item", "path.id")
        k = min(k, len(self.front.items))
        found = _same(await self._layout.similar(row, k))
        asked = Request(NOBODY, NOBODY, k, (), {})
        line = _lines(self.front, [asked], [(found.rows[0], found.scores[0], "retriever")], {})[0]
        return Reply(line.items, self.front.generation, [], {"total": _ms(start)})

    async def ready(self) -> str:
        try:
            answers = await asyncio.wait_for(self._layout.generations(), READY_S)
        except asyncio.TimeoutError:
            raise ApiError(503, "unavailable", "a stage does not answer now") from None
        for generation in answers:
            _same(generation if generation == self.front.generation else None)
        return self.front.generation

    def _checked(self, ask: RecommendRequest) -> Request:
        features = self.front.item_features
        columns = [] if features is None else features.column_names
        for part, given, known in (
            ("filter", ask.filter, columns),
            ("caps", ask.caps, columns),
            ("context", ask.context, list(self.front.context_values)),
        ):
            for column in given or {}:
                if column not in known:
                    words = f"no {part} column of that name; there are: {', '.join(known) or 'none'}"
                    raise ApiError(422, "unknown_column", words, f"body.{part}.{column[:100]}")
        try:
            return self.front.request(
                ask.user, ask.history, ask.k, ask.exclude, ask.plain_filter(), ask.context,
                events=ask.recent, pin=ask.plain_pins(), caps=ask.caps, diversity=ask.diversity,
            )  # fmt: skip
        except InputError as error:
            raise ApiError(422, "invalid_value", str(error), error.where or "body") from None


def answered(bundle: Bundle, requests: Sequence[Request]) -> list[Line]:
    """A batch along the whole path, on this thread."""

    async def retrieve(asked: stages.RetrieveBatch) -> stages.Found:
        return stages.retrieve(bundle, asked)

    async def rank(asked: stages.RankBatch) -> stages.Found:
        return stages.rank(bundle, asked)

    ranks = bundle.recommender.ranker is not None
    return _at_once(_through(bundle, requests, retrieve, rank if ranks else None))


async def _through(
    front: Front, requests: Sequence[Request], retrieve: Retrieve, rank: Rank | None
) -> list[Line]:
    """A batch along the whole path. Raises ApiError (503) where a stage refuses it."""
    start = time.perf_counter()
    asked = stages.to_retrieve(requests, front.plan.candidates if rank is not None else 0)
    found = _same(await retrieve(asked))
    timing = {"retrieve": _ms(start)}
    best: list[tuple[Any, Any, Source]] = [
        (rows, scores, "retriever" if len(request.history) else "popular")
        for request, rows, scores in zip(requests, found.rows, found.scores, strict=True)
    ]
    if rank is not None and any(len(request.history) for request in requests):
        then = time.perf_counter()
        places, to_rank = stages.to_rank(requests, asked, found)
        ranked = _same(await rank(to_rank))
        for place, rows, scores in zip(places, ranked.rows, ranked.scores, strict=True):
            best[place] = (rows, scores, "ranker")
        timing["rank"] = _ms(then)
    return _lines(front, requests, best, timing)


def _lines(
    front: Front,
    requests: Sequence[Request],
    best: Sequence[tuple[Any, Any, Source]],
    timing_ms: dict[str, float],
) -> list[Line]:
    """What `Bundle.recommend` answers for the same (rows, scores, source): a request's best k, as ids."""
    kept, scores = [], []
    for request, (rows, line, _) in zip(requests, best, strict=True):
        real = rows[: request.k] >= 0
        kept.append(rows[: request.k][real])
        scores.append(line[: request.k][real].tolist())
    names, start, made = front.items.ids_of(np.concatenate(kept)), 0, []
    for request, rows, line, (_, _, source) in zip(requests, kept, scores, best):
        part = zip(names[start : start + len(line)], line)
        items = [{"item": i, "score": s, "source": source} for i, s in part]
        if request.rules is not None:
            for place in np.flatnonzero(np.isin(rows, list(request.pinned))):
                items[place]["source"] = "pin"
        made.append(Line(items, timing_ms))
        start += len(line)
    return made


def _at_once(work: Coroutine[Any, Any, Made]) -> Made:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        made: Made = done.value
        return made
    raise RuntimeError("it waits for something")


def has_ranker(artefact: Artefact) -> bool:
    """Whether a bundle holds a ranker, by its manifest alone."""
    return any(name.startswith("ranker/") for name in artefact.manifest.files)


def _same(answer: Any) -> Any:
    if answer is None:
        raise ApiError(503, "generation_changing", "a stage holds another bundle; ask again")
    return answer


def _ms(start: float) -> float:
    return round((time.perf_counter() - start) * 1e3, 3)

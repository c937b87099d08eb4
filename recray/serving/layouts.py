"""Where the models are, and a batch of requests on its way through them.

Concurrent requests are gathered into one batch, which goes through retrieval and ranking as a whole:
`Fused` runs both on threads of this process, `Split` asks two other processes, one call each. The
answers are the same, since both run the functions of `stages`. A request whose time is short is answered
by less, see `deadline`, and does not wait for those who have more.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from recray.bundles.bundle import Bundle, Front, Request
from recray.recommender import Source
from recray.serving import aside, stages
from recray.serving.batching import Batcher, Sender
from recray.serving.deadline import LIGHT, TIME, Level, Paces, TooLate, told
from recray.serving.schema import ApiError
from recray.serving.settings import Batch

Made = TypeVar("Made")


class Line(NamedTuple):
    """The answer to one request: its items as they are sent, what its batch took, and why it is less."""

    items: list[dict[str, Any]]
    timing_ms: dict[str, float]
    degraded: str = ""
    began: float = 0.0  # its batch, by time.monotonic
    place: int = 0  # in its batch
    of: int = 0  # so many that were all answered in full; 0 where some were not


@dataclass(slots=True, eq=False)
class Timed:
    """A request in a batch: when its time is over, by time.monotonic, and who waits for it."""

    request: Request
    due: float = math.inf
    future: asyncio.Future[Line] | None = None

    def give(self, line: Line) -> None:
        """Answer before the batch is done, from any thread."""
        if self.future is not None:
            self.future.get_loop().call_soon_threadsafe(_give, self.future, line)


class Layout(Protocol):
    """Where the models are."""

    paces: Paces

    @property
    def batches(self) -> Batcher[Timed, Line] | Sender[Timed, Line]: ...

    async def answer(self, request: Request, due: float = math.inf) -> Line:
        """Raises TooLate at `due`, and for what has no time to be retrieved."""
        ...

    async def together(self, requests: Sequence[Request]) -> Sequence[Line | TooLate]:
        """One batch of its own, whatever time it takes: what the same batch was answered, to the last bit."""
        ...

    def similar(self, row: int, k: int, /) -> Awaitable[stages.Found | None]: ...

    def aside(self, work: str, /, *asked: Any) -> Awaitable[Any]:
        """What `aside.WORK` makes of it where the models are; None where the generation is not held."""
        ...

    async def generations(self) -> Sequence[str]:
        """What each other process holds."""
        ...


Retrieve = Callable[[stages.RetrieveBatch], Awaitable[stages.Found | None]]
Rank = Callable[[stages.RankBatch], Awaitable[stages.Found | None]]


class Fused:
    """The models in this process, on `threads` threads that take a batch each."""

    def __init__(self, bundle: Bundle, batch: Batch, threads: int = 1) -> None:
        paces = self.paces = Paces()  # by its own name below: nothing must hold itself, see `process.freeze`

        def answers(asks: Sequence[Timed]) -> Sequence[Line | TooLate]:
            return _answered(bundle, asks, paces)

        def similars(asks: Sequence[tuple[int, int]]) -> Sequence[stages.Found]:
            return [stages.similar(bundle, row, k) for row, k in asks]

        self.batches: Batcher[Timed, Line] = Batcher(answers, max_size=batch.size, threads=threads)
        self._similar = Batcher(similars, max_size=1, threads=1)
        self._aside: Batcher[tuple[str, tuple[Any, ...]], Any] = Batcher(
            lambda asks: [aside.WORK[work](bundle, *asked) for work, asked in asks], max_size=1
        )
        self._together: Batcher[Sequence[Request], Sequence[Line]] = Batcher(
            lambda asks: [answered(bundle, requests) for requests in asks], max_size=1
        )

    async def answer(self, request: Request, due: float = math.inf) -> Line:
        return await _timed(self.batches, request, due)

    async def similar(self, row: int, k: int) -> stages.Found | None:
        return await self._similar((row, k))

    async def aside(self, work: str, *asked: Any) -> Any:
        return await self._aside((work, asked))

    async def together(self, requests: Sequence[Request]) -> Sequence[Line | TooLate]:
        return await self._together(requests)

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
        aside: Callable[..., Awaitable[Any]] | None = None,
        generations: Sequence[Callable[[], Awaitable[str]]] = (),
    ) -> None:
        paces = self.paces = Paces()  # by its own name below: nothing must hold itself, see `process.freeze`

        async def together(requests: Sequence[Request]) -> Sequence[Line | TooLate]:
            return await _through(front, [Timed(request) for request in requests], retrieve, rank, Paces())

        async def answered(asks: Sequence[Timed]) -> Sequence[Line | BaseException]:
            try:
                return await _through(front, asks, retrieve, rank, paces)
            except ApiError as error:  # nobody of the batch is at fault
                return [error] * len(asks)

        self.batches: Sender[Timed, Line] = Sender(
            answered, max_size=batch.size, in_flight=batch.in_flight, wait_s=batch.wait_ms / 1e3
        )
        self.similar, self._aside, self._generations = similar, aside, generations
        self.together = together

    async def answer(self, request: Request, due: float = math.inf) -> Line:
        return await _timed(self.batches, request, due)

    async def aside(self, work: str, *asked: Any) -> Any:
        return None if self._aside is None else await self._aside(work, *asked)

    async def generations(self) -> Sequence[str]:
        return await asyncio.gather(*(ask() for ask in self._generations))


def answered(bundle: Bundle, requests: Sequence[Request]) -> list[Line]:
    """A batch along the whole path, on this thread, whatever it takes."""
    lines = _answered(bundle, [Timed(request) for request in requests], Paces())
    return [line for line in lines if isinstance(line, Line)]


def _answered(bundle: Bundle, asks: Sequence[Timed], paces: Paces) -> list[Line | TooLate]:
    async def retrieve(asked: stages.RetrieveBatch) -> stages.Found:
        return stages.retrieve(bundle, asked)

    async def rank(asked: stages.RankBatch) -> stages.Found:
        return stages.rank(bundle, asked)

    ranks = bundle.recommender.ranker is not None
    return _at_once(_through(bundle, asks, retrieve, rank if ranks else None, paces))


async def _through(
    front: Front, asks: Sequence[Timed], retrieve: Retrieve, rank: Rank | None, paces: Paces
) -> list[Line | TooLate]:
    """A batch along the path, without those who have no time for it. Raises ApiError (503) where a stage
    refuses it."""
    start = time.monotonic()
    here = paces.found([ask.due for ask in asks], start)
    if len(here) == len(asks):
        return await _walked(front, asks, retrieve, rank, paces, start)
    made: list[Line | TooLate] = [TooLate(TIME) for _ in asks]
    if here:
        some = await _walked(front, [asks[place] for place in here], retrieve, rank, paces, start)
        for place, line in zip(here, some):
            made[place] = line
    return made


async def _walked(
    front: Front,
    asks: Sequence[Timed],
    retrieve: Retrieve,
    rank: Rank | None,
    paces: Paces,
    start: float,
) -> list[Line | TooLate]:
    """Retrieve all, rank each as far as its time allows; who is done before the others need not wait."""
    requests = [ask.request for ask in asks]
    asked = stages.to_retrieve(requests, front.plan.candidates if rank is not None else 0)
    found = same(await retrieve(asked))
    paces.retrieve.add(len(asks), time.monotonic() - start)
    timing = {"retrieve": ms(start)}
    best: list[tuple[Any, Any, Source]] = [
        (rows, scores, "retriever" if len(request.history) else "popular")
        for request, rows, scores in zip(requests, found.rows, found.scores, strict=True)
    ]
    levels = {} if rank is None else _levels(asks, asked, paces)
    last = min(levels.values(), default=Level.FULL)
    for level in (Level.RETRIEVED, Level.LIGHT, Level.FULL):
        places = [place for place, one in levels.items() if one is level]
        if places and rank is not None and level is not Level.RETRIEVED:
            then = time.monotonic()
            part = LIGHT if level is Level.LIGHT else 1
            _, to_rank = stages.to_rank(requests, asked, found, places, part)
            ranked = same(await rank(to_rank))
            for place, rows, scores in zip(places, ranked.rows, ranked.scores, strict=True):
                best[place] = (rows, scores, "ranker")
            paces.rank.add(sum(to_rank.wants), time.monotonic() - then)
            timing = {**timing, "rank": ms(then)}
        if places and level is not last:
            some = lines_of(front, [requests[p] for p in places], [best[p] for p in places], timing, start, 0)
            for place, early in zip(places, some):
                asks[place].give(early._replace(degraded=told(level, TIME)))
    of = len(asks) if all(level is Level.FULL for level in levels.values()) else 0
    lines: list[Line | TooLate] = [*lines_of(front, requests, best, timing, start, of)]
    for place, level in levels.items():
        line = lines[place]
        if level in (Level.LIGHT, Level.RETRIEVED) and isinstance(line, Line):
            lines[place] = line._replace(degraded=told(level, TIME))
        elif level is not Level.FULL:
            lines[place] = TooLate(TIME)
    return lines


def _levels(asks: Sequence[Timed], asked: stages.RetrieveBatch, paces: Paces) -> dict[int, Level]:
    """Place -> how it is ranked, of those whom a ranker knows something of."""
    places = stages.ranks([ask.request for ask in asks])
    found = paces.levels(
        [asks[place].due for place in places],
        [asked.wants[place] for place in places],
        [asks[place].request.rules is None for place in places],
        time.monotonic(),
    )
    return dict(zip(places, found))


async def _timed(batches: Batcher[Timed, Line] | Sender[Timed, Line], request: Request, due: float) -> Line:
    future: asyncio.Future[Line] = asyncio.get_running_loop().create_future()
    return await batches(Timed(request, due, future), due, future)


def _give(future: asyncio.Future[Line], line: Line) -> None:
    if not future.done():
        future.set_result(line)


def lines_of(
    front: Front,
    requests: Sequence[Request],
    best: Sequence[tuple[Any, Any, Source]],
    timing_ms: dict[str, float],
    began: float = 0.0,
    of: int = 0,
) -> list[Line]:
    """What `Bundle.recommend` answers for the same (rows, scores, source): a request's best k, as ids."""
    made: list[Line] = []
    for request, (rows, scores, source) in zip(requests, best, strict=True):
        pairs = zip(rows[: request.k].tolist(), scores[: request.k].tolist())
        found, pinned = [(row, score) for row, score in pairs if row >= 0], request.pinned
        names = front.items.ids_of([row for row, _ in found])
        items = [
            {"item": name, "score": score, "source": "pin" if row in pinned else source}
            for name, (row, score) in zip(names, found)
        ]
        made.append(Line(items, timing_ms, "", began, len(made), of))
    return made


def _at_once(work: Coroutine[Any, Any, Made]) -> Made:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        made: Made = done.value
        return made
    raise RuntimeError("it waits for something")


def same(answer: Any) -> Any:
    """The answer of a stage. Raises ApiError (503) where it holds another generation."""
    if answer is None:
        raise ApiError(503, "generation_changing", "a stage holds another bundle; ask again")
    return answer


def ms(start: float, end: float | None = None) -> float:
    """Milliseconds from `start` to `end`, or to now, by time.monotonic."""
    return round(((time.monotonic() if end is None else end) - start) * 1e3, 3)

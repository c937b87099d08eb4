"""The three stages as plain asyncio classes: what each replica does, without Ray.

Between stages travel rows: a history, what is excluded, the filter's own words, and the candidates;
never a mask or a matrix over the catalogue. Every ask names its generation; a stage that holds
another bundle answers None, so that rows of one are never read as rows of the other.

Shapes: L history, X excluded, C candidates, k places of the answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from recray.bundles.bundle import Answer, Bundle, Front, Request
from recray.bundles.filters import Filter
from recray.data.sequences import Histories
from recray.errors import InputError
from recray.manifest import Artefact
from recray.models.base import Context
from recray.recommender import Candidates, Ranked, Source
from recray.serving.batching import Batcher
from recray.serving.http import Reply
from recray.serving.schema import ApiError, RecommendRequest
from recray.serving.settings import Stage

READY_S = 2.0  # what a stage may take to say that it is there
Ask = TypeVar("Ask")


class RetrieveAsk(NamedTuple):
    """history int32[L], exclude int32[X]; filter: what columns must hold; want: C."""

    generation: str
    history: NDArray[np.int32]
    exclude: NDArray[np.int32]
    filter: Filter
    want: int


class RankAsk(NamedTuple):
    """history int32[L]; candidates rows int32[C] (-1 for none), scores float32[C]; context: value rows."""

    generation: str
    history: NDArray[np.int32]
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]
    context: Mapping[str, int]
    k: int


class SimilarAsk(NamedTuple):
    """The k items nearest to one item's row."""

    generation: str
    row: int
    k: int


class Found(NamedTuple):
    """rows int32[C], scores float32[C], best first; -1 and -inf where fewer are left."""

    rows: NDArray[np.int32]
    scores: NDArray[np.float32]


class RetrieverStage:
    """History -> candidates."""

    def __init__(self, bundle: Bundle, stage: Stage) -> None:
        self._bundle = bundle
        self._retrieve = Batcher(self._retrieve_batch, max_size=stage.max_batch, threads=stage.threads)
        self._similar = Batcher(self._similar_batch, max_size=1, threads=1)

    async def retrieve(self, ask: RetrieveAsk) -> Found | None:
        return await self._retrieve(ask) if ask.generation == self._bundle.generation else None

    async def similar(self, ask: SimilarAsk) -> Found | None:
        return await self._similar(ask) if ask.generation == self._bundle.generation else None

    def _retrieve_batch(self, asks: Sequence[RetrieveAsk]) -> list[Found]:
        """Asks that want as many under the same filter go through the model together."""

        def answer(group: list[RetrieveAsk]) -> list[Found]:
            found = self._bundle.recommender.retrieve(
                Histories.of([ask.history for ask in group]),
                group[0].want,
                Histories.of([ask.exclude for ask in group]),
                self._bundle.filters.mask(group[0].filter),
            )
            return _lines(found.rows, found.scores)

        return _grouped(asks, lambda ask: (ask.want, repr(ask.filter)), answer)

    def _similar_batch(self, asks: Sequence[SimilarAsk]) -> list[Found]:
        allowed = self._bundle.filters.mask(self._bundle.wanted(None))
        ranked = [self._bundle.recommender.similar(ask.row, ask.k, allowed) for ask in asks]
        return [line for found in ranked for line in _lines(found.rows, found.scores)]


class RankerStage:
    """(history, candidates, context) -> the best k of the candidates."""

    def __init__(self, bundle: Bundle, stage: Stage) -> None:
        self._bundle = bundle
        self._rank = Batcher(self._rank_batch, max_size=stage.max_batch, threads=stage.threads)

    async def rank(self, ask: RankAsk) -> Found | None:
        return await self._rank(ask) if ask.generation == self._bundle.generation else None

    def _rank_batch(self, asks: Sequence[RankAsk]) -> list[Found]:
        """Asks with as many candidates go through the model together."""

        def answer(group: list[RankAsk]) -> list[Found]:
            histories = Histories.of([ask.history for ask in group])
            candidates = Candidates(
                np.stack([ask.rows for ask in group]).astype(np.int64),
                np.stack([ask.scores for ask in group]),
            )
            context: Context = {
                name: np.array([ask.context[name] for ask in group], np.int32) for name in group[0].context
            }
            scores = self._bundle.recommender.rank(histories, candidates, context)
            k = max(ask.k for ask in group)
            ranked = self._bundle.recommender.top(histories, candidates, scores, k)
            lines = _lines(ranked.rows, ranked.scores)
            return [Found(f.rows[: ask.k], f.scores[: ask.k]) for f, ask in zip(lines, group, strict=True)]

        return _grouped(asks, lambda ask: len(ask.rows), answer)


class Ingress:
    """Ids outside, rows inside: checks what is asked, calls the stages, names what they answer.

    retrieve, rank (None without a ranker) and similar call the stages wherever they are; each of
    `generations` asks one stage for the generation that it holds.
    """

    def __init__(
        self,
        front: Front,
        *,
        retrieve: Callable[[RetrieveAsk], Awaitable[Found | None]],
        similar: Callable[[SimilarAsk], Awaitable[Found | None]],
        rank: Callable[[RankAsk], Awaitable[Found | None]] | None,
        generations: Sequence[Callable[[], Awaitable[str]]] = (),
    ) -> None:
        self._front, self._generations = front, generations
        self._retrieve, self._similar, self._rank = retrieve, similar, rank
        front.items.rows_of([""])  # ids are looked up in a table that the first look-up makes
        front.users.rows_of([""])

    async def recommend(self, ask: RecommendRequest) -> Reply:
        start = time.perf_counter()
        asked = self._checked(ask)
        generation = self._front.generation
        known = len(asked.history) > 0
        ranked = known and self._rank is not None
        want = max(asked.k, self._front.plan.candidates) if self._rank is not None else asked.k
        found = _same(
            await self._retrieve(RetrieveAsk(generation, asked.history, asked.exclude, asked.filter, want))
        )
        timing = {"retrieve": _ms(start)}
        source: Source = "retriever" if known else "popular"
        if ranked:
            assert self._rank is not None
            then = time.perf_counter()
            rank_ask = RankAsk(generation, asked.history, found.rows, found.scores, asked.context, asked.k)
            found = _same(await self._rank(rank_ask))
            timing["rank"], source = _ms(then), "ranker"
        return _reply(self._named(asked, found, source), {**timing, "total": _ms(start)})

    async def similar(self, item: str, k: int) -> Reply:
        start = time.perf_counter()
        row = int(self._front.items.rows_of([item])[0])
        if row < 0:
            raise ApiError(404, "unknown_item", "no such item", "path.id")
        k = min(k, len(self._front.items))
        found = _same(await self._similar(SimilarAsk(self._front.generation, row, k)))
        nobody = np.empty(0, np.int32)
        asked = Request(nobody, nobody, k, (), {})
        return _reply(self._named(asked, found, "retriever"), {"total": _ms(start)})

    async def ready(self) -> str:
        try:
            answers = await asyncio.wait_for(asyncio.gather(*(ask() for ask in self._generations)), READY_S)
        except asyncio.TimeoutError:
            raise ApiError(503, "unavailable", "a stage does not answer now") from None
        for generation in answers:
            _same(generation if generation == self._front.generation else None)
        return self._front.generation

    def _checked(self, ask: RecommendRequest) -> Request:
        features = self._front.item_features
        columns = [] if features is None else features.column_names
        for part, given, known in (
            ("filter", ask.filter, columns),
            ("context", ask.context, list(self._front.context_values)),
        ):
            for column in given or {}:
                if column not in known:
                    words = f"no {part} column of that name; there are: {', '.join(known) or 'none'}"
                    raise ApiError(422, "unknown_column", words, f"body.{part}.{column[:100]}")
        try:
            return self._front.request(
                ask.user, ask.history, ask.k, ask.exclude, ask.plain_filter(), ask.context
            )
        except InputError as error:
            raise ApiError(422, "invalid_value", str(error), error.where or "body") from None

    def _named(self, asked: Request, found: Found, source: Source) -> Answer:
        """What `Bundle.recommend` answers to the same rows."""
        rows, scores = found.rows[None, : asked.k], found.scores[None, : asked.k]
        return self._front.answer(asked, Ranked(rows.astype(np.int64), scores, [source]))


def has_ranker(artefact: Artefact) -> bool:
    """Whether a bundle holds a ranker, by its manifest alone."""
    return any(name.startswith("ranker/") for name in artefact.manifest.files)


def _same(answer: Any) -> Any:
    if answer is None:
        raise ApiError(503, "generation_changing", "a stage holds another bundle; ask again")
    return answer


def _reply(answer: Answer, timing_ms: dict[str, float]) -> Reply:
    items = [{"item": i.item, "score": i.score, "source": i.source} for i in answer.items]
    return Reply(items, answer.generation, answer.degraded, timing_ms)


def _lines(rows_BC: NDArray[np.int64], scores_BC: NDArray[np.float32]) -> list[Found]:
    return [Found(rows, scores) for rows, scores in zip(rows_BC.astype(np.int32), scores_BC, strict=True)]


def _grouped(
    asks: Sequence[Ask], key: Callable[[Ask], Hashable], answer: Callable[[list[Ask]], list[Found]]
) -> list[Found]:
    """Answers in the order of the asks, made group by group of the same key."""
    groups: dict[Hashable, list[int]] = {}
    for at, ask in enumerate(asks):
        groups.setdefault(key(ask), []).append(at)
    made: dict[int, Found] = {}
    for places in groups.values():
        made.update(zip(places, answer([asks[at] for at in places]), strict=True))
    return [made[at] for at in range(len(asks))]


def _ms(start: float) -> float:
    return round((time.perf_counter() - start) * 1e3, 3)

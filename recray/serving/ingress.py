"""Ids outside, rows inside: what stands behind the HTTP door.

It checks what is asked, has it answered by a layout (see `layouts`), and names what comes back. What no
stage can answer in time, or at all, is answered by what is at hand here: an earlier answer, what is popular.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

import numpy as np

from recray.bundles.answer import Why
from recray.bundles.bundle import Front, Request
from recray.errors import InputError
from recray.serving import cache
from recray.serving.cache import Answers, Caching, Spot
from recray.serving.deadline import AWAY, DOUBT_ONE, OVERLOAD, TIME, Level, Needs, TooLate, decide, told
from recray.serving.http import Reply
from recray.serving.layouts import Fused as Fused
from recray.serving.layouts import Layout, Line, answered, lines_of, ms, same
from recray.serving.layouts import Split as Split
from recray.serving.popular import Popular
from recray.serving.schema import ApiError, RecommendRequest

__all__ = ["Fused", "Ingress", "Split", "answered"]

READY_S = 2.0  # what a stage may take to say that it is there
NOBODY = np.empty(0, np.int32)


class Ingress:
    """Checks what is asked, has it answered, names what comes back."""

    def __init__(self, front: Front, layout: Layout, caching: Caching | None = None) -> None:
        self.front, self.layout = front, layout
        self.answers = Answers(caching) if caching is not None and caching.answers else None
        self._popular = Popular(front)
        front.items.rows_of([""])  # ids are looked up in a table that the first look-up makes
        front.users.rows_of([""])

    async def recommend(self, ask: RecommendRequest) -> Reply:
        start, due = time.monotonic(), ask.due
        asked, spot = self._checked(ask), None
        if self.answers is not None:
            spot = _spot(ask, asked)
            items = self.answers.same(spot)
            if items is not None:
                return Reply(items, self.front.generation, list(asked.degraded), {"total": ms(start)})
        try:
            if due != math.inf:
                self._check_time(due - start)
            line = await self.layout.answer(asked, due)
        except TooLate as late:
            return self._at_hand(asked, spot, late.why, start)
        degraded = list(asked.degraded)
        if line.degraded:
            degraded.append(line.degraded)
        elif self.answers is not None and spot is not None:
            self.answers.keep(spot, line.items)
        timing = {"wait": ms(start, line.began), **line.timing_ms, "total": ms(start)}
        batch = (line.began, line.place, line.of)
        return Reply(line.items, self.front.generation, degraded, timing, batch)

    def at_hand(self, ask: RecommendRequest) -> Reply:
        """An answer where stages are away: an earlier one, or what is popular. Raises ApiError (422)."""
        start, asked = time.monotonic(), self._checked(ask)
        return self._at_hand(asked, _spot(ask, asked), AWAY, start)

    def _check_time(self, left_s: float) -> None:
        """Raises TooLate where a request would wait in vain."""
        if left_s == -math.inf:
            raise TooLate(OVERLOAD)
        batches, retrieve = self.layout.batches, self.layout.paces.retrieve
        wait_s, retrieve_s = batches.ahead_s(), retrieve.seconds(1)
        if decide(left_s, Needs(wait=wait_s, retrieve=retrieve_s)) is Level.FULL:
            return
        if retrieve_s <= left_s:
            batches.pace.doubt(batches.waiting + 1, DOUBT_ONE)
            raise TooLate(OVERLOAD)
        retrieve.doubt(1, DOUBT_ONE)
        raise TooLate(TIME)

    def _at_hand(self, asked: Request, spot: Spot | None, why: str, start: float) -> Reply:
        """An earlier answer without what was barred since, filled up with what is popular; or that alone."""
        rows, scores = self._popular.rows(asked)
        items = lines_of(self.front, [asked], [(rows, scores, "popular")], {})[0].items
        level, old = Level.POPULAR, None
        if self.answers is not None and spot is not None and asked.rules is None:
            old = self.answers.older(spot)
        if old:
            barred = np.isin(self.front.items.rows_of([one["item"] for one in old]), asked.exclude)
            old = [one for one, out in zip(old, barred) if not out]
        if old:
            names = {one["item"] for one in old}
            items = (old + [one for one in items if one["item"] not in names])[: asked.k]
            level = Level.CACHED
        degraded = [*asked.degraded, told(level, why)]
        return Reply(items, self.front.generation, degraded, {"total": ms(start)})

    async def similar(self, item: str, k: int) -> Reply:
        start = time.monotonic()
        row = int(self.front.items.rows_of([item])[0])
        if row < 0:
            raise ApiError(404, "unknown_item", "no such item", "path.id")
        k = min(k, len(self.front.items))
        found = same(await self.layout.similar(row, k))
        asked = Request(NOBODY, NOBODY, k, (), {})
        line = lines_of(self.front, [asked], [(found.rows[0], found.scores[0], "retriever")], {})[0]
        return Reply(line.items, self.front.generation, [], {"total": ms(start)})

    async def explain(
        self, asks: Sequence[RecommendRequest], place: int, names: Sequence[str]
    ) -> tuple[Reply, list[Why]]:
        """The answer to one of the asks, made together with the others by all stages, whatever time it takes;
        and why those items have their scores."""
        requests = [self._checked(ask) for ask in asks]
        line = (await self.layout.together(requests))[place]
        assert isinstance(line, Line)
        rows, asked = self.front.items.rows_of(list(names)).tolist(), requests[place]
        reasons: list[Why] = same(await self.layout.aside("why", asked, rows))
        return Reply(line.items, self.front.generation, list(asked.degraded)), reasons

    async def ready(self) -> str:
        try:
            answers = await asyncio.wait_for(self.layout.generations(), READY_S)
        except asyncio.TimeoutError:
            raise ApiError(503, "unavailable", "a stage does not answer now") from None
        for generation in answers:
            same(generation if generation == self.front.generation else None)
        return self.front.generation

    def _checked(self, ask: RecommendRequest) -> Request:
        if ask.filter or ask.caps or ask.context:
            self._check_columns(ask)
        try:
            return self.front.request(
                ask.user, ask.history, ask.k, ask.exclude, ask.plain_filter(), ask.context,
                events=ask.recent, pin=ask.plain_pins(), caps=ask.caps, diversity=ask.diversity,
            )  # fmt: skip
        except InputError as error:
            raise ApiError(422, "invalid_value", str(error), error.where or "body") from None

    def _check_columns(self, ask: RecommendRequest) -> None:
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


def _spot(ask: RecommendRequest, asked: Request) -> Spot:
    return cache.spot(ask.user if ask.history is None else None, asked)

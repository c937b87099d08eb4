"""Which generation answers a request: one alone, from the check of its ids to the last row of its items.

A stage that does not hold what a request is stamped with refuses it, and the whole request begins again
with another stamp. So no answer mixes generations, whoever was born, loaded or flipped in the meantime.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from recray.bundles.changes import Changes
from recray.serving import metrics
from recray.serving.canary import Tally
from recray.serving.generations import Pointer, State
from recray.serving.http import Reply
from recray.serving.ingress import Ingress
from recray.serving.metrics import Meter
from recray.serving.resident import Ack, Resident
from recray.serving.schema import ApiError, RecommendRequest

ROUNDS, PAUSE_S = 40, 0.05  # how often, and how far apart, a request that all refused is tried again
CHANGING = "generation_changing"
Held = TypeVar("Held")


class Follower(Generic[Held]):
    """A resident that follows a pointer on a thread of its own, so that the event loop goes on."""

    def __init__(self, resident: Resident[Held], pointer: Pointer) -> None:
        self.resident, self.pointer = resident, pointer
        self._loading = ThreadPoolExecutor(1, thread_name_prefix="recray-load")
        self._reading: asyncio.Task[None] | None = None

    async def follow(self) -> Ack:
        """Read the pointer and hold what it names; done when that is loaded."""
        state = await asyncio.to_thread(self.pointer.read)
        if state.version > self.resident.state.version:
            self.resident.state = state  # where it is held already, it answers at once
        return await asyncio.get_running_loop().run_in_executor(self._loading, self.resident.follow, state)

    def nudge(self) -> None:
        """Begin to follow, without waiting; nothing where that goes on already."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._quietly())

    async def _quietly(self) -> None:
        try:
            await self.follow()
        except Exception:  # whoever keeps the pointer is away; what is held goes on answering
            return


class Router:
    """An Answerer over the generations that this ingress holds, sticky by user while one is on canary."""

    def __init__(
        self, resident: Resident[Ingress], nudge: Callable[[], None], meter: Meter | None = None
    ) -> None:
        self._resident, self._nudge, self._meter = resident, nudge, meter or Meter()
        self._counted_for = resident.state
        self._tallies: dict[str, Tally] = {}

    @property
    def state(self) -> State:
        """What the pointer said when it was last read."""
        return self._resident.state

    @property
    def tallies(self) -> dict[str, Tally]:
        """Counts by generation since the last step that changed who answers."""
        now, then = self.state, self._counted_for
        if (now.current, now.share) != (then.current, then.share):
            self._tallies = {}
        self._counted_for = now
        return self._tallies

    @property
    def held(self) -> Mapping[str, Ingress]:
        """The generations that can answer here."""
        return self._resident.held

    async def recommend(self, ask: RecommendRequest) -> Reply:
        key = ask.user if ask.user is not None else "\0".join(ask.history or ())
        try:
            return await self._answered(key, lambda one: one.recommend(ask), ask.due)
        except ApiError as error:
            held = next((one for one in map(self._resident.get, self.state.order(key)) if one), None)
            if error.status != 503 or held is None:
                raise
            return held.at_hand(ask)

    async def similar(self, item: str, k: int) -> Reply:
        return await self._answered(item, lambda one: one.similar(item, k))

    async def ready(self) -> str:
        held = self._resident.get(self.state.current.name)
        if held is None:
            self._nudge()
            raise ApiError(503, CHANGING, "the current generation is being loaded")
        return await held.ready()

    async def changed(self, name: str, asked: Mapping[str, Any]) -> Changes:
        """What the changes of a generation are after these. Raises ApiError: 422, 503."""
        held = self._resident.get(name)
        made = None if held is None else await held.layout.aside("changed", asked)
        if made is None:
            self._nudge()
            raise ApiError(503, CHANGING, "the current generation is being loaded; ask again")
        if isinstance(made, str):
            raise ApiError(422, "items_refused", made, "body")
        changes: Changes = made
        return changes

    def clicked(self, user: str, events: Sequence[tuple[str | None, str | None]]) -> None:
        """Count a user's events, as (id of the answer that showed the item, kind), and those answers: they
        have come from the first in the user's order."""
        kinds = [kind for answer, kind in events if answer is not None]
        if kinds:
            answers, name = len({answer for answer, _ in events} - {None}), self.state.order(user)[0]
            self._count(name).clicks += answers
            metrics.acted(self._meter, name, kinds, answers)

    async def _answered(
        self, key: str, ask: Callable[[Ingress], Awaitable[Reply]], due: float = math.inf
    ) -> Reply:
        """One generation's answer. A canary that fails is counted, and the request begins again without."""
        for _ in range(ROUNDS):
            state = self.state
            for name in state.order(key):
                held = self._resident.get(name)
                if held is None:
                    continue
                start = time.perf_counter()
                try:
                    reply = await ask(held)
                except ApiError as error:
                    if error.code == CHANGING:
                        self._count(name).refused += 1
                        continue
                    if error.status >= 500:
                        self._count(name).add(0.0, failed=True)
                    raise
                except Exception:
                    self._count(name).add(0.0, failed=True)
                    if state.next is None or name != state.next.name:
                        raise
                    continue
                self._count(name).add((time.perf_counter() - start) * 1e3)
                return reply
            self._nudge()
            if time.monotonic() + PAUSE_S > due:
                break
            await asyncio.sleep(PAUSE_S)
        raise ApiError(503, CHANGING, "no stage holds what the others hold; ask again")

    def _count(self, name: str) -> Tally:
        return self.tallies.setdefault(name, Tally())

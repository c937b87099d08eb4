"""Shipping: load a bundle beside the one that answers, in every replica, look at it, then flip the pointer.

    1  the folder's hashes are checked; a bundle that is running already is nothing to do
    2  the pointer names it as next, so a replica born from now on loads it before it serves
    3  every replica is asked to follow until all that run hold it, twice over; one that finds a fault with
       it ends the ship, and the pointer forgets it
    4  the pointer flips, or gives it a share of the users

Only ingress replicas heed the flip; until one does it stamps the generation before, which all still hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from recray.bundles.changes import Changes
from recray.errors import InputError
from recray.manifest import Artefact, open_artefact
from recray.serving.canary import Band, Tally, judge, merged
from recray.serving.generations import Generation, Pointer, State
from recray.serving.items import ItemsRequest, Shelf, carried, changes_of, to_bytes, with_items
from recray.serving.resident import Ack
from recray.serving.router import Router
from recray.serving.schema import ApiError
from recray.storage import place

log = logging.getLogger("recray.serving")
AGAIN_S = 0.1  # between two looks at all replicas
WAIT_S = 600.0  # what all of them may take to hold a bundle
SPREAD_S = 5.0  # what they may take to heed a flip before whoever asked for it is answered

Open = Callable[[str], Artefact]
Everyone = Callable[[], Awaitable[tuple[list[Ack], bool]]]
"""Let all replicas follow: what they say, and whether those are all that run."""


class Shipper:
    """The admin's side of an application, in whichever ingress replica is asked."""

    def __init__(
        self,
        router: Router,
        pointer: Pointer,
        everyone: Everyone,
        counts: Callable[[], Awaitable[Sequence[Mapping[str, Tally]]]],
        *,
        band: Band | None = None,
        opened: Open = lambda uri: open_artefact(place(uri), "bundle"),
        shelf: Shelf | None = None,
    ) -> None:
        self._router, self._pointer, self._everyone, self._counts = router, pointer, everyone, counts
        self._band, self._opened, self._shelf = band or Band(), opened, shelf

    async def ship(self, bundle: str, share: float | None = None) -> dict[str, Any]:
        """Ship a bundle to all users, or to a share of them (0 to 1). Raises ApiError: 422 for a bundle that
        is refused, 409 while another is on its way, 503 where replicas do not answer."""
        try:
            artefact = await asyncio.to_thread(self._opened, bundle)
        except InputError as error:
            raise _refused(str(error)) from None
        state = await self._read()
        one = Generation(artefact.hash[:12], artefact.place.uri)
        if one.name == state.current.bundle:
            return self._told(state, changed=False, why=f"generation {one.name} is running already")
        if state.current.changed:
            one = await self._kept(one, carried(Changes(), (await self._changes(state.current)).withdrawn))
        if state.next is None or state.next.name != one.name or not state.share:
            state = await self._loaded(await self._write(_step(state.load, one, time.time())), one)
        state = await self._write(state.flip() if share is None else state.split(share))
        await self._spread()
        return self._told(state, changed=True)

    async def items(self, asked: ItemsRequest) -> dict[str, Any]:
        """Add, withdraw and restore items of what answers now. Raises ApiError: 422 for what cannot be
        changed, 409 while another step is under way, 503 where replicas do not answer."""
        state = await self._read()
        one = await self._kept(state.current, await self._router.changed(state.current.name, asked.plain()))
        if one == state.current:
            return self._told(state, changed=False, why="that is so already")
        state = await self._loaded(await self._write(_step(state.load, one, time.time())), one)
        before = state.previous
        if before is not None and before.bundle != one.bundle:
            had = carried(await self._changes(before), asked.withdraw, asked.restore)
            before = await self._kept(before, had)
        state = await self._write(state.change(before))
        await self._spread()
        return self._told(state, changed=True)

    async def _kept(self, one: Generation, changes: Changes) -> Generation:
        """The generation of that bundle with these changes, which are kept for all replicas."""
        named = with_items(one, changes)
        if self._shelf is not None and named.changed:
            await asyncio.to_thread(self._shelf.put, named.name, to_bytes(changes))
        return named

    async def _changes(self, one: Generation) -> Changes:
        if self._shelf is None:
            return Changes()
        try:
            return await asyncio.to_thread(changes_of, self._shelf, one)
        except InputError as error:
            raise _busy(str(error)) from None

    async def rollback(self) -> dict[str, Any]:
        """Drop the next generation, or flip back to the one before, which all replicas still hold."""
        state = await self._read()
        back = _step(state.back)
        if state.next is None:
            acks, _ = await self._followed()  # who cannot be reached does not hinder it
            if any(back.current.name not in ack.holds for ack in acks):
                words = f"not every replica holds {back.current.name} any more"
                raise ApiError(409, "not_resident", words, back.current.uri)
        state = await self._write(back)
        await self._spread()
        return self._told(state, changed=True)

    async def generations(self) -> dict[str, Any]:
        """The present state, and what was counted since it changed who answers."""
        state, counts = await self._read(), merged(await self._counts())
        told = {name: one.as_dict() for name, one in counts.items()}
        return {**self._told(state, changed=False), "counts": told}

    def clicked(self, user: str, events: Sequence[tuple[str | None, str | None]]) -> None:
        """Count a user's events, and the answers that they name, for the generation that answers them."""
        self._router.clicked(user, events)

    async def watch(self) -> None:
        """Roll a canary back when its band says so; for whoever comes by now and then."""
        state = self._router.state
        if state.next is None or not state.share:
            return
        counts = merged(await self._counts())
        canary, other = (counts.get(one.name, Tally()) for one in (state.next, state.current))
        verdict = judge(canary, other, self._band)
        if verdict.fate != "roll back":
            return
        why = f"rolled back {state.next.name} by itself: {verdict.why}"
        if await asyncio.to_thread(self._pointer.write, state.drop(why)):
            log.warning(why)
            await self._spread()

    async def _loaded(self, state: State, one: Generation) -> State:
        """Wait until all replicas hold `one`; the pointer forgets it when they do not."""
        whole, deadline = 0, time.monotonic() + WAIT_S
        why, status = "not every replica held it in time", 503
        while time.monotonic() < deadline:
            acks, every = await self._followed()
            faults = [ack.problems[one.name] for ack in acks if one.name in ack.problems]
            if faults:
                why, status = faults[0], 422
                break
            held = every and acks and all(one.name in ack.holds for ack in acks)
            whole = whole + 1 if held else 0
            if whole == 2:
                return state
            if (await self._read()).version != state.version:
                raise _busy("it was rolled back while it was being loaded")
            await asyncio.sleep(0 if held else AGAIN_S)
        if await asyncio.to_thread(self._pointer.write, state.drop(f"refused {one.name}: {why}")):
            await self._spread()
        if status == 503:
            raise ApiError(503, "unavailable", why, one.uri)
        raise _refused(why)

    async def _spread(self) -> None:
        """Tell all replicas of a new state. Those who miss it, or are busy loading, find out on their own."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._followed(), SPREAD_S)

    async def _followed(self) -> tuple[list[Ack], bool]:
        try:
            return await self._everyone()
        except ApiError:
            return [], False

    async def _read(self) -> State:
        return await asyncio.to_thread(self._pointer.read)

    async def _write(self, state: State) -> State:
        if not await asyncio.to_thread(self._pointer.write, state):
            raise _busy("somebody else shipped or rolled back at the same time")
        return state

    def _told(self, state: State, *, changed: bool, why: str | None = None) -> dict[str, Any]:
        told = state.as_dict()
        named = {role: told[role] and told[role]["name"] for role in ("current", "previous", "next")}
        rest = {"share": state.share, "version": state.version, "changed": changed, "why": why or state.why}
        return {"generation": named.pop("current"), **named, **rest}


def _step(step: Callable[..., State], *asked: Any) -> State:
    try:
        return step(*asked)
    except InputError as error:
        raise ApiError(409, "cannot_now", str(error)) from None


def _busy(why: str) -> ApiError:
    return ApiError(409, "cannot_now", why)


def _refused(why: str) -> ApiError:
    return ApiError(422, "bundle_refused", why, "body.bundle")

"""A ship from its first look to the flip, a canary and a way back, on replicas in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from benchmarks._reliability_door import Board
from recray.errors import ArtefactError
from recray.serving import shipping
from recray.serving.canary import Band, Tally
from recray.serving.generations import Generation, State
from recray.serving.resident import Ack, Resident
from recray.serving.router import Router
from recray.serving.schema import ApiError
from recray.serving.shipping import Shipper
from tests.serving_pointer import Sometimes


class Folder:
    """Stands for an opened bundle."""

    def __init__(self, name: str) -> None:
        self.hash = f"{name}" + "0" * 64
        self.place = type("Place", (), {"uri": f"/bundles/{name}"})()


class World:
    """Three replicas in memory, one of which may find fault or not answer at all."""

    def __init__(self, faults: Mapping[str, str] | None = None, *, deaf: bool = False) -> None:
        names = "a" + "0" * 11

        def load(one: Generation, now: Any) -> Sometimes:
            return Sometimes(one.name)

        def picky(one: Generation, now: Any) -> Sometimes:
            if one.name[0] in (faults or {}):
                raise ArtefactError((faults or {})[one.name[0]], where=one.uri)
            return Sometimes(one.name)

        self.board = Board(State(current=Generation(names, "/bundles/a")))
        self.replicas: list[Resident[Any]] = [
            Resident(picky if n == 2 else load, self.board.read(), replica=str(n)) for n in range(3)
        ]
        self.router = Router(self.replicas[0], lambda: None)
        self.rounds, self.deaf = 0, deaf
        self.counts: list[Mapping[str, Tally]] = []
        self.shipper = Shipper(
            self.router, self.board, self.everyone, self.count, band=Band(), opened=self.opened
        )

    async def everyone(self) -> tuple[list[Ack], bool]:
        self.rounds += 1
        if self.deaf:
            raise ApiError(503, "unavailable", "not every replica answers now")
        return [one.follow(self.board.read()) for one in self.replicas], True

    async def count(self) -> list[Mapping[str, Tally]]:
        return self.counts

    def opened(self, bundle: str) -> Any:
        if bundle == "broken":
            raise ArtefactError("was altered: its bytes do not match the manifest", where=bundle)
        return Folder(bundle)

    def ship(self, bundle: str, share: float | None = None) -> dict[str, Any]:
        return asyncio.run(self.shipper.ship(bundle, share))


def name(letter: str) -> str:
    return letter + "0" * 11


def test_a_ship_and_back() -> None:
    world = World()
    told = world.ship("b")
    assert (told["generation"], told["previous"], told["changed"]) == (name("b"), name("a"), True)
    assert world.router.state.current.name == name("b")
    assert all(set(one.held) == {name("a"), name("b")} for one in world.replicas)
    assert world.rounds >= 3, "two looks before the flip and one after"
    same = world.ship("b")
    assert (same["changed"], same["version"]) == (False, told["version"])
    assert "running already" in same["why"]
    back = asyncio.run(world.shipper.rollback())
    assert (back["generation"], back["previous"]) == (name("a"), name("b"))
    told = world.ship("c")
    assert told["previous"] == name("a")
    assert all(name("b") not in one.held for one in world.replicas)


def refused(world: World, bundle: str, status: int, match: str, share: float | None = None) -> None:
    with pytest.raises(ApiError, match=match) as error:
        world.ship(bundle, share)
    assert error.value.status == status
    assert "\n" not in str(error.value)
    state = world.board.read()
    assert (state.current.name, state.next) == (name("a"), None)
    assert world.router.state.current.name == name("a")


def test_what_is_refused_leaves_the_running_one_alone() -> None:
    refused(World(), "broken", 422, "was altered")
    refused(World({"b": "names an item twice"}), "b", 422, "names an item twice")
    world = World({"b": "takes 90 ms"})
    refused(world, "b", 422, "takes 90 ms", share=0.05)
    assert "refused" in world.board.read().why
    assert world.ship("c")["generation"] == name("c"), "the next one may be sound"
    with pytest.raises(ApiError, match="nothing to roll back") as error:
        asyncio.run(World().shipper.rollback())
    assert error.value.status == 409


def test_replicas_that_do_not_answer_end_a_ship(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "WAIT_S", 0.05)
    monkeypatch.setattr(shipping, "AGAIN_S", 0.01)
    refused(World(deaf=True), "b", 503, "in time")


def test_two_who_ship_at_a_time() -> None:
    world = World()

    async def scene() -> list[Any]:
        return await asyncio.gather(world.shipper.ship("b"), world.shipper.ship("c"), return_exceptions=True)

    found = asyncio.run(scene())
    (won,) = [one for one in found if isinstance(one, dict)]
    (lost,) = [one for one in found if isinstance(one, ApiError)]
    assert lost.status == 409
    assert world.board.read().current.name == won["generation"]


def test_a_rollback_while_it_is_being_loaded_stops_the_ship() -> None:
    world = World()
    quick = world.everyone
    first = True

    async def meanwhile() -> tuple[list[Ack], bool]:
        nonlocal first
        if first:
            first = False
            world.board.write(world.board.read().back())
        return await quick()

    world.shipper._everyone = meanwhile
    with pytest.raises(ApiError, match="rolled back") as error:
        world.ship("b")
    assert error.value.status == 409
    assert world.board.read().current.name == name("a")


def test_a_canary_goes_on_to_all_or_back() -> None:
    world = World()
    told = world.ship("b", 0.05)
    assert (told["generation"], told["next"], told["share"]) == (name("a"), name("b"), 0.05)
    with pytest.raises(ApiError, match="on canary"):
        world.ship("c")
    assert world.ship("b", 0.2)["share"] == 0.2
    assert world.ship("b")["generation"] == name("b")
    world = World()
    world.ship("b", 0.05)
    back = asyncio.run(world.shipper.rollback())
    assert (back["generation"], back["next"]) == (name("a"), None)


def test_a_canary_out_of_its_band_is_rolled_back_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    asyncio.run(world.shipper.watch())
    world.ship("b", 0.05)
    good = Tally(requests=500, buckets={40: 500})
    world.counts = [{name("a"): good, name("b"): Tally(requests=30, buckets={40: 30})}]
    asyncio.run(world.shipper.watch())
    assert world.board.read().share == 0.05
    world.counts.append({name("b"): Tally(requests=30, errors=10, buckets={40: 20})})
    asyncio.run(world.shipper.watch())
    state = asyncio.run(world.shipper.generations())
    assert (state["generation"], state["next"], state["share"]) == (name("a"), None, 0.0)
    assert "10 of 60 requests failed" in state["why"]
    assert "by itself" in caplog.text
    assert state["counts"][name("b")]["errors"] == 10


def test_a_rollback_needs_everybody_to_hold_it() -> None:
    world = World()
    world.ship("b")
    world.replicas[1].held.pop(name("a"))
    world.replicas[1]._failed[name("a")] = "is gone"
    with pytest.raises(ApiError, match="not every replica") as error:
        asyncio.run(world.shipper.rollback())
    assert error.value.status == 409

"""Generations without Ray: the steps of the pointer, what a replica holds, ships, and who answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.errors import ArtefactError, InputError
from recray.serving import router as routing
from recray.serving import shipping
from recray.serving.canary import Band, Tally
from recray.serving.generations import LOAD_S, Generation, State, bucket
from recray.serving.http import Reply
from recray.serving.resident import Ack, Resident
from recray.serving.router import CHANGING, Follower, Router
from recray.serving.schema import ApiError, RecommendRequest
from recray.serving.shipping import Shipper

A, B, C = (Generation(name, f"/bundles/{name}") for name in "abc")


class Board:
    """A pointer in memory."""

    def __init__(self, first: State) -> None:
        self.kept = [first]

    def read(self) -> State:
        return self.kept[-1]

    def write(self, state: State) -> bool:
        if state.version != self.kept[-1].version + 1:
            return False
        self.kept.append(state)
        return True


def test_steps() -> None:
    state = State(current=A)
    loading = state.load(B, now=5.0)
    assert (loading.next, loading.share, loading.version) == (B, 0.0, 2)
    assert loading.order("u") == ["a"], "nobody is answered by what is being loaded"
    canary = loading.split(0.25)
    shipped = canary.flip()
    assert (shipped.current, shipped.previous, shipped.next, shipped.share) == (B, A, None, 0.0)
    back = shipped.back()
    assert (back.current, back.previous) == (A, B)
    assert back.back().current == B, "and forth"
    assert canary.back().next is None
    assert canary.back().current == A
    assert [one.name for one in shipped.load(C, 9.0).resident] == ["b", "c", "a"]
    assert [one.name for one in shipped.load(A, 9.0).resident] == ["b", "a"]
    for one in (state, loading, canary, shipped, back):
        assert State.from_dict(one.as_dict()) == one


def test_steps_that_cannot_be_taken() -> None:
    with pytest.raises(InputError, match="nothing to roll back"):
        State(current=A).back()
    loading = State(current=A).load(B, now=100.0)
    with pytest.raises(InputError, match="being loaded"):
        loading.load(C, now=101.0)
    assert loading.load(C, now=101.0 + LOAD_S).next == C, "whoever loaded it has died"
    with pytest.raises(InputError, match="on canary"):
        loading.split(0.1).load(C, now=1e9)


@given(st.text(), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_user_stays_where_she_is(user: str, share: float, other: float) -> None:
    state = State(current=A, previous=C, next=B, share=share)
    assert state.order(user) == state.order(user)
    assert sorted(state.order(user)) == ["a", "b", "c"], "all that are held, in some order"
    if share <= other and state.order(user)[0] == "b":
        assert State(current=A, next=B, share=other).order(user)[0] == "b", "a larger share holds the smaller"


def test_a_share_is_a_share_and_other_canaries_have_other_users() -> None:
    users = [f"user-{n}" for n in range(20_000)]
    first = [bucket("b", user) < 0.05 for user in users]
    again = [bucket("c", user) < 0.05 for user in users]
    assert sum(first) == pytest.approx(1000, abs=100)
    assert sum(a and b for a, b in zip(first, again)) == pytest.approx(50, abs=30)


def test_a_replica_holds_what_the_pointer_names_and_no_more() -> None:
    loads: list[tuple[str, str | None]] = []

    def load(one: Generation, now: str | None) -> str:
        loads.append((one.name, now))
        if one.name == "c":
            raise ArtefactError("was altered", where=one.uri)
        return f"model {one.name}"

    state = State(current=A)
    held = Resident(load, state, replica="r1")
    loading = state.load(B, 1.0)
    ack = held.follow(loading)
    assert ack == Ack(replica="r1", version=2, holds=("a", "b"), problems={})
    assert loads == [("a", None), ("b", "model a")], "the new one is looked at beside the one that runs"
    shipped = loading.flip()
    held.follow(shipped)
    assert held.follow(loading).version == shipped.version, "an older word changes nothing"
    broken = held.follow(shipped.load(C, 2.0))
    assert broken.holds == ("a", "b")
    assert "altered" in broken.problems["c"]
    held.follow(shipped.load(C, 2.0))
    assert [name for name, _ in loads].count("c") == 1, "what failed is not tried again and again"
    held.follow(shipped.load(C, 2.0).drop("refused").load(C, 3.0))
    assert [name for name, _ in loads].count("c") == 2, "another ship tries again"
    last = held.state.drop("refused").back()
    assert held.follow(last).holds == ("a", "b")
    assert held.get("c") is None
    with pytest.raises(ArtefactError):
        Resident(load, State(current=C))
    assert Resident(load, State(current=A, previous=C)).held == {"a": "model a"}, "born without a past"


class Stage:
    """A model replica, as in on_ray: it answers for what it holds, and looks at the pointer otherwise."""

    def __init__(self, board: Board, state: State | None = None) -> None:
        self.board = board
        self.resident: Resident[str] = Resident(lambda one, now: one.name, state or board.read())

    def ask(self, name: str) -> str | None:
        found = self.resident.get(name)
        if found is None:
            self.resident.follow(self.board.read())
        return found


class Door:
    """An ingress replica over stages that come and go."""

    def __init__(self, board: Board, stages: list[Stage], draw: random.Random, state: State) -> None:
        self.board = board

        class Held:
            """A generation as this ingress answers from it: two hops, to any of the stages."""

            def __init__(self, one: Generation) -> None:
                self.name = one.name

            async def recommend(self, ask: RecommendRequest) -> Reply:
                found = []
                for _ in range(2):
                    await asyncio.sleep(0)
                    answer = draw.choice(stages).ask(self.name)
                    if answer is None:
                        raise ApiError(503, CHANGING, "not held")
                    found.append({"item": answer})
                return Reply(found, self.name)

        self.resident: Resident[Any] = Resident(lambda one, now: Held(one), state)
        self.router = Router(self.resident, lambda: self.resident.follow(board.read()) and None)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask", "ask", "ask", "ship", "flip", "canary", "back", "follow", "birth", "death", "late"]
        ),
        st.integers(0, 1000),
    ),
    max_size=60,
)


@settings(max_examples=150)
@given(STEPS)
def test_no_interleaving_mixes_generations_or_loses_a_request(steps: list[tuple[str, int]]) -> None:
    """Births at any time (also of replicas that read the pointer long ago), deaths, ships, flips and
    rollbacks between any two hops: each answer is of its stamp alone, and each request has one."""
    routing.PAUSE_S, before = 0.0, routing.PAUSE_S
    try:
        asyncio.run(_scene(steps))
    finally:
        routing.PAUSE_S = before


async def _scene(steps: list[tuple[str, int]]) -> None:
    board, draw, names = Board(State(current=A)), random.Random(7), iter(range(1000))
    stages = [Stage(board), Stage(board)]
    doors = [Door(board, stages, draw, board.read()) for _ in range(2)]
    waiting: list[asyncio.Task[Reply]] = []
    for step, n in steps:
        state = board.read()
        everyone = [one.resident for one in (*stages, *doors)]
        if step == "ask":
            ask = doors[n % len(doors)].router.recommend(RecommendRequest(user=f"u{n}"))
            waiting.append(asyncio.create_task(ask))
        elif step == "ship" and state.next is None:
            board.write(state.load(Generation(f"g{next(names)}", ""), 0.0))
        elif step in ("flip", "canary") and state.next is not None:
            for one in everyone:
                one.follow(state)
            board.write(state.flip() if step == "flip" else state.split(0.5))
        elif step == "back" and (state.next or state.previous):
            board.write(state.back())
        elif step == "follow":
            everyone[n % len(everyone)].follow(state)
        elif step == "birth":
            stages.append(Stage(board))
        elif step == "late":  # it read the pointer a few versions ago, and serves only now
            old = board.kept[max(0, len(board.kept) - 1 - n % 3)]
            stages.append(Stage(board, old))
            doors.append(Door(board, stages, draw, old))
        elif step == "death" and len(stages) > 1:
            stages.pop(n % len(stages))
        await asyncio.sleep(0)
    for reply in await asyncio.gather(*waiting):
        assert {item["item"] for item in reply.items} == {reply.generation}


class Sometimes:
    """A generation that fails, is away, or answers."""

    def __init__(self, name: str, error: Exception | None = None) -> None:
        self.name, self.error = name, error

    async def recommend(self, ask: RecommendRequest) -> Reply:
        if self.error is not None:
            raise self.error
        return Reply([{"item": self.name}], self.name)

    def at_hand(self, ask: RecommendRequest) -> Reply:
        return Reply([], self.name, ["popular: unavailable"])

    async def similar(self, item: str, k: int) -> Reply:
        return await self.recommend(RecommendRequest())

    async def ready(self) -> str:
        return self.name


def routed(state: State, **errors: Exception) -> Router:
    held: Resident[Any] = Resident(lambda one, now: Sometimes(one.name, errors.get(one.name)), state)
    return Router(held, lambda: None)


def test_a_canary_that_fails_costs_its_users_nothing() -> None:
    state = State(current=A, next=B, share=0.5)
    router = routed(state, b=RuntimeError("boom"))
    users = [f"u{n}" for n in range(40)]
    chosen = [user for user in users if state.order(user)[0] == "b"]
    for user in users:
        reply = asyncio.run(router.recommend(RecommendRequest(user=user)))
        assert reply.generation == "a"
    assert router.tallies["b"].errors == len(chosen) > 5
    assert (router.tallies["a"].requests, router.tallies["a"].errors) == (40, 0)


def test_errors_of_the_current_one_and_of_requests_are_told() -> None:
    router = routed(State(current=A), a=RuntimeError("boom"))
    with pytest.raises(RuntimeError):
        asyncio.run(router.recommend(RecommendRequest(user="u")))
    assert router.tallies["a"].errors == 1
    router = routed(State(current=A, next=B, share=0.999), b=ApiError(422, "invalid_value", "no"))
    with pytest.raises(ApiError, match="no"):
        asyncio.run(router.recommend(RecommendRequest(user="u")))
    assert all(one.errors == 0 for one in router.tallies.values()), "the request was at fault"


def test_what_nobody_holds_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "PAUSE_S", 0.0)
    router = routed(State(current=A), a=ApiError(503, CHANGING, "not held"))
    with pytest.raises(ApiError) as error:
        asyncio.run(router.similar("i1", 3))
    assert (error.value.status, error.value.code) == (503, CHANGING)
    reply = asyncio.run(router.recommend(RecommendRequest(user="u")))
    assert reply.degraded == ["popular: unavailable"], "what is popular is at hand all the same"
    router._resident.held = {}
    with pytest.raises(ApiError, match="ask again"):
        asyncio.run(router.recommend(RecommendRequest(user="u")))


def test_counts_begin_again_when_others_answer() -> None:
    router = routed(State(current=A))
    asyncio.run(router.similar("i1", 3))
    assert router.tallies["a"].requests == 1
    loading = router.state.load(B, 0.0)
    router._resident.follow(loading)
    assert router.tallies["a"].requests == 1
    router._resident.follow(loading.split(0.1))
    assert router.tallies == {}
    for user in (users := [f"u{n}" for n in range(100)]):
        router.clicked(user, [("answer", "click"), ("answer", "buy"), (None, "view")])
    router.clicked("u1", [(None, "view")])
    chosen = sum(router.state.order(user)[0] == "b" for user in users)
    assert (router.tallies["a"].clicks, router.tallies["b"].clicks) == (100 - chosen, chosen)
    assert asyncio.run(router.ready()) == "a"


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


def test_a_follower_answers_from_what_it_holds_before_it_has_loaded_the_rest() -> None:
    board = Board(State(current=A, previous=B))
    held: Resident[str] = Resident(lambda one, now: one.name, board.read())
    follower = Follower(held, board)

    async def scene() -> None:
        board.write(board.read().back())
        follower.nudge()
        follower.nudge()
        assert (await follower.follow()).version == 2
        assert held.state.current == B

    asyncio.run(scene())

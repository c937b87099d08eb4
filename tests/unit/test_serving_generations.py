"""Generations without Ray: the steps of the pointer, what a replica holds, what no order of steps mixes."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks._reliability_door import Board
from recray.errors import ArtefactError, InputError
from recray.serving import router as routing
from recray.serving.generations import LOAD_S, Generation, State, bucket
from recray.serving.http import Reply
from recray.serving.resident import Ack, Resident
from recray.serving.router import CHANGING, Router
from recray.serving.schema import ApiError, RecommendRequest
from tests.serving_pointer import A, B, C


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


def test_what_could_not_be_read_once_is_read_when_it_is_to_answer() -> None:
    fails = ["b"]

    def load(one: Generation, now: str | None) -> str:
        if one.name in fails:
            raise ArtefactError("cannot be read now", where=one.uri)
        return f"model {one.name}"

    canary = State(current=A).load(B, 1.0).split(0.1)
    held = Resident(load, canary, replica="born late")
    assert held.follow(canary).holds == ("a",)
    fails.clear()
    assert held.follow(canary.flip()).holds == ("a", "b")

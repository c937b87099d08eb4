"""Who answers a request, without Ray: the canary, what fails, what nobody holds, a door that is behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks._reliability_door import Board
from recray.serving import router as routing
from recray.serving.generations import State
from recray.serving.resident import Resident
from recray.serving.router import CHANGING, Follower, Router
from recray.serving.schema import ApiError, RecommendRequest
from tests.serving_pointer import A, B, Sometimes


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

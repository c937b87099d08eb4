"""Kept answers: given again only where all is the same, older ones within bounds, and never too many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.bundles.bundle import Bundle
from recray.errors import ConfigError
from recray.serving.cache import ENTRY, ITEM, Answers, Caching, spot
from recray.serving.popular import Popular
from tests.serving_bundles import requests, small_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("caching"))


def items(*names: str) -> list[dict[str, Any]]:
    return [{"item": name, "score": 1.0, "source": "ranker"} for name in names]


def test_only_the_very_same_ask_is_given_the_answer_again(bundle: Bundle) -> None:
    names = bundle.items.ids_of(range(8))
    asks: list[dict[str, Any]] = [
        {"user": "u1"},
        {"user": "u2"},
        {"user": "u1", "k": 3},
        {"user": "u1", "exclude": names[:1]},
        {"user": "u1", "filter": {"category": "book"}},
        {"user": "u1", "filter": {"price": 3}},
        {"user": "u1", "filter": {"price": {"min": 3}}},
        {"user": "u1", "context": {"weather": "rain"}},
        {"user": "u1", "diversity": 0.5},
        {"user": "u1", "caps": {"category": 2}},
        {"history": names[:2]},
        {"history": names[1::-1]},
        {},
    ]
    for one in asks:
        kept = Answers(Caching(answers=10))
        kept.keep(spot(one.get("user"), bundle.request(**one)), items("a"))
        hit = [other for other in asks if kept.same(spot(other.get("user"), bundle.request(**other)))]
        assert hit == [one]
        assert (kept.hits, kept.misses) == (1, len(asks) - 1)


def test_an_older_answer_is_there_until_it_is_too_old() -> None:
    now = [0.0]
    kept = Answers(Caching(answers=10, stale_s=60), clock=lambda: now[0])
    first, later = (spot_of("u", state) for state in (b"1", b"2"))
    kept.keep(first, items("a"))
    assert kept.same(later) is None
    assert kept.older(later) == items("a")
    now[0] = 60.0
    assert kept.older(later) == items("a")
    now[0] = 60.1
    assert kept.older(later) is None
    kept.keep(later, items("b"))
    assert kept.same(first) is None, "an event drops what was before"
    assert len(kept) == 1


def spot_of(user: str, state: bytes) -> Any:
    from recray.serving.cache import Spot

    return Spot(user, state)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 30)), max_size=60))
def test_bounds_hold_and_the_newest_stay(steps: list[tuple[int, int, int]]) -> None:
    plan = Caching(answers=5, bytes=4 * (ENTRY + 10 * ITEM))
    kept = Answers(plan)
    for user, state, n in steps:
        at = spot_of(f"u{user}", bytes([state]))
        kept.keep(at, items(*map(str, range(n))))
        assert len(kept) <= plan.answers
        assert kept.bytes <= plan.bytes
        if ENTRY + 2 + n * ITEM <= plan.bytes:
            assert kept.same(at) is not None
    assert kept.bytes == sum(
        ENTRY + 2 * len(one.state) + ITEM * len(one.items) for one in kept._kept.values()
    )


def test_the_least_lately_used_make_room() -> None:
    kept = Answers(Caching(answers=2))
    one, two, three = (spot_of(name, b"") for name in ("1", "2", "3"))
    kept.keep(one, items("a"))
    kept.keep(two, items("b"))
    assert kept.same(one)
    kept.keep(three, items("c"))
    assert kept.same(two) is None
    assert kept.same(one)


def test_odd_bounds_are_refused() -> None:
    for wrong in ({"answers": -1}, {"bytes": -1}, {"stale_s": -1.0}, {"stale_s": float("nan")}):
        with pytest.raises(ConfigError):
            Caching(**wrong)


def test_what_is_popular_is_what_nobody_gets(bundle: Bundle, tmp_path: Path) -> None:
    """The same as the recommender's own answer to an empty history, to whatever is asked."""
    from dataclasses import replace

    popular = Popular(bundle)
    for ask in requests(bundle):
        if ask.get("diversity"):
            continue
        request = bundle.request(**ask)
        nobody = replace(request, history=request.history[:0])
        want = bundle.recommender.recommend(**bundle.arguments(nobody))
        rows, scores = popular.rows(request)
        best = want.rows[0][want.rows[0] >= 0][: request.k]
        assert rows.tolist() == best.tolist(), ask
        assert scores.tolist() == want.scores[0][: len(best)].tolist()


def test_a_withdrawn_item_is_not_popular(bundle: Bundle) -> None:
    from recray.bundles.changes import change

    first = Popular(bundle).rows(bundle.request(k=3))[0].tolist()
    gone = bundle.items.ids_of(np.array(first[:1]))
    changed = change(bundle, withdraw=gone, add=[{"item": "new", "like": bundle.items.ids_of([5])}])
    rows = Popular(changed).rows(changed.request(k=1000))[0].tolist()
    assert first[0] not in rows
    assert rows[:2] == first[1:]
    assert rows[-1] == len(changed.items) - 1, "nobody knows the new one yet"

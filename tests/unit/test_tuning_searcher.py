"""The constrained search: what it finds, what it never asks twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import pytest

from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point, Space

PLANTED = Space.parse(["codec=f32,f16,int8,int4", "graph=eager,onnx", "candidates=20..400", "blend=0..1.0"])
LIMITS = {"time": 3.2, "bytes": 2.0}


def planted(point: Mapping[str, object]) -> dict[str, float]:
    """A made-up model whose best plan under LIMITS is known: int8, onnx, as many candidates as the
    time allows, blend .6; without the limits f32, eager would win."""
    codec, candidates, blend = (
        str(point["codec"]),
        float(str(point["candidates"])),
        float(str(point["blend"])),
    )
    quality = {"f32": 1.0, "f16": 0.999, "int8": 0.99, "int4": 0.9}[codec]
    quality *= (1.0 if point["graph"] == "eager" else 0.995) * (1 - 0.5 * math.exp(-candidates / 60))
    quality *= 1 - 0.4 * (blend - 0.6) ** 2
    time = (3.0 if point["graph"] == "eager" else 1.0) + candidates / 100
    size = {"f32": 8.0, "f16": 4.0, "int8": 2.0, "int4": 1.0}[codec]
    return {"quality": quality, "time": time, "bytes": size}


BEST = planted({"codec": "int8", "graph": "onnx", "candidates": 220, "blend": 0.6})


def fits(metrics: Mapping[str, float]) -> bool:
    return all(metrics[name] <= limit for name, limit in LIMITS.items())


def best_of(searcher: ConstrainedSearcher, trials: int) -> float:
    best = 0.0
    for _ in range(trials):
        point = searcher.ask()
        assert point is not None
        found = planted(point)
        searcher.tell(point, found)
        best = max(best, found["quality"] if fits(found) else 0.0)
    return best


def searcher(sampler: Literal["gp", "tpe"], seed: int, **more: object) -> ConstrainedSearcher:
    return ConstrainedSearcher(PLANTED, {"quality": "max"}, limits=LIMITS, seed=seed, sampler=sampler, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_constrained_optimum_is_found_within_five_per_cent(seed: int) -> None:
    assert best_of(searcher("tpe", seed, startup=12), 60) > 0.95 * BEST["quality"]


def test_the_gaussian_process_needs_a_quarter_of_the_trials() -> None:
    assert best_of(searcher("gp", 0), 14) > 0.95 * BEST["quality"]


def test_several_goals_are_searched_too() -> None:
    both = ConstrainedSearcher(
        PLANTED, {"quality": "max", "bytes": "min"}, limits=LIMITS, sampler="tpe", startup=8
    )
    assert best_of(both, 40) > 0.9 * BEST["quality"]


def test_the_same_seed_asks_the_same_and_another_does_not() -> None:
    def asked(seed: int) -> list[Point | None]:
        one, points = searcher("tpe", seed, startup=3), []
        for _ in range(8):
            points.append(one.ask())
            assert points[-1] is not None
            one.tell(points[-1], planted(points[-1]))
        return points

    assert asked(5) == asked(5) != asked(6)


def test_first_points_come_first_and_may_lie_outside() -> None:
    outside: Point = {"codec": "f32", "graph": "eager", "candidates": 1000, "blend": 0.5}
    inside: Point = {"codec": "int8", "graph": "onnx", "candidates": 100, "blend": 0.5}
    one = searcher("tpe", 0, first=[outside, inside, outside])
    for point in (outside, inside):
        assert one.ask() == point
        one.tell(point, planted(point))
    assert one.ask() not in (outside, inside)


def test_every_point_of_a_small_space_once_and_then_none() -> None:
    space = Space.parse(["a=1..3", "b=x,y"])
    one = ConstrainedSearcher(space, {"q": "max"}, sampler="tpe", startup=2)
    asked = []
    while (point := one.ask()) is not None:
        asked.append(tuple(point.values()))
        one.tell(point, {"q": float(str(point["a"]))})
    assert sorted(asked) == sorted(tuple(p.values()) for p in space.points())


def test_what_was_told_before_is_not_asked_again() -> None:
    space = Space.parse(["a=1..3"])
    one = ConstrainedSearcher(space, {"q": "max"}, sampler="tpe")
    one.tell({"a": 2}, {"q": 1.0})
    one.tell({"a": 3}, None)
    assert one.ask() == {"a": 1}
    assert one.ask() is None


def test_two_names_of_one_thing_are_tried_once() -> None:
    space = Space.parse(["index=exact,hnsw", "links=1..4"])

    def canonical(point: Point) -> Point:
        return point if point["index"] == "hnsw" else {"index": "exact"}

    one = ConstrainedSearcher(space, {"q": "max"}, sampler="tpe", canonical=canonical)
    asked = []
    while (point := one.ask()) is not None:
        asked.append(point)
        one.tell(point, {"q": 1.0})
    assert len(asked) == 5


def test_points_that_cannot_fit_are_left_out_unmeasured() -> None:
    bytes_of = {"f32": 8.0, "f16": 4.0, "int8": 2.0, "int4": 1.0}
    one = searcher("tpe", 0, bound=lambda point: {"bytes": bytes_of[str(point["codec"])]})
    for _ in range(25):
        point = one.ask()
        assert point is not None
        assert point["codec"] in ("int8", "int4")
        one.tell(point, planted(point))
    assert one.rejected > 0


def test_a_space_where_nothing_can_fit_is_exhausted_at_once() -> None:
    one = ConstrainedSearcher(
        Space.parse(["a=1..50"]), {"q": "max"}, limits={"bytes": 1}, bound=lambda point: {"bytes": 2.0}
    )
    assert one.ask() is None
    assert one.rejected == 50


def test_every_second_turn_is_theirs_who_propose() -> None:
    wished: list[Point] = [
        {"codec": "f32", "graph": "eager", "candidates": 21, "blend": 0.5},  # cannot fit
        {"codec": "int8", "graph": "onnx", "candidates": 33, "blend": 0.5},
        {"codec": "int4", "graph": "onnx", "candidates": 44, "blend": 0.5},
    ]
    one = searcher(
        "tpe",
        0,
        propose=lambda: wished,
        bound=lambda point: {"bytes": 8.0 if point["codec"] == "f32" else 0.0},
    )
    asked = []
    for _ in range(6):
        asked.append(one.ask())
        assert asked[-1] is not None
        one.tell(asked[-1], planted(asked[-1]))
    assert [asked[0], asked[2]] == wished[1:]
    assert len({str(point) for point in asked}) == 6
    assert one.rejected >= 1


def test_a_limit_may_name_what_follows_from_the_metrics() -> None:
    one = ConstrainedSearcher(
        Space.parse(["x=1..40"]),
        {"q": "max"},
        limits={"cost": 20.0},
        derive=lambda metrics: {**metrics, "cost": 2 * metrics["q"]},
        sampler="tpe",
        startup=4,
    )
    asked = []
    for _ in range(34):
        point = one.ask()
        assert point is not None
        asked.append(float(str(point["x"])))
        one.tell(point, {"q": asked[-1]})
    assert max(x for x in asked if 2 * x <= 20) >= 9


def test_points_asked_together_differ() -> None:
    one = searcher("tpe", 0)
    points = [one.ask() for _ in range(6)]
    assert len({str(point) for point in points}) == 6
    for point in reversed(points):
        assert point is not None
        one.tell(point, planted(point))

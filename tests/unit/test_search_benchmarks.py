"""What the benchmarks of retrieval and search make of their measurements."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks._retrieval import Searcher, World, chosen, near, recall, row
from benchmarks._search_gowalla import Ran, _rows


def searcher(name: str, found: float, qps: float) -> Searcher:
    return Searcher(name, "", lambda k: np.empty((0, k), np.int64), recall=found, qps=qps)


FOUR = [searcher("a", 1.0, 10), searcher("b", 0.96, 90), searcher("c", 0.95, 50), searcher("d", 0.7, 999)]


def test_the_quickest_that_reaches_the_recall_is_chosen() -> None:
    assert chosen(FOUR, 0.95).name == "b"
    assert chosen(FOUR, 0.99).name == "a"
    assert chosen(FOUR[1:], 0.99).name == "b", "none reaches it: the one of the highest"


def test_settings_far_behind_are_not_tried_again() -> None:
    assert [s.name for s in near(FOUR, 0.95)] == ["b", "c"]
    assert [s.name for s in near(FOUR[1:], 0.99)] == ["b"]


def test_the_best_are_those_of_a_full_sort_and_recall_counts_them() -> None:
    draw = torch.Generator().manual_seed(0)
    world = World("", torch.randn(300, 8, generator=draw), torch.randn(5, 8, generator=draw))
    best = world.best(7)
    wanted = (world.queries @ world.items.T).argsort(dim=1, descending=True)[:, :7].numpy()
    assert np.array_equal(best, wanted)
    assert recall(best[:, ::-1], wanted) == 1.0
    assert recall(np.full_like(best, -1), wanted) == 0.0


def test_a_peer_that_misses_the_recall_has_no_ratio() -> None:
    world = World("w", torch.zeros(1, 2), torch.zeros(1, 2))
    missed = row(world, 10, FOUR[0], FOUR[3], at=0.95)
    assert missed.filled("retrieval", "")["ratio"] is None
    assert missed.given["peer_qps"] == 999
    assert row(world, 10, FOUR[1], FOUR[2], at=0.95).filled("retrieval", "")["ratio"] == pytest.approx(1.8)


def test_seconds_to_the_volume_and_no_ratio_where_nobody_comes() -> None:
    def ran(*trials: tuple[float, float]) -> Ran:
        costs = np.array([(-quality, 0.01, 1e6) for _, quality in trials]).reshape(-1, 3)
        return Ran([second for second, _ in trials], costs)

    found = {
        "ours": ran((1.0, 0.1), (5.0, 0.5)),
        "optuna": ran((20.0, 0.49)),
        "optuna-pieces": ran((10.0, 0.1)),
        "random": ran(),
    }
    corner = (0.0, 0.02, 12e6)
    rows = {r.peer: r.filled("search", "") for r in _rows(found, corner, 60.0, 0)}
    assert rows["optuna"]["ratio"] == pytest.approx(4.0)
    assert rows["random"]["ratio"] == pytest.approx(12.0)
    assert rows["random"]["given"]["peer reached"] is False
    assert all(r["value"] == 5.0 for r in rows.values())
    nothing = {name: ran() for name in found}
    assert all(r.filled("search", "")["ratio"] is None for r in _rows(nothing, corner, 60.0, 0))

"""The quality benchmark measures as the papers it stands beside did, with settings that exist."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest

from benchmarks import _gowalla, _ncf, _scientific, _sequences, _shelf
from benchmarks._lines import Line, report_rows
from benchmarks._ratings import drawn
from benchmarks.quality import WORKS
from recray.data.dataset import Cases
from recray.data.sequences import Histories
from recray.evaluation import Report, evaluate
from recray.recipes import recipe
from recray.training.run import resolve
from recray.tuned import TUNED


def test_recall_and_ndcg_are_those_of_lightgcn() -> None:
    """Its code: hits over all test items; the ideal list is full up to min(k, test items)."""
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(60)[:20] for _ in range(40)])
    wanted = [rng.choice(60, rng.integers(1, 31), replace=False).tolist() for _ in range(40)]
    recall, ndcg = [], []
    for shown, targets in zip(lists.tolist(), wanted):
        found = [item in targets for item in shown]
        recall.append(sum(found) / len(targets))
        ideal = sum(1 / math.log2(place + 2) for place in range(min(20, len(targets))))
        ndcg.append(sum(hit / math.log2(place + 2) for place, hit in enumerate(found)) / ideal)
    cases = Cases(np.arange(40, dtype=np.int32), Histories.of([[]] * 40), Histories.of(wanted), {})
    report = evaluate(lambda part, k: lists[part.user_rows, :k], cases, ks=(20,))
    assert report.means["recall@20"] == pytest.approx(np.mean(recall))
    assert report.means["ndcg@20"] == pytest.approx(np.mean(ndcg))
    assert set(_gowalla.METRICS) <= set(report.means)


LINES = (
    *_gowalla.LINES,
    *_ncf.LINES,
    *_scientific.LINES,
    *_sequences.BEAUTY,
    *_sequences.ML1M,
    *_shelf.LINES,
)


@pytest.mark.parametrize("name", sorted({*TUNED, *(line.recipe for line in LINES)}))
def test_every_recipe_of_the_table_exists_under_its_name(name: str) -> None:
    made = resolve(recipe(name, ["train.seed=3"]))
    assert (made.name, made.train.seed) == (name, 3)


@pytest.mark.parametrize("target", WORKS.values())
def test_every_work_has_its_rows(target: str) -> None:
    module, _, function = target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_a_row_tells_its_recipe_seeds_floor_and_peers() -> None:
    reports = [Report({"hr@10": np.array(v)}, np.arange(2, dtype=np.int32)) for v in ([0.0, 1.0], [1.0, 1.0])]
    line = Line(recipe="ials@ml1m_ncf", floor=(0.7,), peers={"a": (0.5,), "b": (0.6,)}, seeds=2)
    (row,) = report_rows("ml1m_ncf", line, reports, ("hr@10",), {"train_seconds": 1.0})
    assert (row.name, row.value, row.peer, row.peer_value) == ("ials", 0.75, "a", 0.5)
    assert row.seeds == (0, 1)
    told = {"recipe": "ials@ml1m_ncf", "each": [0.5, 1.0], "floor": 0.7, "peers": {"a": 0.5, "b": 0.6}}
    assert told.items() <= dict(row.given).items()


def test_ratings_are_drawn_a_fifth_of_each_user() -> None:
    log = np.array([[user, item, 3, 0] for user in (7, 2, 5) for item in range(10 * user)], float)
    known = drawn(log, 1)
    assert {user: known[log[:, 0] == user].mean() for user in (7, 2, 5)} == {7: 0.8, 2: 0.8, 5: 0.8}
    assert (known == drawn(log, 1)).all()
    assert (known != drawn(log, 2)).any()

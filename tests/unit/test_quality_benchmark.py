"""The quality benchmark measures as the papers it stands beside did, with settings that exist."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks._gowalla import FLOORS, METRICS, SETTINGS, SLOW
from benchmarks._scientific import CONTENT
from recray.data.dataset import Cases
from recray.data.sequences import Histories
from recray.evaluation import evaluate
from recray.recipes import recipe
from recray.training.run import resolve


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
    assert set(METRICS) <= set(report.means)


def test_every_setting_is_one_of_its_recipe() -> None:
    for name, changes in (*SETTINGS.items(), ("content", CONTENT)):
        resolve(recipe(name, changes))
    assert set(FLOORS) | SLOW <= set(SETTINGS)

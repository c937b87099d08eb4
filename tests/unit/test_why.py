"""Reasons: exact sums where a model is one, honest losses where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.data.sequences import Histories
from recray.models import build_model
from recray.models.base import Catalogue, Ranker, Retriever
from recray.models.why import Reasons, why, without_each
from recray.recommender import Recommender
from tests.models_data import ring

DATA = ring(60, 23)
HISTORY = Histories.of([[3, 4, 5, 4, 9, -1]])
SASREC = {"dim": 8, "blocks": 1, "heads": 1, "max_len": 6}
NEUMF = {"dim": 8, "hidden": (8, 4), "max_len": 6, "negatives": 4}


def model(name: str, **options: Any) -> Retriever | Ranker:
    made = build_model(name, Catalogue(23, {}), options, seed=0)
    if not made.gradient:
        made.fit(DATA)
    assert isinstance(made, (Retriever, Ranker))
    return made.eval()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_reasons_of_ials_sum_to_its_score(weighted: bool) -> None:
    ials = model("ials", dim=8, weighted=weighted)
    assert isinstance(ials, Retriever)
    scores = ials.score(HISTORY)[0]
    for row in (0, 5, 22):
        found = why(ials, HISTORY, row)
        assert found.additive
        assert found.kind == "history"
        assert sorted(found.rows) == [3, 4, 5, 9]
        assert found.base + found.weights.sum() == pytest.approx(float(scores[row]), abs=1e-5)
        assert found.score == pytest.approx(float(scores[row]), abs=1e-5)


@pytest.mark.parametrize(("name", "options"), [("sasrec", SASREC), ("neumf", NEUMF)])
def test_other_models_say_what_a_score_loses_without_an_item(name: str, options: dict[str, Any]) -> None:
    made = model(name, **options)
    found = why(made, HISTORY, 7)
    assert not found.additive
    assert list(found.weights) == sorted(found.weights, reverse=True)
    without_4 = Histories.of([[3, 5, 9]])
    rows = np.array([[7]])
    whole, less = (
        float(made.score(h, rows)[0, 0] if isinstance(made, Ranker) else made.score(h)[0, 7])
        for h in (HISTORY, without_4)
    )
    at = list(found.rows).index(4)  # it is there twice and goes as one
    assert found.weights[at] == pytest.approx(whole - less, abs=1e-5)
    assert found.score == pytest.approx(whole, abs=1e-5)


def test_popularity_has_one_reason_for_all() -> None:
    found = why(model("popularity"), HISTORY, 4)
    assert len(found.rows) == 0
    assert found.score == found.base > 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_without_each_leaves_out_all_of_one_item(items: list[int]) -> None:
    weights = np.arange(len(items), dtype=np.float32)
    history = Histories(np.array(items, np.int32), np.array([0, len(items)]), weights)
    rows = np.unique(items)
    made = without_each(history, rows)
    for b, row in enumerate(rows):
        assert made[b].tolist() == [item for item in items if item != row]
        assert made.weights is not None
        part = made.weights[made.offsets[b] : made.offsets[b + 1]].tolist()
        assert part == [w for w, item in zip(weights, items) if item != row]


def test_the_reasons_of_a_mix_are_the_parts_as_it_scales_them() -> None:
    ials, neumf = model("ials", dim=8), model("neumf", **NEUMF)
    assert isinstance(ials, Retriever)
    assert isinstance(neumf, Ranker)
    mixed = Recommender(ials, ranker=neumf, candidates=10, blend=0.6)
    found = mixed.retrieve(HISTORY, 10)
    final = mixed.rank(HISTORY, found)[0]
    for place in (0, 4):
        told = mixed.why(HISTORY, int(found.rows[0, place]))
        assert told.score == pytest.approx(float(final[place]), abs=1e-4)
        assert not told.additive
    only = Recommender(ials, ranker=neumf, candidates=10, blend=1.0).why(HISTORY, 7)
    assert only.additive


def test_nobody_is_told_popularity() -> None:
    counts = np.arange(23, dtype=np.float32)
    nobody = Recommender(model("ials", dim=8), popularity=counts)  # type: ignore[arg-type]
    told = nobody.why(Histories.of([[]]), 9)
    assert (told.score, told.base, len(told.rows)) == (9.0, 9.0, 0)


def test_the_first_reason_weighs_more_than_another_one() -> None:
    torch.manual_seed(0)
    sasrec, better, asked = model("sasrec", **SASREC), 0, 0
    draw = np.random.default_rng(0)
    for u in range(40):
        history = DATA.histories().take([u]).known()
        if len(np.unique(history.items)) < 3:
            continue
        row = int(sasrec.score(history)[0].argmax())  # type: ignore[call-arg]
        told = why(sasrec, history, row)
        asked += 1
        better += told.weights[0] > told.weights[draw.integers(1, len(told.weights))]
    assert asked > 10
    assert better >= 0.7 * asked


def test_equal_rows_are_one_reason() -> None:
    made = Reasons.of(1.0, 0.0, np.array([2, 1, 2]), np.array([0.25, 0.4, 0.35]))
    assert made.rows.tolist() == [2, 1]
    assert made.weights.tolist() == pytest.approx([0.6, 0.4])

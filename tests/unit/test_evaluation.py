"""Evaluation: ties, exclusion, chunks, given negatives, reports and their comparison."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from recray import evaluation
from recray.data.dataset import Cases, Dataset
from recray.data.prepare import prepare
from recray.data.sequences import Histories
from recray.errors import InputError
from recray.evaluation import (
    Beyond,
    Report,
    best,
    beyond_of,
    evaluate,
    evaluate_ratings,
    model_top_k,
    ranker_top_k,
    sampled_top_k,
    with_ratings,
)
from recray.models.base import Catalogue, Context, ModelConfig, Ranker, Retriever


class Fixed(Retriever):
    """Gives everybody the same scores."""

    name = "fixed"
    Config = ModelConfig

    def __init__(self, scores: list[float]) -> None:
        super().__init__(Catalogue(len(scores), {}), ModelConfig())
        self.scores = torch.tensor(scores)

    def score(self, histories: Histories) -> Tensor:
        return self.scores.expand(len(histories), -1)


class ByRow(Ranker):
    """Likes high rows, and says how many candidates it was shown at once."""

    name = "by-row"
    Config = ModelConfig

    def __init__(self, n_items: int) -> None:
        super().__init__(Catalogue(n_items, {}), ModelConfig())
        self.most = 0

    def inputs(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def score(
        self, histories: Histories, candidates: NDArray[np.int64], context: Context | None = None
    ) -> Tensor:
        self.most = max(self.most, candidates.size)
        return torch.from_numpy(np.where(candidates < 0, -np.inf, candidates).astype(np.float32))


def cases_of(histories: list[list[int]], targets: list[list[int]], **context: list[int]) -> Cases:
    return Cases(
        np.arange(len(histories), dtype=np.int32),
        Histories.of(histories),
        Histories.of(targets),
        {name: np.array(rows, dtype=np.int32) for name, rows in context.items()},
    )


def test_constant_scores_earn_no_luck() -> None:
    n = 50
    cases = cases_of([[]] * n, [[i] for i in range(n)])
    report = evaluate(model_top_k(Fixed([1.0] * n)), cases, ks=(10,))
    assert report.means["hr@10"] == pytest.approx(10 / n)  # exactly what chance gives
    assert report.means["ndcg@10"] == pytest.approx(sum(1 / math.log2(j + 1) for j in range(1, 11)) / n)


def test_history_is_left_out_and_ties_go_to_the_lower_row() -> None:
    top_k = model_top_k(Fixed([0.0, 2.0, 1.0, 2.0, 1.0]))
    got = top_k(cases_of([[], [1], [0, 1, 2, 3]], [[0]] * 3), 3)
    assert got.tolist() == [[1, 3, 2], [3, 2, 4], [4, -1, -1]]


def test_k_beyond_the_catalogue_is_filled_with_none() -> None:
    assert model_top_k(Fixed([1.0, 2.0]))(cases_of([[]], [[0]]), 4).tolist() == [[1, 0, -1, -1]]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(-2, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 8)
)
def test_best_equals_a_stable_sort(scores: list[list[int]], k: int) -> None:
    table = np.array(scores, dtype=np.float32)
    table[table == -2] = -np.inf
    table[table == 3] = np.nan
    for row, got in zip(table, best(table, k), strict=True):
        order = sorted((i for i in range(6) if np.isfinite(row[i])), key=lambda i: (-row[i], i))
        assert got.tolist() == (order + [-1] * 8)[:k]


def test_chunks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    cases = cases_of([rng.choice(30, 4).tolist() for _ in range(11)], [[int(i)] for i in rng.choice(30, 11)])
    model = Fixed(rng.normal(size=30).tolist())
    whole = model_top_k(model)(cases, 5)
    monkeypatch.setattr(evaluation, "CELLS", 70)
    assert (model_top_k(model)(cases, 5) == whole).all()
    one, other = (evaluate(model_top_k(model), cases, batch=b) for b in (3, 512))
    assert all((one.values[name] == other.values[name]).all() for name in one.values)


def test_given_negatives_rank_only_themselves_and_a_repeated_positive_is_one_candidate() -> None:
    model = Fixed([float(i) for i in range(10)])
    negatives = np.array([[9, 3, 5, 5], [7, 8, 9, 6]])
    cases = cases_of([[9], []], [[5], [5]])  # 9 is in the history: the protocol ranks it all the same
    top = sampled_top_k(model, negatives)
    assert top(cases, 4).tolist() == [[9, 5, 3, -1], [9, 8, 7, 6]]
    assert evaluate(top, cases, ks=(2,)).values["hr@2"].tolist() == [1.0, 0.0]
    assert evaluate(top, cases.take([1]), ks=(4,)).values["hr@4"].tolist() == [0.0]
    assert sampled_top_k(ByRow(10), negatives)(cases, 4).tolist() == [[9, 5, 3, -1], [9, 8, 7, 6]]


def test_a_ranker_orders_candidates_or_the_whole_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = cases_of([[5], [0]], [[1], [2]])
    proposed = model_top_k(Fixed([9.0, 8, 7, 6, 5, 4]))
    assert ranker_top_k(ByRow(6), proposed, count=3)(cases, 2).tolist() == [[2, 1], [3, 2]]
    ranker = ByRow(6)
    monkeypatch.setattr(evaluation, "PAIRS", 6)
    assert model_top_k(ranker)(cases, 2).tolist() == [[4, 3], [5, 4]]
    assert ranker.most == 6  # one user at a time


def test_users_without_target_are_skipped_and_counted() -> None:
    cases = cases_of([[], [], []], [[0], [], [1]])
    report = evaluate(model_top_k(Fixed([2.0, 1.0])), cases, ks=(1,))
    assert (report.skipped, report.user_rows.tolist()) == (1, [0, 2])
    assert report.values["hr@1"].tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="no user has a held-out item"):
        evaluate(model_top_k(Fixed([1.0])), cases_of([[]], [[]]))


def test_context_travels_with_its_user() -> None:
    seen: list[list[int]] = []

    def top_k(part: Cases, k: int) -> NDArray[np.int64]:
        seen.append(part.context["weather"].tolist())
        return np.zeros((len(part.user_rows), k), dtype=np.int64)

    evaluate(top_k, cases_of([[]] * 4, [[0], [], [0], [0]], weather=[3, 4, 5, 6]), batch=2)
    assert seen == [[3, 5], [6]]


def test_beyond_accuracy() -> None:
    rows = np.array([[0, 1], [0, 2]])
    catalogue = Beyond(np.array([0.0, 1.0, 3.0, 9.0]), np.array([0, 0, 1, 1]))
    report = evaluate(lambda part, k: rows, cases_of([[], []], [[0], [0]]), ks=(2, 1), catalogue=catalogue)
    assert report.whole == {"coverage@2": 0.75, "coverage@1": 0.25}
    assert report.values["novelty@2"].tolist() == [0.5, 1.5]
    assert report.values["diversity@2"].tolist() == [0.0, 1.0]


def test_targets_in_their_users_own_histories_are_told_to_a_person(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cases = cases_of([[1, 0, 1], [2], [0, 1], []], [[1], [1, 0], [2, 1], []])
    top_k, catalogue = model_top_k(Fixed([3.0, 2.0, 1.0])), Beyond(np.zeros(3))
    report = evaluate(top_k, cases, ks=(3,), batch=1, catalogue=catalogue)
    assert report.values["recall@3"].tolist() == [0.0, 1.0, 0.5]
    err = capsys.readouterr().err
    assert err.startswith("warning: 2 of 3 users have held-out items that are in their own histories")
    assert err.count("\n") == 1
    evaluate(top_k, cases.take([1]), ks=(3,), catalogue=catalogue)
    evaluate(top_k, cases, ks=(3,))  # as after each epoch of training
    assert capsys.readouterr().err == ""


def dataset(folder: Path, category: list[Any], **more: Any) -> Dataset:
    """Users a, b, c of the items i0, i1, .. in a ring, two each, and the items' categories."""
    names = [f"i{i}" for i in range(len(category))]
    log = [(user, names[(at + step) % len(names)]) for at, user in enumerate("abc") for step in (0, 1)]
    pd.DataFrame(log, columns=["user", "item"]).to_csv(folder / "log.csv", index=False)
    pd.DataFrame({"item": names, "category": category}).to_parquet(folder / "items.parquet")
    given = {"items": folder / "items.parquet", "split": "none", **more}
    return prepare(folder / "log.csv", out=folder / "data", **given)


def test_users_who_took_nothing_make_no_item_rarer(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_text("user,age\n" + "".join(f"new{i},{i}\n" for i in range(50)))
    data = dataset(tmp_path, ["x", "y", "x"], users=tmp_path / "users.csv")
    assert data.n_users == 53
    assert beyond_of(data).information == pytest.approx([math.log2(3 / 2)] * 3)


@pytest.mark.parametrize(
    ("category", "wanted"),
    [
        (["x", "y", None, "x"], [0, 1, -1, 0]),
        ([["x", "y"], ["z"], ["x"], ["z", "x"]], [0, 1, 0, 1]),
        ([[], ["z", "x"], None, ["x"]], [-1, 0, -1, 1]),
        ([{"a": 1}, {"a": 2}, {"a": 1}, None], None),
    ],
    ids=["words", "lists", "lists that are empty", "what is no category"],
)
def test_diversity_goes_by_a_category_or_the_first_of_several(
    category: list[Any], wanted: list[int] | None, tmp_path: Path
) -> None:
    data = dataset(tmp_path, category)
    categories = beyond_of(data).categories
    if wanted is None:
        assert categories is None
        return
    assert categories is not None
    assert categories[data.items.rows_of([f"i{i}" for i in range(4)])].tolist() == wanted


def test_against_pairs_users_and_refuses_others() -> None:
    cases = cases_of([[]] * 20, [[i % 2] for i in range(20)])
    good, bad = (evaluate(model_top_k(Fixed(s)), cases, ks=(1,)) for s in ([2.0, 1, 0], [0.0, 1, 2]))
    got = good.against(bad, "hr@1")
    assert (got.mean, got.n) == (0.5, 20)
    assert got.above_zero
    assert good.interval("hr@1").mean == 0.5
    with pytest.raises(InputError, match="no per-user values of 'hr@7'"):
        good.against(bad, "hr@7")
    fewer = evaluate(model_top_k(Fixed([1.0, 0, 0])), cases.take(slice(5)), ks=(1,))
    with pytest.raises(InputError, match="different users"):
        good.against(fewer, "hr@1")


def test_a_report_is_json_and_a_table() -> None:
    report = evaluate(model_top_k(Fixed([1.0, 2.0])), cases_of([[]] * 3, [[0], [1], [1]]), ks=(1, 2))
    plain = json.loads(json.dumps(report.as_dict()))
    assert plain["users"] == 3
    assert plain["means"]["hr@1"] == pytest.approx(2 / 3)
    low, high = plain["intervals"]["hr@1"]
    assert low < 2 / 3 < high
    lines = report.table().splitlines()
    assert lines[0].split() == ["@1", "@2"]
    assert next(line for line in lines if line.startswith("hr")).split() == ["hr", "0.6667", "1.0000"]
    assert lines[-1] == "3 users"
    beside = dataclasses.replace(report, differences={"hr@1": report.against(report, "hr@1")})
    assert beside.as_dict()["differences"]["hr@1"]["mean"] == 0
    assert beside.table().splitlines()[-1].startswith("hr@1 minus the baseline's: +0.0000 [")


def test_a_user_of_several_values_is_one_user() -> None:
    rows = np.array([4, 4, 4, 7, 9], np.int32)
    one, two = (Report({"logloss": np.array(v)}, rows) for v in ([1.0, 1, 1, 3, 4], [0.0, 0, 0, 3, 4]))
    assert one.table().splitlines()[-1] == "3 users"
    assert one.as_dict()["users"] == 3
    found = one.interval("logloss")
    assert (found.mean, found.n) == pytest.approx((one.means["logloss"], 3))
    between = one.against(two, "logloss")
    assert (between.mean, between.n) == pytest.approx((0.6, 3))
    assert not between.above_zero


def test_ratings() -> None:
    targets = Histories(
        np.array([1, 2, 0], dtype=np.int32), np.array([0, 2, 2, 3]), np.array([5, 3, 1], dtype=np.float32)
    )
    cases = Cases(np.arange(3, dtype=np.int32), Histories.of([[], [], []]), targets, {})
    report = evaluate_ratings(lambda part: np.full(len(part.targets.items), 3.0), cases, batch=1)
    assert report.means == pytest.approx({"mse": 8 / 3, "mae": 4 / 3, "rmse": math.sqrt(8 / 3)})
    assert report.user_rows.tolist() == [0, 0, 2]
    with pytest.raises(InputError, match="no rating"):
        evaluate_ratings(lambda part: np.zeros(1), cases_of([[]], [[1]]))


class Rates(Fixed):
    """Predicts one rating for all, if it predicts at all."""

    predicts = True

    def predict(self, histories: Histories, items: Histories) -> NDArray[np.float64]:
        assert len(histories) == len(items)
        return np.full(len(items.items), 3.0)


def test_models_that_predict_ratings_are_measured_by_them_too() -> None:
    weights = np.array([5, 3, 1], dtype=np.float32)
    targets = Histories(np.array([1, 2, 0], dtype=np.int32), np.array([0, 2, 2, 3]), weights)
    cases = Cases(np.arange(3, dtype=np.int32), Histories.of([[], [], []]), targets, {})
    model = Rates([1.0, 2.0, 3.0])
    report = evaluate(model_top_k(model), cases, ks=(2,))
    both = with_ratings(report, model, cases)
    assert both.whole == pytest.approx({"rmse": math.sqrt(8 / 3), "mae": 4 / 3})
    assert both.values is report.values
    assert any(line.split() == ["rmse", "1.6330"] for line in both.table().splitlines())
    same = dataclasses.replace(cases, targets=dataclasses.replace(targets, weights=np.ones(3, np.float32)))
    assert with_ratings(report, model, same) is report  # weights that say nothing are no ratings
    assert with_ratings(report, Fixed([1.0] * 3), cases) is report
    model.predicts = False
    assert with_ratings(report, model, cases) is report

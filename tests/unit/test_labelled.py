"""A log that says what was not taken, from its file to AUC and log loss by the verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recray
from recray import composing, recipes
from recray.data.dataset import Dataset
from recray.errors import ConfigError, InputError
from recray.metrics.binary import auc, logloss
from recray.models.saved import load_model
from recray.tuning.space import Space

LABELS = (
    "options.loss=labels",
    "options.dim=8",
    "options.hidden=16",
    "train.batch_size=128",
    "train.lr=0.01",
)
FEW = ("train.epochs=8", "train.threads=1")


def rows(n: int, seed: int) -> list[str]:
    """What is taken has the parity of who takes it; on one day less is taken; one in twenty is noise."""
    rng = np.random.default_rng(seed)
    user, item, day = rng.integers(0, 40, n), rng.integers(0, 30, n), rng.integers(0, 2, n)
    taken = (((user + item) % 2 == 0) & ((day == 0) | (item < 15))) ^ (rng.random(n) < 0.05)
    return [f"u{u},i{i},d{d},{int(y)}" for u, i, d, y in zip(user, item, day, taken)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("labelled")
    for seed, (name, n) in enumerate({"train": 4000, "valid": 500, "test": 500}.items()):
        (folder / f"{name}.csv").write_text("\n".join(["user,item,day,taken", *rows(n, seed)]))
    return recray.prepare(
        folder / "train.csv",
        valid=folder / "valid.csv",
        test=folder / "test.csv",
        columns={"user": "user", "item": "item", "weight": "taken"},
        context=("user", "day"),
        min_weight=0,
        split="none",
        out=folder / "data",
    )


@pytest.mark.parametrize("name", ["dlrm", "dcn"])
def test_labels_are_learned_and_measured(name: str, data: Dataset, tmp_path: Path) -> None:
    made = recray.train(data, recipe=name, set=(*LABELS, *FEW), out=tmp_path / "made")
    report = recray.evaluate(made, data=data)
    model: Any = load_model(made)
    labels, logits = model.labelled(data, "test")
    assert labels.tolist() == (data.interactions("test").weights > 0).tolist()
    assert report.means["auc"] == auc(labels, logits) > 0.9
    assert report.means["logloss"] == pytest.approx(logloss(labels, logits))
    assert report.means["logloss"] < 0.4
    assert len(report.values["logloss"]) == 500 == len(report.user_rows)
    assert report.as_dict()["users"] == report.interval("logloss").n == data.n_users == 40
    one = data.interactions("test")
    context = {column: values[:1] for column, values in one.context.items()}
    past = composing.open_data(data).histories("train").take(one.user_rows[:1])
    asked = model.score(past, one.item_rows[:1, None].astype(np.int64), context)
    assert asked.item() == pytest.approx(logits[0], abs=0.3)  # what came in valid is no history here


def test_a_split_of_one_label_has_no_auc(data: Dataset, tmp_path: Path) -> None:
    changes = (*LABELS, "train.epochs=1", "options.label_above=-1", "train.threads=1")
    with pytest.raises(InputError, match="min-weight"):
        recray.train(data, recipe="dlrm", set=changes, out=tmp_path / "none")
    made = recray.train(data, recipe="dlrm", set=(*LABELS, "train.epochs=1"), out=tmp_path / "made")
    (tmp_path / "test.csv").write_text("user,item,day,taken\nu1,i1,d0,1\nu2,i2,d0,1")
    log = data.artefact.place.local.parent / "train.csv"
    other = recray.prepare(
        log,
        test=tmp_path / "test.csv",
        columns={"user": "user", "item": "item", "weight": "taken"},
        context=("user", "day"),
        min_weight=0,
        out=tmp_path / "other",
    )
    with pytest.raises(InputError, match="only what was taken"):
        recray.evaluate(made, data=other)


def test_a_search_over_labels_asks_for_auc(data: Dataset) -> None:
    space, where = Space.parse(["options.dim=8,16"]), str(data.artefact.place)
    fit = composing.Fit(recipes.recipe("dlrm", ["options.loss=labels"]), where, "auc")
    composing.check_search(fit, space)
    composing.check_search(composing.Fit(fit.recipe, where, "logloss"), space)
    labels = ["options.loss=labels"]
    for changes, metric in ((labels, "ndcg@10"), (labels, "auc@10"), ([], "auc")):
        with pytest.raises(ConfigError, match="unknown metric"):
            composing.check_search(composing.Fit(recipes.recipe("dlrm", changes), "nowhere", metric), space)


def test_a_search_by_log_loss_takes_the_least(data: Dataset, tmp_path: Path) -> None:
    found = recray.tune(
        data,
        recipe="dlrm",
        set=(*LABELS, "train.epochs=1", "train.threads=1"),
        space=["train.lr=0.00001,0.02"],
        metric="logloss",
        trials=2,
        scheduler="none",
        out=tmp_path / "search",
    )
    trials = json.loads((found.place / "front.json").read_bytes())["trials"]
    best = min(trials, key=lambda trial: trial["metrics"]["logloss"])
    assert found.manifest.report["chosen"]["trial"] == best["trial"]
    assert len({trial["metrics"]["logloss"] for trial in trials}) == 2


def test_a_log_with_one_row_a_user_is_planned_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = [f"u{u},i{rng.integers(30)},{rng.integers(2)}" for u in range(300)]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,taken", *rows]))
    columns = {"weight": "taken"}
    once = recray.prepare(
        tmp_path / "log.csv", columns=columns, min_weight=0, split="none", out=tmp_path / "once"
    )
    monkeypatch.setattr("recray.training.run._WORTH_S", 0.0)
    made = recray.train(once, recipe="dlrm", set=(*LABELS, "train.epochs=1"), out=tmp_path / "made")
    assert made.manifest.report["plan"]["predicted_step_ms"] > 0
    plan = recray.plan(once, recipe="dlrm", set=LABELS)
    assert {table.name: table.lookups for table in plan.work.tables} == {"item": 128, "history": 128 * 50}

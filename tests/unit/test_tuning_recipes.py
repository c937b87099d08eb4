"""The search of a recipe's settings: the best checkpoint stays, a stopped search goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from recray.errors import ConfigError, RecrayError
from recray.manifest import Artefact, open_artefact, write_artefact
from recray.storage import Place
from recray.tuning.recipes import search_recipe
from recray.tuning.space import Point

SPACE = ["train.lr=1e-4..1e-1@log", "options.dim=8,16,32"]


class Pretend:
    """Leaves a checkpoint that names its point; best where lr is near .01 and dim is 32."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[Point] = []
        self.stop_after = stop_after

    def __call__(self, point: Point, where: Place) -> Mapping[str, float]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(point)
        if point["options.dim"] == 8:
            raise ValueError("too small")

        def fill(folder: Path) -> None:
            (folder / "model.txt").write_text(json.dumps(point))

        write_artefact(where, "checkpoint", fill)
        lr, dim = float(str(point["train.lr"])), int(str(point["options.dim"]))
        return {"ndcg@10": dim / 100 - abs(lr - 0.01), "loss": abs(lr - 0.01)}


@pytest.fixture(autouse=True)
def quick_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    """TPE from the first trial on; the Gaussian process has its own test."""
    monkeypatch.setattr("recray.tuning.searcher.GP_TRIALS", 0)


@pytest.fixture
def dataset(tmp_path: Path) -> Artefact:
    return write_artefact(tmp_path / "data", "dataset", lambda folder: None)


def search(dataset: Artefact, out: Path, fit: Pretend, **more: Any) -> Artefact:
    given: dict[str, Any] = {"trials": 7, "given": {"name": "sasrec"}, **more}
    return search_recipe(fit, SPACE, dataset=dataset, out=out, **given)


def test_best_holds_the_best_trials_checkpoint(dataset: Artefact, tmp_path: Path) -> None:
    fit = Pretend()
    made = search(dataset, tmp_path / "tuned", fit)
    chosen = json.loads((made.place / "chosen.json").read_bytes())
    front = json.loads((made.place / "front.json").read_bytes())
    good = [row for row in front["trials"] if not row["error"]]
    assert chosen["metrics"]["ndcg@10"] == max(row["metrics"]["ndcg@10"] for row in good)
    best = open_artefact(tmp_path / "tuned" / "best", "checkpoint")
    assert json.loads((best.place / "model.txt").read_bytes()) == chosen["point"]
    assert {row["error"] for row in front["trials"]} <= {None, "ValueError: too small"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "tuned"], "nothing else is left"
    assert made.manifest.parents["dataset"]["hash"] == dataset.hash


def test_of_losses_the_least_is_best(dataset: Artefact, tmp_path: Path) -> None:
    made = search(dataset, tmp_path / "tuned", Pretend(), metric="loss")
    front = json.loads((made.place / "front.json").read_bytes())
    best = next(row for row in front["trials"] if row["trial"] == front["chosen"])
    assert best["metrics"]["loss"] == min(
        row["metrics"]["loss"] for row in front["trials"] if not row["error"]
    )


def test_a_stopped_search_goes_on_and_keeps_one_checkpoint(dataset: Artefact, tmp_path: Path) -> None:
    first = Pretend(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        search(dataset, tmp_path / "tuned", first)
    finished = [p for p in first.asked if p["options.dim"] != 8]
    assert len(list((tmp_path / ".tuned.search" / "checkpoints").iterdir())) == 1
    second = Pretend()
    search(dataset, tmp_path / "tuned", second)
    assert not [p for p in second.asked if p in finished]
    assert len(finished) + len(second.asked) == 7
    third = Pretend()
    search(dataset, tmp_path / "tuned", third, trials=8)
    assert not [p for p in third.asked if p in finished or (p in second.asked and p["options.dim"] != 8)]
    assert open_artefact(tmp_path / "tuned" / "best", "checkpoint")


def test_a_lost_best_checkpoint_is_trained_again(dataset: Artefact, tmp_path: Path) -> None:
    fit = Pretend()
    with pytest.raises(KeyboardInterrupt):
        search(dataset, tmp_path / "tuned", Pretend(stop_after=6), trials=9)
    for left in (tmp_path / ".tuned.search" / "checkpoints").iterdir():
        left.rename(tmp_path / "lost")
    made = search(dataset, tmp_path / "tuned", fit, trials=1)
    chosen = json.loads((made.place / "chosen.json").read_bytes())
    assert fit.asked == [chosen["point"]]


def test_a_metric_that_training_does_not_measure_is_one_line(dataset: Artefact, tmp_path: Path) -> None:
    with pytest.raises(RecrayError, match=r"no 'auc'.*choose of loss, ndcg@10"):
        search_recipe(
            Pretend(),
            ["train.lr=0.001..0.1", "options.dim=16,32"],
            dataset=dataset,
            out=tmp_path / "t",
            given={},
            metric="auc",
            trials=2,
        )
    assert not (tmp_path / "t").exists()


def test_a_space_that_cannot_be_read_is_refused_before_any_work(dataset: Artefact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower end first"):
        search_recipe(Pretend(), ["a=2..1"], dataset=dataset, out=tmp_path / "t", given={})

"""The search of a recipe's settings: the best checkpoint stays, a killed search goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from recray.errors import ConfigError, RecrayError
from recray.manifest import Artefact, open_artefact, write_artefact
from recray.storage import Place, place
from recray.tuning import recipes
from recray.tuning.halving import Halving
from recray.tuning.recipes import search_recipe
from recray.tuning.results import waiting
from recray.tuning.space import Point

SPACE = ["train.lr=1e-4..1e-1@log", "options.dim=8,16,32"]
Told = Callable[[int, float], None]


class Pretend:
    """Leaves a checkpoint that names its point; best where lr is near .01 and dim is 32."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[Point] = []
        self.stop_after = stop_after

    def __call__(self, point: Point, where: Place, told: Told) -> Mapping[str, float]:
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


class Epochs:
    """Trains 9 epochs that it remembers beside the checkpoint, as real training does; x decides."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[Point] = []
        self.epochs, self.stop_after = 0, stop_after

    def __call__(self, point: Point, where: Place, told: Told) -> Mapping[str, float]:
        self.asked.append(point)
        best, state = int(str(point["x"])), where.local.with_name("state")
        done = int(state.read_text()) if state.exists() else 0
        for epoch in range(1, done + 1):
            told(epoch, best * epoch / 9)
        while done < 9:
            if self.epochs == self.stop_after:
                raise KeyboardInterrupt
            done, self.epochs = done + 1, self.epochs + 1
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(str(done))
            told(done, best * done / 9)
        write_artefact(where, "checkpoint", lambda folder: None)
        state.unlink()
        return {"ndcg@10": float(best), "recall@10": 0.5}

    @property
    def begun(self) -> list[Point]:
        """Each point once, in order of its beginning."""
        return [point for n, point in enumerate(self.asked) if point not in self.asked[:n]]


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
    for left in (tmp_path / ".tuned.search" / "checkpoints").glob("*/model"):
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


def test_another_space_is_searched_anew_and_keeps_what_lies_in_it(dataset: Artefact, tmp_path: Path) -> None:
    tune = partial(search_recipe, dataset=dataset, out=tmp_path / "tuned", given={})
    lr = "train.lr=1e-4..1e-1@log"
    tune(Pretend(), [lr, "options.dim=16"], trials=4)
    other = Pretend()
    made = tune(other, [lr, "options.dim=32,64"], trials=4)
    assert len(other.asked) == 4 == len(trials_of(made))
    wider = Pretend()
    made = tune(wider, [lr, "options.dim=32,64,128"], trials=5)
    assert len(wider.asked) == 1
    assert len(trials_of(made)) == 5


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_that_no_generator_takes_is_refused(dataset: Artefact, tmp_path: Path, seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        search(dataset, tmp_path / "tuned", Pretend(), seed=seed)


def test_what_waits_beside_an_object_store_s_out_is_in_the_same_store() -> None:
    out = place("s3://bucket/runs/small?region=eu-west-1&scheme=http")
    assert waiting(out).uri == "s3://bucket/runs/.small.search?region=eu-west-1&scheme=http"


def test_trials_of_another_metric_are_not_taken_over(dataset: Artefact, tmp_path: Path) -> None:
    search(dataset, tmp_path / "tuned", Pretend(), trials=3)
    again = Pretend()
    made = search(dataset, tmp_path / "tuned", again, trials=3, metric="loss")
    assert len(again.asked) == 3 == len(trials_of(made))


def halved(dataset: Artefact, out: Path, fit: Epochs, trials: int = 9, **more: Any) -> Artefact:
    given = {"train": {"epochs": 9}}
    more = {"halving": Halving(9, 1, 3), **more}
    return search_recipe(fit, ["x=1..99"], dataset=dataset, out=out, given=given, trials=trials, **more)


def trials_of(search: Artefact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((search.place / "front.json").read_bytes())["trials"]
    return rows


def test_halving_stops_trials_which_are_finished_then(
    dataset: Artefact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = Epochs()
    made = halved(dataset, tmp_path / "tuned", fit)
    rows = trials_of(made)
    assert {row["epochs"] for row in rows if row["stopped"]} <= {1, 3}
    assert {row["epochs"] for row in rows if not row["stopped"]} == {9}
    best = max(rows, key=lambda row: row["metrics"]["ndcg@10"])
    assert best["trial"] == made.manifest.report["chosen"]["trial"]
    assert not best["stopped"]
    assert best["point"]["x"] == max(row["point"]["x"] for row in rows)
    assert made.manifest.report["epochs"] == {"spent": fit.epochs, "all": 81}
    assert fit.epochs == sum(row["epochs"] for row in rows) < 81 / 2
    told = capsys.readouterr().err
    stopped = [row for row in rows if row["stopped"]]
    assert told.count(f"{fit.epochs} epochs were trained; every trial run out takes 81 (") == 1
    assert len([line for line in told.splitlines() if "stopped after epoch" in line]) == len(stopped) > 4
    again = Epochs()
    assert trials_of(halved(dataset, tmp_path / "tuned", again)) == rows
    assert again.asked == [], "a trial that was stopped is finished"


def test_without_halving_every_trial_runs_out(dataset: Artefact, tmp_path: Path) -> None:
    fit = Epochs()
    made = halved(dataset, tmp_path / "tuned", fit, 4, halving=None)
    assert made.manifest.report["epochs"] == {"spent": 36, "all": 36}
    assert fit.asked == fit.begun
    other = Epochs()
    halved(dataset, tmp_path / "tuned", other, 4)
    assert len(other.begun) == 4, "trials under another rule are other trials"


def test_the_searcher_learns_of_every_trial_once_and_at_the_same_epoch(
    dataset: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "recray.tuning.searcher.ConstrainedSearcher.tell",
        lambda self, point, metrics: told.append((point["x"], metrics["ndcg@10"])),
    )
    halved(dataset, tmp_path / "tuned", Epochs())
    assert len(told) == 9
    assert all(value == pytest.approx(x / 9) for x, value in told)


@pytest.mark.parametrize("cut", range(1, 20, 2))
def test_a_killed_search_trains_no_epoch_twice(dataset: Artefact, tmp_path: Path, cut: int) -> None:
    first, second = Epochs(stop_after=cut), Epochs()
    with pytest.raises(KeyboardInterrupt):
        halved(dataset, tmp_path / "tuned", first)
    made = halved(dataset, tmp_path / "tuned", second)
    rows = trials_of(made)
    assert first.epochs == cut
    assert first.epochs + second.epochs == sum(row["epochs"] for row in rows) <= 81 / 2
    assert second.asked[0] == first.asked[-1], "what was cut off comes first"
    assert [row["number"] for row in rows] == list(range(1, 10))
    numbers = {row["point"]["x"]: row["number"] for row in rows}
    assert [numbers[point["x"]] for point in first.begun] == list(range(1, len(first.begun) + 1))


def test_a_trial_that_failed_was_not_cut_off(dataset: Artefact, tmp_path: Path) -> None:
    class Broken(Epochs):
        def __call__(self, point: Point, where: Place, told: Told) -> Mapping[str, float]:
            if len(self.asked) == 1:
                self.asked.append(point)
                raise ValueError("broken")
            return super().__call__(point, where, told)

    first, second = Broken(stop_after=12), Epochs()
    with pytest.raises(KeyboardInterrupt):
        halved(dataset, tmp_path / "tuned", first)
    halved(dataset, tmp_path / "tuned", second)
    assert second.asked[0] == first.asked[-1] != first.asked[1]


def test_a_point_that_left_the_space_is_not_gone_on_with(dataset: Artefact, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        halved(dataset, tmp_path / "tuned", Epochs(stop_after=4))
    second = Epochs()
    more: dict[str, Any] = {"given": {"train": {"epochs": 9}}, "halving": Halving(9, 1, 3), "trials": 2}
    search_recipe(second, ["x=100..120"], dataset=dataset, out=tmp_path / "tuned", **more)
    assert all(int(str(point["x"])) >= 100 for point in second.asked)


def test_one_trial_is_run_out_whatever_its_rungs_say(dataset: Artefact, tmp_path: Path) -> None:
    made = halved(dataset, tmp_path / "tuned", Epochs(), 1)
    assert [(row["epochs"], row["stopped"]) for row in trials_of(made)] == [(9, False)]


def test_a_trial_shorter_than_its_rung_ends_by_itself(dataset: Artefact, tmp_path: Path) -> None:
    """`train.epochs` may be searched, too: the last epoch of a trial is no rung."""

    class Short(Epochs):
        def __call__(self, point: Point, where: Place, told: Told) -> Mapping[str, float]:
            self.asked.append(point)
            for epoch in range(1, int(str(point["train.epochs"])) + 1):
                told(epoch, float(epoch * int(str(point["train.epochs"]))))
            write_artefact(where, "checkpoint", lambda folder: None)
            return {"ndcg@10": 1.0}

    rule, given = Halving(9, 3, 3), {"train": {"epochs": 9}}
    made = search_recipe(
        Short(),
        ["train.epochs=2,3,9"],
        dataset=dataset,
        out=tmp_path / "t",
        given=given,
        trials=3,
        halving=rule,
    )
    rows = {row["point"]["train.epochs"]: row for row in trials_of(made)}
    assert [(rows[n]["epochs"], rows[n]["of"], rows[n]["stopped"]) for n in (2, 3)] == [
        (2, 2, False),
        (3, 3, False),
    ]
    assert rows[9]["of"] == 9


def test_what_is_stopped_leaves_no_state_behind(
    dataset: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = recipes._Keeper.line

    def line(self: Any, trial: Any) -> str:
        said = real(self, trial)
        held.append(len(list((tmp_path / ".tuned.search" / "checkpoints").iterdir())))
        return said

    monkeypatch.setattr(recipes._Keeper, "line", line)
    halved(dataset, tmp_path / "tuned", Epochs(), 18)
    assert max(held) <= 18 // 3 + 18 // 9 + 2, "those that may go on, from either rung, and the best"
    assert held[-1] == 1


def test_the_search_shows_its_trials(
    dataset: Artefact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = halved(dataset, tmp_path / "tuned", Epochs())
    lines = capsys.readouterr().err.splitlines()
    head = next(n for n, line in enumerate(lines) if line.startswith("trial  settings"))
    values = [float(line.split()[2]) for line in lines[head + 1 : head + 10]]
    assert values == sorted(values, reverse=True)
    page = (made.place / made.manifest.report["picture"]).read_bytes().decode()
    assert page.count("<polyline") == 9

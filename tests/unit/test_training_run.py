"""The verb in process: the checkpoint it leaves, the run folder, what it refuses."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recray.data.dataset import Dataset
from recray.errors import ConfigError, InputError
from recray.manifest import open_artefact
from recray.models.popularity import Popularity
from recray.models.saved import load_model
from recray.recipes import Recipe, Train, recipe
from recray.storage import place
from recray.training import run as run_module
from recray.training.checkpoint import EpochReport, State, last_state, open_state
from recray.training.loop import TrainingError
from recray.training.run import check, run_places, train
from tests.models_data import ring_dataset

WORDS = [
    "train.threads=1",
    "options.dim=8",
    "options.blocks=1",
    "train.batch_size=32",
    "train.epochs=4",
    "train.patience=0",
]


def small(*changes: str) -> Recipe:
    return recipe("sasrec", [*WORDS, *changes])


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ring_dataset(tmp_path_factory.mktemp("ring"))


def test_a_checkpoint_says_all_of_itself(ring: Dataset, tmp_path: Path) -> None:
    made = train(ring, small(), out=tmp_path / "out")
    again = open_artefact(tmp_path / "out", "checkpoint")
    assert again.hash == made.hash
    assert load_model(again).name == "sasrec"
    recipe_written, report = again.manifest.recipe, again.manifest.report
    assert recipe_written["options"]["dim"] == 8
    assert "max_len" in recipe_written["options"], "defaults are resolved too"
    assert recipe_written["train"]["epochs"] == 4
    assert again.manifest.parents["dataset"]["hash"] == ring.artefact.hash
    assert [epoch["epoch"] for epoch in report["history"]] == [1, 2, 3, 4]
    assert report["valid"]["ndcg@10"] == max(epoch["value"] for epoch in report["history"])
    assert report["catalogue"]["n_items"] == ring.n_items
    assert report["item_ids"] == ring.items.digest()
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "the run folder is gone"
    assert train(ring, small(), out=tmp_path / "twin").manifest.files == made.manifest.files


@pytest.mark.parametrize("name", ["popularity", "ease"])
def test_closed_form_models_are_fitted_here(ring: Dataset, tmp_path: Path, name: str) -> None:
    made = train(ring, recipe(name), workers=2, out=tmp_path / "out")
    assert load_model(made).name == name
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class CutError(Exception):
    pass


@pytest.fixture
def cut_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make a run die right after the state of an epoch was kept."""
    save = State.save

    def arm(epoch: int) -> None:
        def dying(self: State, folder: Path) -> Path:
            kept = save(self, folder)
            if self.position.epoch == epoch:
                raise CutError
            return kept

        monkeypatch.setattr(State, "save", dying)

    return arm


def test_a_run_that_was_cut_off_goes_on(
    ring: Dataset, tmp_path: Path, cut_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(ring, small(), out=tmp_path / "whole")
    cut_after(2)
    with pytest.raises(CutError):
        train(ring, small(), out=tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    cut_after(99)
    capsys.readouterr()
    resumed = train(ring, small(), out=tmp_path / "cut")
    words = capsys.readouterr().err
    assert "going on after epoch 2 of 4" in words
    assert "epoch 2/4" not in words
    assert resumed.manifest.files == whole.manifest.files, "bit-equal weights"


def test_a_run_cut_off_in_the_middle_of_an_epoch_goes_on_at_the_next_batch(
    ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.batch_size=8", "train.save_steps=3", "train.epochs=2"]
    whole = train(ring, small(*words), out=tmp_path / "whole")
    save = State.save

    def dying(self: State, folder: Path) -> Path:
        kept = save(self, folder)
        if self.position.epoch == 1 and self.position.batch == 4:
            raise CutError
        return kept

    monkeypatch.setattr(State, "save", dying)
    with pytest.raises(CutError):
        train(ring, small(*words), out=tmp_path / "cut")
    monkeypatch.setattr(State, "save", save)
    last = last_state(tmp_path / ".cut.run")
    assert last
    assert open_state(last).position.batch == 4
    resumed = train(ring, small(*words), out=tmp_path / "cut")
    assert resumed.manifest.files == whole.manifest.files, "bit-equal weights"
    losses = [[epoch["loss"] for epoch in a.manifest.report["history"]] for a in (whole, resumed)]
    assert losses[0] == losses[1]


def test_another_recipe_starts_anew_and_says_so(
    ring: Dataset, tmp_path: Path, cut_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cut_after(2)
    with pytest.raises(CutError):
        train(ring, small(), out=tmp_path / "out")
    cut_after(99)
    capsys.readouterr()
    made = train(ring, small("train.lr=0.01"), out=tmp_path / "out")
    words = capsys.readouterr().err
    assert "starting anew: an unfinished run was here, with another recipe" in words
    assert [epoch["epoch"] for epoch in made.manifest.report["history"]] == [1, 2, 3, 4]
    assert made.manifest.files == train(ring, small("train.lr=0.01"), out=tmp_path / "b").manifest.files


def test_a_run_killed_by_9_goes_on(ring: Dataset, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import sys\n"
        "from recray.data.dataset import open_dataset\n"
        "from recray.recipes import recipe\n"
        "from recray.training.run import train\n"
        "train(open_dataset(sys.argv[1]), recipe('sasrec', sys.argv[3:]), out=sys.argv[2])\n"
    )
    words, out = [*WORDS, "train.epochs=30"], tmp_path / "out"
    root = str(Path(__file__).parents[2])
    command = [sys.executable, str(script), ring.artefact.place.uri, str(out), *words]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    run = tmp_path / ".out.run"
    until = time.monotonic() + 60
    while not last_state(run) and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert not out.exists()
    kept = last_state(run)
    assert kept
    epoch = open_state(kept).position.epoch
    reports: list[EpochReport] = []
    original = run_module.epoch_words

    def noting(report: EpochReport, epochs: int) -> str:
        reports.append(report)
        return original(report, epochs)

    run_module.epoch_words = noting  # type: ignore[assignment]
    try:
        made = train(ring, recipe("sasrec", words), out=out)
    finally:
        run_module.epoch_words = original
    assert reports[0].epoch == epoch + 1
    assert [h["epoch"] for h in made.manifest.report["history"]] == list(range(1, 31))


def test_two_runs_into_one_place_are_refused(ring: Dataset, tmp_path: Path) -> None:
    folder, _ = run_places(place(tmp_path / "out"))
    folder.mkdir()
    with (folder / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run"):
            train(ring, small(), out=tmp_path / "out")


def test_an_out_with_other_things_is_refused_before_any_work(ring: Dataset, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="other things"):
        train(ring, small(), out=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"epochs": 0}, "train.epochs is 0"),
        ({"batch_size": -1}, "train.batch_size is -1"),
        ({"lr": 0.0}, "train.lr is 0"),
        ({"lr": float("nan")}, "train.lr is nan"),
        ({"clip_norm": float("nan")}, "train.clip_norm is nan"),
        ({"valid_users": -1}, "train.valid_users"),
        ({"accumulate": 0}, "train.accumulate is 0"),
        ({"save_steps": -1}, "train.save_steps"),
        ({"table_lr": float("nan")}, "train.table_lr is nan"),
        ({"seed": 1 << 63}, "train.seed is 9223372036854775808"),
    ],
)
def test_numbers_that_cannot_be_trained_with(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check(replace(Train(), **change))


def test_a_closed_form_without_a_finite_solution_leaves_nothing(
    ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve = Popularity.fit

    def broken(self: Popularity, *given: Any, **more: Any) -> Any:
        found = solve(self, *given, **more)
        self.counts[3] = float("nan")
        return found

    monkeypatch.setattr(Popularity, "fit", broken)
    with pytest.raises(TrainingError, match=r"popularity.*counts.*not finite"):
        train(ring, recipe("popularity"), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_kept_where_no_plan_can_be_made(
    ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: Any, **more: Any) -> Any:
        raise ConfigError("nothing can be planned")

    monkeypatch.setattr(run_module, "_WORTH_S", 0.0)
    known = train(ring, small("train.epochs=1"), out=tmp_path / "known")
    assert known.manifest.report["plan"]["measured_step_ms"] > 0
    monkeypatch.setattr(run_module, "set_beside", refused)
    made = train(ring, small("train.epochs=1"), out=tmp_path / "made")
    assert made.manifest.report["plan"] == {}
    assert made.manifest.files == known.manifest.files
    assert "warning: no plan is set beside the run (nothing can be planned)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["popularity", "ials"])
def test_a_gpu_for_a_closed_form_is_refused(ring: Dataset, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is fitted without a GPU.*train it without --gpu"):
        train(ring, recipe(name), gpu=True, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_and_workers(ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dimm"):
        train(ring, small("options.dimm=3"), out=tmp_path / "out")
    with pytest.raises(ConfigError, match="workers is -1"):
        train(ring, small(), workers=-1, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_larger_than_memory_is_refused_in_one_line(ring: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"larger than this machine's memory. lower options\.dim"):
        train(ring, small("options.dim=4000000"), out=tmp_path / "out")


def test_a_table_larger_than_memory_is_refused_with_what_would_fit(
    ring: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recray.training.work.free_memory", lambda: 600 << 20)
    with pytest.raises(InputError, match=r"table 'item' of 20 x 400000: needs .* and 600\.00 MiB are there"):
        train(
            ring, small("options.dim=400000", "options.blocks=0", "options.max_len=2"), out=tmp_path / "out"
        )


def test_a_remote_run_keeps_its_states_on_shared_storage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    folder, storage = run_places(place("s3://bucket/models/sasrec?region=us-east-1"))
    assert folder.is_relative_to(tmp_path)
    assert storage.path == "bucket/models/.sasrec.run"

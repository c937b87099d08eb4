"""Numbers for TensorBoard, MLflow and Weights & Biases: each epoch once, over restarts too."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from recray.errors import ConfigError
from recray.recipes import Recipe, recipe
from recray.storage import place
from recray.training import metrics
from recray.training.checkpoint import EpochReport
from recray.training.metrics import Run, numbers, tracked, wanted


def epoch(number: int, value: float | None = 0.25) -> EpochReport:
    return EpochReport(
        epoch=number, loss=2.0 / number, metric="ndcg@10", value=value, best=True, seconds=0.5, batches=10
    )


def tracking(track: str) -> Recipe:
    made = recipe("sasrec")
    return dataclasses.replace(made, train=dataclasses.replace(made.train, track=track, batch_size=32))


class Remembering:
    """A service that remembers; `log` may be told to fail."""

    made: list[Remembering] = []  # noqa: RUF012
    fails_at = 0

    def __init__(self, run: Run) -> None:
        self.run, self.got, self.ended = run, [], None
        Remembering.made.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("nobody there")
        self.got.append((step, values["loss"]))

    def close(self, whole: bool) -> None:
        self.ended = whole


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Remembering]:
    """Two of them, under the names `json` and `csv`, packages that are there."""
    monkeypatch.setattr(Remembering, "made", [])
    kinds = {name: metrics._Kind(Remembering, name) for name in ("json", "csv")}
    monkeypatch.setattr(metrics, "SINKS", kinds)
    return Remembering.made


def test_a_run_that_goes_on_is_the_same_run_and_logs_no_epoch_twice(
    services: list[Remembering], tmp_path: Path
) -> None:
    target, folder = place(tmp_path / "out"), tmp_path / ".out.run"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt), tracked(tracking("json"), target, folder) as log:
        log(epoch(1), 1)
        log(epoch(2), 1)
        raise KeyboardInterrupt
    with tracked(tracking("json"), target, folder) as log:
        for number in (1, 2, 3):  # what a resumed run has in its history, and what it adds
            log(epoch(number), 2)
    first, second = services
    assert (first.got, second.got) == ([(1, 2.0), (2, 1.0)], [(3, 2 / 3)])
    assert (first.ended, second.ended) == (False, True)
    assert first.run == second.run
    assert first.run.name == "out"
    assert first.run.logs == tmp_path
    assert first.run.settings["train.batch_size"] == 32
    json.dumps(dict(first.run.settings))


def test_a_service_that_fails_is_left_out_and_the_other_goes_on(
    services: list[Remembering],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Remembering, "fails_at", 0)
    with tracked(tracking("json, csv"), place(tmp_path / "out"), tmp_path) as log:
        services[0].fails_at = 2
        for number in (1, 2, 3):
            log(epoch(number), 1)
    assert [step for step, _ in services[0].got] == [1]
    assert [step for step, _ in services[1].got] == [1, 2, 3]
    assert capsys.readouterr().err.count("is left out from here on (ConnectionError: nobody there)") == 1


def test_nothing_is_tracked_unless_asked_for(services: list[Remembering], tmp_path: Path) -> None:
    with tracked(tracking(""), place(tmp_path / "out"), tmp_path) as log:
        log(epoch(1), 1)
    assert services == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_logged_of_an_epoch() -> None:
    known = {"loss": 2.0, "seconds": 0.5, "waited": 0.0, "workers": 3.0, "examples_per_s": 640.0}
    assert numbers(epoch(1), 32, 3) == {**known, "ndcg@10": 0.25}
    assert numbers(epoch(1, None), 32, 3) == known


def test_a_service_that_cannot_be_used_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted("") == []
    with pytest.raises(ConfigError, match=r"unknown train\.track 'tensorbord'.*tensorboard"):
        wanted("tensorbord")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mlflow" else real(name))
    with pytest.raises(ConfigError, match=r"mlflow is not installed\. pip install mlflow-skinny"):
        wanted("mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"mlflow is not configured.*set MLFLOW_TRACKING_URI"):
        wanted("mlflow")
    with pytest.raises(ConfigError, match=r"wandb is not configured.*WANDB_API_KEY or WANDB_MODE"):
        wanted("tensorboard,wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wanted(" tensorboard,wandb,tensorboard") == ["tensorboard", "wandb"]


def in_two_parts(track: str, tmp_path: Path) -> None:
    """Epochs 1 and 2, a cut, and epochs 2 and 3."""
    folder = tmp_path / ".out.run"
    folder.mkdir(exist_ok=True)
    for numbered in ((1, 2), (2, 3)):
        with tracked(tracking(track), place(tmp_path / "out"), folder) as log:
            for number in numbered:
                log(epoch(number), 2)


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    in_two_parts("tensorboard", tmp_path)
    (run,) = (tmp_path / "tensorboard").iterdir()
    assert run.name.startswith("out-")
    read = EventAccumulator(str(run))
    read.Reload()
    assert [(e.step, round(e.value, 4)) for e in read.Scalars("loss")] == [(1, 2.0), (2, 1.0), (3, 0.6667)]
    assert [e.value for e in read.Scalars("ndcg@10")] == [0.25] * 3
    assert [e.value for e in read.Scalars("workers")] == [2.0] * 3
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore")  # MLflow uses what SQLAlchemy deprecates
def test_mlflow_reads_back_what_was_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    in_two_parts("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "out"
    assert run.data.params["train.batch_size"] == "32"
    logged = client.get_metric_history(run.info.run_id, "ndcg_at_10")
    assert sorted((each.step, each.value) for each in logged) == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert "left out" not in capsys.readouterr().err


def test_wandb_takes_what_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    in_two_parts("wandb", tmp_path)
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.stem for path in runs}) == 1, "one key over both parts"
    assert b"examples_per_s" in runs[0].read_bytes()
    assert "left out" not in capsys.readouterr().err

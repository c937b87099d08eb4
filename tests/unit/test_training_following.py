"""The lines between a run's controller and its driver, without Ray."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from recray.errors import InputError, RecrayError
from recray.training import following
from recray.training.checkpoint import EpochReport
from recray.training.following import Told, Watch, followed


def epoch(number: int, workers: int = 2) -> dict[str, Any]:
    numbers = {"epoch": number, "loss": 1.5, "metric": "ndcg@10", "value": 0.25, "best": number == 1}
    return {**numbers, "seconds": 0.5, "batches": 7, "workers": workers, "added later": 1}


def test_each_line_is_told_once_and_half_a_line_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, logged = tmp_path / "epochs.jsonl", []
    told = Told(3, 2, 4, lambda report, workers: logged.append((report, workers)))
    with followed(path, told), path.open("a") as file:
        lines = [
            {"workers": 2, "pids": [1, 2]},
            epoch(1),
            {"lost": [1]},
            {"workers": 3},
            epoch(2, 3),
            epoch(3, 3),
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        for part in (text[:99], text[99:-40], text[-40:]):
            file.write(part)
            file.flush()
            time.sleep(0.22)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "now 2 workers",
        "epoch 1/3: loss 1.5000, ndcg@10 0.2500 (best), 0.5 s",
        "warning: lost the worker of rank 1: going on from the last state",
        "now 3 workers",
        "epoch 2/3: loss 1.5000, ndcg@10 0.2500, 0.5 s",
        "epoch 3/3: loss 1.5000, ndcg@10 0.2500, 0.5 s",
    ]
    assert [(report.epoch, workers) for report, workers in logged] == [(1, 2), (2, 3), (3, 3)]
    assert isinstance(logged[0][0], EpochReport)


def test_a_driver_that_comes_back_cuts_the_torn_line_and_logs_what_it_may_have_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, logged = tmp_path / "epochs.jsonl", []
    whole = [{"workers": 2}, epoch(1), epoch(2), {"lost": [0]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in whole) + '{"epoch": 3, "lo')
    with followed(path, Told(3, 2, 2, lambda report, workers: logged.append(report.epoch))):
        with path.open("a") as file:
            file.write(json.dumps(epoch(3)) + "\n")
    assert capsys.readouterr().err.splitlines() == [
        "going on after epoch 2 of 3",
        "epoch 3/3: loss 1.5000, ndcg@10 0.2500, 0.5 s",
    ]
    assert logged == [1, 2, 3]


def test_waiting_for_room_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(following, "_PATIENCE_S", 0.0)
    told = Told(3, 2, 4, lambda report, workers: None)
    told.idle()
    told.idle()
    told.line({"workers": 2})
    told.idle()
    told.line({"lost": [0]})
    told.idle()
    assert capsys.readouterr().err.splitlines() == [
        "waiting until the cluster has room for 2 workers",
        "now 2 workers",
        "warning: lost the worker of rank 0: going on from the last state",
        "waiting until the cluster has room for 2 workers",
    ]


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_holds_whole_epochs_groups_and_losses(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "epochs.jsonl")
    watch.trying(2)
    watch.started([11, 12])
    watch.kept({"partial": True, "step": 3, "score": 0})
    watch.kept({"epoch": 1, "loss": 0.5, "score": 1})
    watch.lost({1: OSError("gone")})
    watch.started([13])
    assert written(watch.path) == [
        {"workers": 2, "pids": [11, 12]},
        {"epoch": 1, "loss": 0.5, "score": 1, "workers": 2},
        {"lost": [1]},
        {"workers": 1, "pids": [13]},
    ]


def test_losses_end_a_run_only_when_nothing_is_kept_between_them(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "epochs.jsonl")
    for _ in range(9):
        watch.lost({0: OSError("gone")})
        watch.kept({"partial": True})
    for _ in range(3):
        watch.lost({0: OSError("gone")})
    with pytest.raises(RecrayError, match=r"gave up after 3 restarts \(OSError: first line\)"):
        watch.lost({0: OSError("first line\nsecond")})


def test_an_error_of_ours_on_any_rank_ends_a_run_at_once(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "epochs.jsonl")
    lame, helpful = RecrayError("rank 1 could not write"), RecrayError("the disk is full", fix="make room")
    with pytest.raises(RecrayError, match=r"the disk is full\. make room"):
        watch.lost({0: RuntimeError("peer closed"), 1: lame, 2: helpful})
    assert not watch.path.exists(), "no loss is told of"


def test_a_group_that_never_finds_room_ends_a_run(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "epochs.jsonl")
    for _ in range(4):
        watch.trying(3)
    with pytest.raises(InputError, match="3 workers found no room on the cluster in 4 tries"):
        watch.trying(3)
    watch.started([1, 2, 3])
    watch.trying(4)

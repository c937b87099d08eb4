"""Trials: kept as they finish, never repeated, and failing alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recray.errors import ConfigError, InputError, RecrayError
from recray.storage import place
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point, Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, Trial, TrialCache, words

SPACE = Space.parse(["x=1..40"])


class Counting:
    """An objective that remembers what it was asked."""

    def __init__(self, bad: tuple[int, ...] = (), stop_after: int | None = None) -> None:
        self.asked: list[int] = []
        self.bad, self.stop_after = bad, stop_after

    def __call__(self, point: Point) -> Outcome:
        x = int(str(point["x"]))
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(x)
        if x in self.bad:
            raise OSError(28, "No space left on device")
        return Outcome({"q": float(x)}, {"values": [x]})


def sweep(folder: Path, trials: int, context: str = "a") -> Sweep:
    searcher = ConstrainedSearcher(SPACE, {"q": "max"}, sampler="tpe", startup=5)
    return Sweep(searcher, TrialCache(place(folder), {"of": context}), trials)


def test_as_many_trials_as_asked_and_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    objective = Counting()
    found = run(sweep(tmp_path, 6), objective)
    assert [t.number for t in found] == [1, 2, 3, 4, 5, 6]
    assert len(set(objective.asked)) == 6
    told = capsys.readouterr()
    assert told.out == ""
    assert [line.split("  ")[0] for line in told.err.splitlines()] == [f"trial {n}/6" for n in range(1, 7)]


def test_a_search_that_was_stopped_repeats_no_finished_trial(tmp_path: Path) -> None:
    first = Counting(stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(sweep(tmp_path, 9), first)
    second = Counting()
    found = run(sweep(tmp_path, 9), second)
    assert len(first.asked) == 4
    assert len(second.asked) == 5
    assert not set(first.asked) & set(second.asked)
    assert sorted(int(t.metrics["q"]) for t in found) == sorted(first.asked + second.asked)
    assert sorted(t.number for t in found) == list(range(1, 10))
    third = Counting()
    assert run(sweep(tmp_path, 9), third) == found
    assert third.asked == []


def test_another_context_shares_nothing(tmp_path: Path) -> None:
    run(sweep(tmp_path, 3), Counting())
    again = Counting()
    run(sweep(tmp_path, 3, context="b"), again)
    assert len(again.asked) == 3


def test_a_damaged_or_foreign_file_is_a_trial_that_was_not_finished(tmp_path: Path) -> None:
    run(sweep(tmp_path, 3), Counting())
    one, *_ = sorted(tmp_path.glob("*.json"))
    one.write_bytes(one.read_bytes()[:50])
    (tmp_path / "notes.json").write_text("[1]")
    again = Counting()
    assert len(run(sweep(tmp_path, 3), again)) == 3
    assert len(again.asked) == 1


def test_a_failing_trial_fails_alone_is_named_and_is_tried_again_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tuple(range(1, 41, 3))
    found = run(sweep(tmp_path, 12), Counting(bad))
    failed = [t for t in found if t.error]
    assert failed
    assert len(failed) < 12
    assert all(t.error == "OSError: [Errno 28] No space left on device" and not t.metrics for t in failed)
    assert f"x={failed[0].point['x']}  failed: OSError" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.json"))) == 12 - len(failed)
    after = run(sweep(tmp_path, 12), Counting())
    assert len({t.number for t in after}) == 12, "numbers stay unique where failures left gaps"


def test_when_every_trial_fails_the_search_ends_early_with_one_line(tmp_path: Path) -> None:
    objective = Counting(tuple(range(1, 41)))
    with pytest.raises(RecrayError, match=r"all 5 trials failed.*No space left") as caught:
        run(sweep(tmp_path, 30), objective)
    assert "\n" not in str(caught.value)
    assert len(objective.asked) == 5


def test_a_result_that_is_not_a_number_is_a_failure(tmp_path: Path) -> None:
    """Seed 0 asks for 22 first."""
    found = run(sweep(tmp_path, 4), lambda point: Outcome({"q": float("nan") if point["x"] != 22 else 1.0}))
    assert {t.error for t in found if t.point["x"] != 22} == {"q is not a number"}


def test_our_own_errors_are_told_without_their_type(tmp_path: Path) -> None:
    def objective(point: Point) -> Outcome:
        raise InputError("is broken\nindeed", where="f")

    with pytest.raises(RecrayError, match="the first said: f: is broken indeed"):
        run(sweep(tmp_path, 2), objective)


def test_no_trials_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 trials"):
        sweep(tmp_path, 0)


def test_a_trial_cannot_be_kept_on_a_full_disk_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recray.tuning.trial.write_file", full)
    assert len(run(sweep(tmp_path, 3), Counting())) == 3
    assert capsys.readouterr().err.count("cannot be kept") == 3


def test_a_file_holds_the_trial_and_is_named_by_its_hash(tmp_path: Path) -> None:
    cache = TrialCache(place(tmp_path), {"a": 1})
    name = cache.hash({"x": 1, "y": "a"})
    assert name == TrialCache(place("/elsewhere"), {"a": 1}).hash({"y": "a", "x": 1})
    assert (
        name
        != cache.hash({"x": 2, "y": "a"})
        != TrialCache(place(tmp_path), {"a": 2}).hash({"x": 1, "y": "a"})
    )
    trial = Trial(hash=name, number=3, point={"x": 1, "y": "a"}, metrics={"q": 0.5}, detail={"values": [1]})
    cache.keep(trial)
    assert json.loads((tmp_path / f"{name}.json").read_text())["metrics"] == {"q": 0.5}
    assert cache.load() == [trial]


def test_words_leave_out_what_is_usual() -> None:
    usual: Point = {"codec": "f32", "links": 8}
    assert words({"codec": "int8", "links": 8}, usual) == "codec=int8"
    assert words(usual, usual) == "as trained"
    assert words({"a": 1, "b": None}) == "a=1 b=None"


def test_a_hopeless_search_ends_while_others_still_run(tmp_path: Path) -> None:
    asked = sweep(tmp_path, 30)
    running = [asked.next() for _ in range(3)]
    for _ in range(5):
        name = running.pop(0)
        assert name is not None
        asked.done(name[0], None, "No space left")
        if (more := asked.next()) is not None:
            running.append(more)
    assert asked.next() is None
    assert asked.running == 2

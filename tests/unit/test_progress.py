"""What a person sees of long work that runs in a log."""

from __future__ import annotations

import pytest

from recray import progress


def test_short_work_says_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("read", total=10) as bar:
        bar.update(10)
    assert capsys.readouterr() == ("", "")


def test_long_work_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.bar("read", total=4000, unit="row") as bar:
        for _ in range(4):
            now[0] += 20
            bar.set_postfix_str("all well")
            bar.update(1000)
    assert capsys.readouterr().err.splitlines() == [
        "read: 2,000 of 4,000 row all well",
        "read: 4,000 of 4,000 row all well",
    ]

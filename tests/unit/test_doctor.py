from __future__ import annotations

import socket

import pytest

from recray import doctor

GIB = 1 << 30


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (doctor.python((3, 9, 18)), "fail"),
        (doctor.python((3, 10, 0)), "ok"),
        (doctor.cores(1), "warn"),
        (doctor.cores(2), "ok"),
        (doctor.memory(1 * GIB), "fail"),
        (doctor.memory(4 * GIB), "warn"),
        (doctor.memory(24 * GIB), "ok"),
        (doctor.disk(GIB // 2), "fail"),
        (doctor.disk(2 * GIB), "warn"),
        (doctor.disk(50 * GIB), "ok"),
        (doctor.listening(70_000), "warn"),
    ],
)
def test_verdicts(check: doctor.Check, verdict: str) -> None:
    assert check.verdict == verdict
    assert check.found


def test_a_busy_port_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert doctor.listening(port).verdict == "warn"
    assert doctor.listening(port).verdict == "ok"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no-such-thing"))
    found, missing = doctor.packages()
    assert found.verdict == "ok"
    assert missing == doctor.Check("fail", "no-such-thing", "is not installed; pip install no-such-thing")


def test_a_driver_that_does_not_answer_means_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.gpu() == doctor.Check("ok", "gpu", "none; everything runs on the CPU")

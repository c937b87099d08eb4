"""The measurement: its interval, its slot, its child process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recray.errors import ConfigError, RecrayError
from recray.tuning.latency import Effort, interval_of_p99, measure, quiet_core, slot
from recray.tuning.probe import Line, timed

HERE = "tests.unit.test_tuning_latency"
HOLD = """
import sys, time
from pathlib import Path
from recray.tuning.latency import slot
with slot(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


def spinning(seconds: float) -> tuple[Callable[[int], None], int]:
    """What the child process calls: requests that take a known time, the last of ten five times it."""

    def ask(i: int) -> None:
        until = time.perf_counter() + seconds * (5 if i == 9 else 1)
        while time.perf_counter() < until:
            pass

    return ask, 10


def circumstances() -> tuple[Callable[[int], None], int]:
    """Fails with a line that tells how the child was started."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    import torch

    raise ValueError(f"cores={cores} omp={os.environ['OMP_NUM_THREADS']} torch={torch.get_num_threads()}")


def dying() -> None:
    os._exit(3)


def test_the_interval_holds_the_true_p99_about_nineteen_times_in_twenty() -> None:
    rng, true = np.random.default_rng(0), float(-np.log(0.01))
    inside = 0
    for _ in range(60):
        low, high = interval_of_p99([rng.exponential(size=100) for _ in range(8)])
        inside += low <= true <= high
    assert inside >= 53


def test_bursts_of_noise_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    calm = [rng.normal(1, 0.01, 100) for _ in range(20)]
    burst = [block + (1.0 if i == 7 else 0.0) for i, block in enumerate(calm)]
    (low, high), (low_b, high_b) = interval_of_p99(calm), interval_of_p99(burst)
    assert high - low < 0.05
    assert high_b - low_b > 0.9


def test_a_steady_thing_ends_early_and_a_jittery_one_goes_on_to_the_cap() -> None:
    rng = np.random.default_rng(0)
    waits = np.clip(rng.pareto(1.1, 5000), 0, 400) * 5e-5  # p99 lies well below the cut

    def jittery(i: int) -> None:
        until = time.perf_counter() + waits[i]
        while time.perf_counter() < until:
            pass

    wide = timed(jittery, len(waits), Effort(width=0.01, least=200, seconds=0.3, warmup=0))
    assert not wide["narrow"]
    assert wide["seconds"] >= 0.3
    assert wide["low"] <= wide["p99"] <= wide["high"]
    steady = timed(lambda i: None, 5, Effort(width=1e6, least=300, seconds=5, warmup=5))
    assert (steady["repeats"], steady["narrow"]) == (300, True)


def test_under_a_load_requests_wait_for_those_before_them() -> None:
    """One server, random arrivals, constant service: the mean wait of M/D/1 is rho s / (2 (1 - rho))."""
    s, rho = 1e-3, 0.7
    times = np.full(200_000, s)
    waits = Line(Effort(rate=rho / s)).queued(times) - s
    assert waits.mean() == pytest.approx(rho * s / (2 * (1 - rho)), rel=0.05)
    assert (waits >= 0).all()
    busier = Line(Effort(rate=rho / s, beside=s / 3)).queued(times) - s
    assert busier.mean() > 3 * waits.mean(), "HTTP's share of the core lets others wait, too"
    assert (Line(Effort()).queued(times) == times).all()


def test_stages_are_told_with_the_rest_of_the_request() -> None:
    spent: dict[str, list[float]] = {"encode": [], "rank": []}

    def ask(i: int) -> None:
        start = time.perf_counter()
        while time.perf_counter() < start + 0.0005:
            pass
        spent["encode"].append(0.0002)
        spent["rank"].append(0.0001)

    found = timed(ask, 3, Effort(least=100, most=200, seconds=5, warmup=3), spent=spent)
    assert len(spent["encode"]) == found["repeats"], "the warm-up is not counted"
    assert found["stages"]["encode"] == {"p50": 0.0002, "p99": 0.0002}
    assert found["stages"]["rest"]["p50"] == pytest.approx(found["p50"] - 0.0003, rel=0.2)
    assert found["mean"] >= 0.0005


def test_the_child_measures_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    found = measure(f"{HERE}:spinning", {"seconds": 0.0005}, Effort(least=300, seconds=0.6, warmup=10))
    assert 0.0005 <= found.p50 < 0.0025
    assert found.p99 >= 0.0025
    assert found.low <= found.p99 <= found.high
    assert found.repeats >= 300
    with pytest.raises(RecrayError, match=r"ValueError: cores=1 omp=1 torch=1"):
        measure(f"{HERE}:circumstances", {})


def test_a_child_that_dies_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2]), *sys.path])
    with pytest.raises(RecrayError, match="ended with 3"):
        measure(f"{HERE}:dying", {})


@pytest.mark.parametrize("kind, waits", [("alone", True), ("shared", False)])
def test_one_measurement_a_machine(tmp_path: Path, kind: str, waits: bool) -> None:
    """Another process holds the slot: measuring waits for it, shared work only for a measurement."""
    path = tmp_path / "slot"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"held\n"
            assert blocked(path, shared=False)
            assert blocked(path, shared=True) is waits
        finally:
            holder.stdin.close()
            holder.wait(20)
    assert not blocked(path, shared=False)


def blocked(path: Path, *, shared: bool) -> bool:
    """Whether taking the slot would wait."""
    import fcntl

    with path.open("r+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_slot_is_free_again_after_the_block_and_is_no_link(tmp_path: Path) -> None:
    path = tmp_path / "slot"
    with slot(path):
        assert blocked(path, shared=True)
    assert not blocked(path, shared=False)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(RecrayError, match="cannot be taken"), slot(tmp_path / "link"):
        pass


def test_the_quiet_core_is_one_of_ours() -> None:
    core = quiet_core()
    assert core is None or core in os.sched_getaffinity(0)


def test_an_effort_that_measures_nothing_is_refused() -> None:
    for wrong in ({"seconds": 0.0}, {"width": 0.0}, {"least": 0}, {"threads": 0}):
        with pytest.raises(ConfigError):
            Effort(**wrong)  # type: ignore[arg-type]

"""Clusters that a process starts for itself: several in turn, on loopback, gone with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray_cluster

_TWICE = """
import os, sys
if "early" in sys.argv:
    import ray  # the caller imported it before we could set a token
from recray import connect
for _ in range(2):
    with connect.session(num_cpus=1) as address:
        import psutil, ray
        assert ray.get(ray.remote(lambda: os.getpid()).remote()) != os.getpid()
        tree = psutil.Process().children(recursive=True)
        open_ports = [c for p in tree for c in p.net_connections("tcp") if c.status == "LISTEN"]
        assert len(open_ports) > 3, "nothing listens, so nothing is shown"
        places = {c.laddr.ip.removeprefix("::ffff:") for c in open_ports}
        assert places <= {"127.0.0.1", "::1"}, places
        assert ray._raylet.AuthenticationTokenLoader.instance().has_token()
        with connect.session() as inner:
            assert inner == address
        assert ray.is_initialized(), "an inner session must not end the outer one"
    assert not ray.is_initialized()
assert not [p for p in psutil.Process().children(recursive=True) if p.name() in ("raylet", "gcs_server")]
print("good")
"""

_WAIT = """
import sys, time
from recray import connect
with connect.session(num_cpus=1):
    print("up", flush=True)
    time.sleep(600)
"""


def _start(code: str, *words: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, cwd=root, env=clean
    )


def test_sessions_in_turn_on_loopback_with_one_token() -> None:
    process = _start(_TWICE, "early")
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0
    assert said.strip() == "good"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_process(number: signal.Signals) -> None:
    process = _start(_WAIT)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        tree = psutil.Process(process.pid).children(recursive=True)
        assert any(p.name() == "raylet" for p in tree)
        if (
            number == signal.SIGKILL
        ):  # Ray's agents leave when they cannot tell their head of it, a minute later
            tree = [p for p in tree if "Agent" not in " ".join(p.cmdline())]
        process.send_signal(number)
        process.wait(60)
    finally:
        process.kill()
        process.stdout.close()
    until = time.monotonic() + 30
    while alive := [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < until, [p.cmdline() for p in alive]
        time.sleep(0.1)

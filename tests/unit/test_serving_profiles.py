"""Profiles: which variables a controller gets, where its files lie, and what is refused."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from recray.errors import ConfigError
from recray.serving import profiles


def test_lite_only_looks_after_its_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    profiles.check("lite")
    with profiles.environment("lite", cores=64, here=True) as made:
        assert made == {"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}
    monkeypatch.setenv("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "7")
    for profile in ("lite", "fast"):
        with profiles.environment(profile, cores=2, here=False) as made:  # type: ignore[arg-type]
            assert made["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "7"


def test_fast_sets_its_flags_and_keeps_its_files_to_itself() -> None:
    with profiles.environment("fast", cores=2, here=True) as made:
        assert made[profiles.MARK] == made["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
        assert made["RAY_SERVE_HAPROXY_NBTHREAD"] == "1"
        folder = Path(made["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(made["RAY_SERVE_HAPROXY_SOCKET_PATH"]) + 57 < 100, "a node's id comes between"
        assert all(isinstance(value, str) for value in made.values())
    assert not folder.exists()
    with profiles.environment("fast", cores=64, here=False) as made:
        assert made["RAY_SERVE_HAPROXY_NBTHREAD"] == "4"
        assert "RAY_SERVE_HAPROXY_SOCKET_PATH" not in made, "other nodes have other folders"


def test_statistics_and_metrics_are_bound_on_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script that stands for HAProxy edits the configuration it is given, and no other port of it."""
    fake = tmp_path / "fake haproxy"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o700)
    monkeypatch.setattr(profiles.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(profiles.shutil, "which", lambda name: str(fake))
    monkeypatch.delenv(profiles.BINARY, raising=False)
    with profiles.environment("fast", cores=2, here=True) as made:
        stats, metrics = (made[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS"))
        file = tmp_path / "haproxy.cfg"
        file.write_text(f"    bind :{metrics}\n    bind 0.0.0.0:8000\n  bind *:{stats}\n    bind *:8000\n")
        done = subprocess.run(
            [made[profiles.BINARY], "-db", "-f", str(file), "-sf", "7"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
    assert done.stdout.strip() == f"-db -f {file} -sf 7"
    assert [line.split()[1] for line in file.read_text().splitlines()] == [
        f"127.0.0.1:{metrics}", "0.0.0.0:8000", f"127.0.0.1:{stats}", "*:8000"
    ]  # fmt: skip
    with profiles.environment("fast", cores=2, here=False) as made:
        assert profiles.BINARY not in made, "other nodes have other files"


def test_what_the_user_has_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_NBTHREAD", "3")
    with profiles.environment("fast", cores=2, here=False) as made:
        assert made["RAY_SERVE_HAPROXY_NBTHREAD"] == "3"


def test_busy_ports_are_not_taken() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        with profiles.environment("fast", cores=2, here=True) as made:
            ports = {made[f"RAY_SERVE_HAPROXY_{name}_PORT"] for name in ("STATS", "METRICS")}
        assert len(ports) == 2
        assert str(other.getsockname()[1]) not in ports


def test_without_haproxy_fast_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(profiles.shutil, "which", lambda name: None)
    monkeypatch.delenv(profiles.BINARY, raising=False)
    with pytest.raises(ConfigError, match=r"recray\[fast\]") as error:
        profiles.check("fast")
    assert "\n" not in str(error.value)
    monkeypatch.setenv(profiles.BINARY, os.devnull)
    profiles.check("fast")
    with pytest.raises(ConfigError, match="lite or fast"):
        profiles.check("swift")

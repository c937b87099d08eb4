"""Profiles: which variables a controller gets, where its files lie, and what is refused."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from recray.errors import ConfigError
from recray.serving import profiles


def test_lite_changes_nothing() -> None:
    profiles.check("lite")
    with profiles.environment("lite", cores=64, here=True) as made:
        assert made == {}


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

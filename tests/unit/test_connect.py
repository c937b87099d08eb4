"""What is refused before Ray is asked, and the token. The clusters themselves are in tests/ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from recray import connect
from recray.errors import InputError


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a listener that is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("address", ["nonsense", "host:port", ":", "127.0.0.1:"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InputError, match="not an address"), connect.session(address):
        pass


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(InputError, match="no Ray cluster answers here") as caught:
        with connect.session(f"127.0.0.1:{port}"):
            pass
    assert "\n" not in str(caught.value)


def test_somebody_else_listens(silent: int) -> None:
    with pytest.raises(InputError, match="something else"), connect.session(f"127.0.0.1:{silent}"):
        pass


def test_waiting_has_an_end() -> None:
    never = threading.Event()
    with pytest.raises(TimeoutError):
        connect._within(0.05, never.wait)
    never.set()
    with pytest.raises(ZeroDivisionError):
        connect._within(5, lambda: 1 / 0)


_TOKEN = """
import os
from recray import connect
connect._own_token()
first = os.environ["RAY_AUTH_TOKEN_PATH"]
connect._own_token()
assert os.environ["RAY_AUTH_TOKEN_PATH"] == first and os.environ["RAY_AUTH_MODE"] == "token"
print(first, oct(os.stat(first).st_mode & 0o777), len(open(first).read()), flush=True)
"""


def test_one_private_token_a_process_that_goes_with_it() -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _TOKEN], capture_output=True, text=True, check=True, cwd=root, env=clean
    )
    path, mode, length = done.stdout.split()
    assert (mode, length) == ("0o600", "64")
    assert not os.path.exists(os.path.dirname(path))


def test_a_token_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    connect._own_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "mine")
    assert list(tmp_path.iterdir()) == []


def test_importing_the_key_does_not_import_ray() -> None:
    code = "import sys; from recray import connect; sys.exit('ray' in sys.modules)"
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0

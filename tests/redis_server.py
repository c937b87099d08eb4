"""A real Redis on a free loopback port, which a test may kill and start again on the same data."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from recray.serving.process import check_free


class RedisServer:
    """One server process; `url` stays the same over restarts."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("redis-server") is None:
            pytest.skip("no redis-server on this machine")
        if importlib.util.find_spec("redis") is None:
            pytest.skip("the package redis is not installed")
        self.port = check_free("127.0.0.1", 0)
        self.url, self._folder = f"redis://127.0.0.1:{self.port}/0", folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it takes connections; what it wrote before is there again."""
        words = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--appendonly", "yes"]
        words += ["--dir", str(self._folder), "--save", "", "--logfile", str(self._folder / "redis.log")]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as line:
                    line.sendall(b"PING\r\n")
                    if line.recv(7) == b"+PONG\r\n":  # not while it still loads
                        return
            except OSError:
                pass
            assert self._process.poll() is None, (self._folder / "redis.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGKILL) -> None:
        """End it, by default without a chance to say good-bye."""
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

"""Load on a server: a closed loop by wrk (or by a client of ours where there is none).

A closed loop has so many clients, each of which asks again when it has its answer. For an open one, which
asks at a rate whatever comes back, see `_serving_flood`.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LUA = """
local bodies, at = {}, 0
for line in io.lines("%s") do bodies[#bodies + 1] = line end
request = function()
  at = at %% #bodies + 1
  return wrk.format("POST", nil, {["content-type"] = "application/json"}, bodies[at])
end
done = function(summary, latency, requests)
  local e = summary.errors
  print(string.format('{"requests": %%d, "us": %%d, "errors": %%d, "p50": %%f, "p99": %%f}',
    summary.requests, summary.duration, e.connect + e.read + e.write + e.status + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True)
class Load:
    """What came back: answers a second, latencies in ms, and requests without a 200."""

    rps: float
    p50_ms: float
    p99_ms: float
    errors: int


def generator() -> str:
    """The name of what makes a closed loop here."""
    return "wrk" if shutil.which("wrk") else "asyncio"


def closed(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    """`clients` that ask `url` one body after the other."""
    if generator() != "wrk":
        return asyncio.run(_closed(url, bodies, clients, seconds))
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        lines, script = Path(scratch) / "bodies", Path(scratch) / "post.lua"
        lines.write_bytes(b"\n".join(bodies) + b"\n")
        script.write_text(LUA % lines)
        command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        done = subprocess.run(
            [*command, "-s", str(script), url],
            check=True,
            capture_output=True,
            text=True,
            timeout=seconds + 60,
        )
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    good = told["requests"] - told["errors"]
    return Load(good / told["us"] * 1e6, told["p50"] / 1e3, told["p99"] / 1e3, told["errors"])


class _Line:
    """One kept connection."""

    def __init__(self, url: str) -> None:
        self._at = urllib.parse.urlsplit(url)
        self._pipes: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> bool:
        """Whether the answer was a 200."""
        try:
            if self._pipes is None:
                self._pipes = await asyncio.open_connection(self._at.hostname, self._at.port)
            reader, writer = self._pipes
            head = (
                f"POST {self._at.path} HTTP/1.1\r\nhost: {self._at.netloc}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            told = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(told.partition(b"content-length:")[2].partition(b"\r\n")[0])
            await reader.readexactly(size)
            return told[9:12] == b"200"
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.close()
            return False

    def close(self) -> None:
        if self._pipes is not None:
            self._pipes[1].close()
        self._pipes = None


async def _closed(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> Load:
    took: list[float] = []
    errors = 0
    start = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal errors
        line, at = _Line(url), number
        while (then := time.perf_counter()) < start + seconds:
            good = await line.ask(bodies[at % len(bodies)])
            took.append(time.perf_counter() - then)
            errors, at = errors + (not good), at + clients
        line.close()

    await asyncio.gather(*map(client, range(clients)))
    return _load(took, errors, time.perf_counter() - start)


def _load(took: Sequence[float], errors: int, seconds: float) -> Load:
    p50, p99 = np.percentile(np.array(took) * 1e3, [50, 99])
    return Load((len(took) - errors) / seconds, float(p50), float(p99), errors)

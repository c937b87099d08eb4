"""Twice what a graph can answer, for a minute: it sheds load, keeps its pace and keeps its deadline.

Capacity is the best of closed loops on the same server; then an open loop asks at twice that rate. Each
request must come back as a 200 or as a 503 with Retry-After, the 200s at 90 % of the capacity at least, and
99 % of them within the deadline that the server was given.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._process import Worker
from benchmarks._serving_bundle import bodies, make_bundle
from benchmarks._serving_flood import LINES, Flood, flood
from benchmarks._serving_load import closed, generator
from benchmarks.rows import Row, usable_cores
from recray.progress import say

DEADLINE_MS = 250.0
TIMES = 2.0  # the capacity
LEAST = 0.9  # of the capacity
CLIENTS = (16, 64)


@dataclass(frozen=True)
class Scale:
    """Closed loops and their seconds, and seconds of the flood."""

    rounds: int
    seconds: float
    flood_seconds: float


FULL, QUICK = Scale(3, 6, 60), Scale(1, 3, 10)


def overload_rows(quick: bool) -> Iterator[Row]:
    """Two rows a layout: the pace of the 200s, and their p99."""
    scale = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        bundle = make_bundle(Path(scratch), "neumf")
        asked, uri = bodies(bundle), bundle.artefact.place.uri
        command = [sys.executable, "-m", "benchmarks._serving_servers", "bounded", uri, "1"]
        with Worker([command]) as server:
            for layout, url in server.ready["urls"].items():
                capacity = _capacity(url, asked, scale)
                seen = flood(url, asked, TIMES * capacity, scale.flood_seconds)
                say(f"  {layout}, capacity {capacity:,.0f} rps: {told(seen)}")
                yield from rows(layout, capacity, seen)
                time.sleep(1.0)


def _capacity(url: str, asked: Sequence[bytes], scale: Scale) -> float:
    patient = [body[:-1] + b',"deadline_ms":60000}' for body in asked]  # so that all are answered in full
    closed(url, patient, 16, scale.seconds)  # warm-up
    return max(
        statistics.median(closed(url, patient, clients, scale.seconds).rps for _ in range(scale.rounds))
        for clients in CLIENTS
    )


def told(seen: Flood) -> str:
    """A flood in words."""
    return (
        f"{seen.asked / seen.seconds:,.0f} asked, {seen.rps:,.0f} answered, {seen.whole / seen.seconds:,.0f} "
        f"of them whole, {len(seen.retry_after) / seen.seconds:,.0f} sent away a second; "
        f"p50 {seen.ms(50):.0f} ms, p99 {seen.ms(99):.0f} ms; other {seen.other}"
    )


def rows(layout: str, capacity: float, seen: Flood) -> Iterator[Row]:
    """The rows of one layout."""
    sent_away = len(seen.retry_after)
    given = {
        "asked_rps": round(seen.asked / seen.seconds, 1), "seconds": round(seen.seconds, 1),
        "whole_rps": round(seen.whole / seen.seconds, 1), "sent_away": sent_away, "other": seen.other,
        "retry_after": [min(seen.retry_after, default=0), max(seen.retry_after, default=0)],
        "deadline_ms": DEADLINE_MS, "generator": f"{generator()}, then epoll", "cores": usable_cores(),
        "connections": LINES, "sent_late_ms": round(seen.late * 1e3, 1),
    }  # fmt: skip
    work = "50kx64, 200 candidates, neumf"
    name = f"{layout}, {TIMES:g} times what it can answer"
    kept = seen.rps >= LEAST * capacity
    yield Row(
        name=f"{name}: answers", work=work, metric="rps", value=seen.rps, unit="requests/s",
        peer="its own capacity", peer_value=capacity,
        given={**given, "least": LEAST, "kept": kept and not seen.other},
    )  # fmt: skip
    p99 = seen.ms(99)
    yield Row(
        name=f"{name}: p99 of the answers", work=work, metric="p99_ms", value=p99, unit="ms",
        peer="the deadline", peer_value=DEADLINE_MS,
        given={**given, "p50_ms": round(seen.ms(50), 1), "kept": p99 <= DEADLINE_MS},
    )  # fmt: skip

"""What a request costs in process, on one thread: by the functions that the graph runs, alone or together."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import torch

from benchmarks._serving_bundle import bodies, make_bundle
from benchmarks.rows import Row
from recray.bundles.bundle import Bundle
from recray.serving import stages
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.settings import Batch

LIMIT_MS = 1.5  # a request at 16 or more together, models and Python


def inside_rows(quick: bool) -> Iterator[Row]:
    """Milliseconds a request, by ranker and batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for ranker in ("neumf", "dlrm"):
            with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
                bundle = make_bundle(Path(scratch), ranker)
                for size in (1, 16, 64):
                    yield _row(bundle, ranker, size, 10 if quick else 50)
    finally:
        torch.set_num_threads(before)


def _row(bundle: Bundle, ranker: str, size: int, repeats: int) -> Row:
    asked = bodies(bundle)[:size]
    requests = [bundle.request(**orjson.loads(body)) for body in asked]
    to_retrieve = stages.to_retrieve(requests, bundle.plan.candidates)
    found = stages.retrieve(bundle, to_retrieve)
    _, to_rank = stages.to_rank(requests, to_retrieve, found)
    app = build_asgi(Ingress(bundle, Fused(bundle, Batch(size=size))))
    parts = {
        "retrieve": lambda: stages.retrieve(bundle, to_retrieve),
        "rank": lambda: stages.rank(bundle, to_rank),
    }
    each = {name: _ms(work, repeats) / size for name, work in parts.items()}

    async def through() -> float:
        await asyncio.gather(*(_asked(app, body) for body in asked))
        took = []
        for _ in range(repeats):
            start = time.perf_counter()
            await asyncio.gather(*(_asked(app, body) for body in asked))
            took.append(time.perf_counter() - start)
        return statistics.median(took) * 1e3 / size

    whole = asyncio.run(through())
    given = {
        **{f"{name}_ms": round(value, 3) for name, value in each.items()},
        "rest_ms": round(whole - sum(each.values()), 3), "together": size, "threads": 1, "most": LIMIT_MS,
        "kept": size == 1 or whole <= LIMIT_MS,
    }  # fmt: skip
    name = f"one request of {size} together, in process"
    return Row(
        name=name,
        work=f"50kx64, 200 candidates, {ranker}",
        metric="p50_ms",
        value=whole,
        unit="ms",
        given=given,
    )


def _ms(work: Callable[[], Any], repeats: int) -> float:
    took = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:]) * 1e3


async def _asked(app: Any, body: bytes) -> None:
    """One request through the ASGI application, without a socket."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 200) == 200

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/recommend", "root_path": "", "headers": headers}
    await app(scope, receive, send)

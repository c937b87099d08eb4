"""The servers of the serving theme, each kind in a process of its own (see `_process`):

fast     Ray Serve by the profile fast: our graph fused and split, and a no-op behind the same ingress
bounded  our graph, fused and split, with a deadline
naive    three deployments as a tutorial has them, at Ray's defaults: every request makes both hops alone
uvicorn  one process without Ray: the same door, batcher and models
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import torch

from benchmarks._process import Answer, serve
from benchmarks._serving_bundle import CANDIDATES, bodies
from benchmarks._serving_overload import DEADLINE_MS
from recray import connect
from recray.bundles.bundle import Bundle, open_bundle
from recray.data.sequences import Histories
from recray.recommender import Candidates
from recray.serving import process
from recray.serving.http import build_asgi
from recray.serving.ingress import Fused, Ingress
from recray.serving.on_ray import serving
from recray.serving.settings import Batch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray import serve as ray_serve

PATH = "/v1/recommend"


class NoOp:
    """Parses the request and answers with as many bytes; nothing else."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def __serve_build_asgi_app__(self) -> Any:
        answer = self._answer
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                for step in ("startup", "shutdown"):
                    await receive()
                    await send({"type": f"lifespan.{step}.complete"})
                return
            body, more = b"", True
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            orjson.loads(body)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

        return app


class NaiveRetriever:
    """One history at a time."""

    def __init__(self, uri: str) -> None:
        self._bundle = open_bundle(uri, threads=1)

    def retrieve(self, history: Any) -> Any:
        one = Histories.of([history])
        found = self._bundle.recommender.retrieve(one, CANDIDATES, one)
        return found.rows, found.scores


class NaiveRanker:
    """One history's candidates at a time."""

    def __init__(self, uri: str) -> None:
        self._bundle = open_bundle(uri, threads=1)

    def rank(self, history: Any, rows: Any, scores: Any, k: int) -> Any:
        one, candidates = Histories.of([history]), Candidates(rows, scores)
        final = self._bundle.recommender.rank(one, candidates)
        best = self._bundle.recommender.top(one, candidates, final, k)
        return best.rows, best.scores


class NaiveIngress:
    """Ids to rows, two calls, rows to ids."""

    def __init__(self, uri: str, retriever: Any, ranker: Any) -> None:
        self._bundle, self._retriever, self._ranker = open_bundle(uri, threads=1), retriever, ranker

    async def __call__(self, request: Any) -> Any:
        ask = await request.json()
        asked = self._bundle.request(ask.get("user"), ask.get("history"), ask["k"])
        rows, scores = await self._retriever.retrieve.remote(asked.history)
        rows, scores = await self._ranker.rank.remote(asked.history, rows, scores, asked.k)
        names = self._bundle.items.ids_of(rows[0])
        pairs = zip(names, scores[0].tolist())
        items = [{"item": name, "score": score, "source": "ranker"} for name, score in pairs]
        return {"generation": self._bundle.generation, "items": items}


@contextlib.contextmanager
def fast(uri: str, replicas: int) -> Iterator[dict[str, str]]:
    """Layout -> URL, all on one Serve instance; `replicas` of each deployment and of the no-op."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(connect.session())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made: dict[str, str] = {}
        for layout in ("fused", "split"):
            config = str(_config(folder / f"{layout}.yaml", layout, replicas))
            root = stack.enter_context(serving(uri, config=config, port=0, name=layout, profile="fast"))
            made[layout] = root + PATH
        bundle = open_bundle(uri, threads=1)
        answer = httpx.post(made["fused"], content=bodies(bundle, 1)[0], timeout=60).raise_for_status()
        options = {
            "num_replicas": replicas,
            "max_ongoing_requests": 64,
            "ray_actor_options": {"num_cpus": 0.1},
        }
        app = ray_serve.deployment(name="NoOp")(ray_serve.ingress()(NoOp)).options(**options)
        quiet = {"enable_access_log": False, "log_level": "WARNING"}
        ray_serve.run(app.bind(answer.content), name="noop", route_prefix="/noop", logging_config=quiet)
        stack.callback(ray_serve.delete, "noop")
        made["noop"] = made["fused"].removesuffix(PATH) + "/noop" + PATH
        yield made


@contextlib.contextmanager
def naive(uri: str, replicas: int) -> Iterator[dict[str, str]]:
    """The graph at Ray's defaults; `replicas` is not for it."""
    port = process.check_free("127.0.0.1", 0)
    with connect.session():
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        retriever, ranker = (
            ray_serve.deployment(name=kind.__name__)(kind).options(ray_actor_options={"num_cpus": 0.1})
            for kind in (NaiveRetriever, NaiveRanker)
        )
        door = ray_serve.deployment(name="NaiveIngress")(NaiveIngress)
        door = door.options(ray_actor_options={"num_cpus": 0.1})
        try:
            ray_serve.run(door.bind(uri, retriever.bind(uri), ranker.bind(uri)), route_prefix="/")
            yield {"naive": f"http://127.0.0.1:{port}{PATH}"}
        finally:
            ray_serve.shutdown()


@contextlib.contextmanager
def uvicorn(uri: str, replicas: int) -> Iterator[dict[str, str]]:
    """One process, one thread for models beside its event loop, set up as a replica is."""
    import uvicorn as server

    process.take_turns()
    torch.set_num_threads(1)
    bundle: Bundle = open_bundle(uri, threads=1)
    app = build_asgi(Ingress(bundle, Fused(bundle, Batch())))
    port = process.check_free("127.0.0.1", 0)
    made = server.Server(server.Config(app, port=port, log_level="error", access_log=False))
    thread = threading.Thread(target=made.run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    process.wait_ready(url)
    try:
        yield {"uvicorn": url + PATH}
    finally:
        made.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def bounded(uri: str, replicas: int) -> Iterator[dict[str, str]]:
    """Layout -> URL as in `fast`, with a deadline."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(connect.session())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made: dict[str, str] = {}
        for layout in ("fused", "split"):
            more = f", deadline: {{default_ms: {DEADLINE_MS}}}"
            config = str(_config(folder / f"{layout}.yaml", layout, replicas, more))
            root = stack.enter_context(serving(uri, config=config, port=0, name=layout, profile="fast"))
            made[layout] = root + PATH
        yield made


KINDS = {"fast": fast, "bounded": bounded, "naive": naive, "uvicorn": uvicorn}


def _config(path: Path, layout: str, replicas: int, more: str = "") -> Path:
    """A Serve config for a layout with a fixed number of replicas."""
    names = ["Ingress"] if layout == "fused" else ["Ingress", "Retriever", "Ranker"]
    lines = [f"  - {{name: {name}, num_replicas: {replicas}}}" for name in names]
    head = f"applications:\n- args: {{layout: {layout}, access_log: false{more}}}\n  deployments:\n"
    path.write_text(head + "\n".join(lines) + "\n")
    return path


if __name__ == "__main__":
    with contextlib.ExitStack() as running:

        def start() -> tuple[Answer, Any]:
            """Start one kind and say where it listens."""
            urls = running.enter_context(KINDS[sys.argv[1]](sys.argv[2], int(sys.argv[3])))
            return {"urls": urls, "pid": os.getpid()}, lambda: {}

        np.random.seed(0)
        serve(start)

"""A small bundle with random weights: enough for everything that serving does, made in a second."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import torch

from recray.bundles.build import build
from recray.bundles.bundle import Bundle
from recray.bundles.plan import Plan
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.manifest import Artefact, write_artefact
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.saved import catalogue_report, options_of, save_model

N_USERS, N_ITEMS = 80, 150


def small_dataset(folder: Path) -> Dataset:
    """Users u0.., items i0.. with a category and a price, and the weather of each interaction."""
    draw = np.random.default_rng(7)
    n = 2400
    log = pd.DataFrame(
        {
            "user": [f"u{row}" for row in draw.integers(0, N_USERS, n)],
            "item": [f"i{int(row)}" for row in N_ITEMS * draw.random(n) ** 2],
            "time": 1_600_000_000 + np.sort(draw.integers(0, 10**6, n)),
            "weather": draw.choice(["sun", "rain", "snow"], n),
        }
    )
    seen = log.drop_duplicates("item")["item"]
    items = pd.DataFrame(
        {
            "item": seen,
            "category": draw.choice(["book", "film", "song"], len(seen)),
            "price": draw.integers(1, 20, len(seen)),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    log.to_parquet(folder / "log.parquet")
    items.to_parquet(folder / "items.parquet")
    return prepare(
        folder / "log.parquet", items=folder / "items.parquet", context=("weather",), out=folder / "dataset"
    )


def checkpoint(out: Path, data: Dataset, model: str, **options: Any) -> Artefact:
    """An untrained model as training would leave it; closed forms are fitted."""
    torch.manual_seed(3)
    made = build_model(model, Catalogue(data.n_items, data.context_sizes), options)
    if not made.gradient:
        made.fit(data)

    def fill(folder: Path) -> dict[str, Any]:
        save_model(folder, made)
        return {"catalogue": catalogue_report(made.catalogue)}

    recipe = {"name": model, "model": model, "options": options_of(made)}
    return write_artefact(out, "checkpoint", fill, recipe=recipe, parents={"dataset": data.artefact})


def small_bundle(folder: Path, *, ranker: bool = True, retriever: str = "sasrec", **plan: Any) -> Bundle:
    """A bundle of a random SASRec (or a fitted model) and, if asked, a random NeuMF."""
    data = small_dataset(folder)
    sizes = {"dim": 16, "blocks": 1, "max_len": 20} if retriever == "sasrec" else {}
    first = checkpoint(folder / "retriever", data, retriever, **sizes)
    second = checkpoint(folder / "ranker", data, "neumf", dim=8) if ranker else None
    return build(folder / "bundle", first, second, data, Plan(**{"candidates": 40, **plan}))


def requests(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """All that a client may send, over many users and histories."""
    items = bundle.items.ids_of(range(len(bundle.items)))
    for n in range(0, N_USERS, 4):
        yield {"user": f"u{n}", "k": 1 + n}
        yield {"history": items[n : n + 1 + n % 30], "exclude": items[:5], "k": 7}
        yield {"user": f"u{n}", "filter": {"category": ["book", "song"]}, "context": {"weather": "rain"}}
    yield {}
    yield {"k": 1000}
    yield {"user": "nobody", "exclude": items[3:9], "filter": {"category": "film"}}
    yield {"history": ["nothing", "of", "ours"]}
    yield {"history": []}
    yield {"history": ["unknown", *items[:3]], "user": "u1", "context": {"weather": "hail"}}
    yield {"history": items[:3] * 40, "exclude": ["unknown"]}
    yield {"user": "u1", "filter": {"price": 999}}
    yield {"user": "u1", "filter": {"price": [3, 4], "category": "book"}, "k": 100}
    yield {"user": "u1", "exclude": items}
    for user in ("u1", "u2", "nobody"):
        yield {"user": user, "pin": [items[140], {"item": items[139], "place": 4}], "k": 6}
        yield {"user": user, "pin": [items[3], "unknown"], "exclude": items[:9], "k": 6}
        yield {"user": user, "caps": {"category": 2}, "k": 5}
        yield {"user": user, "caps": {"price": 1, "category": 4}, "k": 12, "filter": {"price": {"max": 15}}}
        yield {"user": user, "diversity": 0.4, "k": 8}
        yield {"user": user, "diversity": 1, "caps": {"category": 3}, "pin": [items[100]], "k": 8}


def recommended(url: str, asks: Sequence[dict[str, Any]], connections: int) -> list[httpx.Response]:
    """What a server answers to them all, asked at once over so many connections."""

    async def scene() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=connections)) as client:
            return await asyncio.gather(*(client.post(f"{url}/v1/recommend", json=ask) for ask in asks))

    return asyncio.run(scene())

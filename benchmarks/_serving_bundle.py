"""The work of the serving theme: a bundle of 50k items x 64, a SASRec-size encoder, 200 candidates for a
NeuMF or a DLRM, and the bodies that clients send. Weights are random: what is measured is time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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

ITEMS, DIM, LENGTH, USERS = 50_000, 64, 50, 4_000
CANDIDATES, K = 200, 10
PLAN = Plan(candidates=CANDIDATES, encoder_graph="onnx", ranker_graph="onnx")  # same order, half the time


def make_bundle(folder: Path, ranker: str = "neumf", items: int = ITEMS) -> Bundle:
    """The bundle in `folder`, made in about ten seconds."""
    data = _dataset(folder, items)
    retriever = _checkpoint(folder / "sasrec", data, "sasrec", dim=DIM, blocks=2, max_len=LENGTH)
    behind = _checkpoint(folder / ranker, data, ranker, max_len=LENGTH)
    return build(folder / "bundle", retriever, behind, data, PLAN)


def bodies(bundle: Bundle, n: int = 512) -> list[bytes]:
    """JSON bodies of POST /v1/recommend: half name a known user, half bring 5 to 50 items themselves."""
    draw = np.random.default_rng(1)
    made: list[dict[str, Any]] = []
    for number in range(n):
        if number % 2:
            rows = draw.integers(0, len(bundle.items), draw.integers(5, LENGTH + 1))
            made.append({"history": bundle.items.ids_of(rows), "k": K})
        else:
            made.append({"user": f"u{draw.integers(0, USERS)}", "k": K})
    return [json.dumps(body, separators=(",", ":")).encode() for body in made]


def _dataset(folder: Path, items: int) -> Dataset:
    """Every item once, and then by popularity; 5 to 75 interactions a user."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 76, USERS)
    n = int(lengths.sum())
    rows = (items * draw.random(n) ** 2).astype(np.int64)
    rows[: min(n, items)] = draw.permutation(items)[: min(n, items)]
    users = np.repeat(np.arange(USERS), lengths)
    order = draw.permutation(n)
    log = pd.DataFrame(
        {
            "user": [f"u{user}" for user in users],
            "item": [f"i{row}" for row in rows[order]],
            "time": 1_600_000_000 + np.arange(n),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    log.to_parquet(folder / "log.parquet")
    return prepare(folder / "log.parquet", split="none", out=folder / "dataset")


def _checkpoint(out: Path, data: Dataset, name: str, **options: Any) -> Artefact:
    """An untrained model as training would leave it."""
    torch.manual_seed(3)
    model = build_model(name, Catalogue.of(data), options)
    model.see(data)

    def fill(folder: Path) -> dict[str, Any]:
        save_model(folder, model)
        return {"catalogue": catalogue_report(model.catalogue)}

    recipe = {"name": name, "model": name, "options": options_of(model)}
    return write_artefact(out, "checkpoint", fill, recipe=recipe, parents={"dataset": data.artefact})

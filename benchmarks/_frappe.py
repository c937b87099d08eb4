"""Click prediction on frappe: DLRM and DCN-V2 by their recipes, AUC of the labelled test rows.

Each row of the log is who, which app, eight contexts, and whether it was used; the user is one more context,
and no history is read, as in the published tables (BARS, frappe_x1: the same 7:2:1 split). The train split is
the rebuilt one that the data folder's README tells of: its negatives were drawn anew. Settings were chosen on
the validation split.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from benchmarks._sets import frappe
from benchmarks.rows import Row, usable_cores
from recray.composing import measure
from recray.recipes import recipe
from recray.training.run import train

PUBLISHED = {"dlrm@frappe": 0.9840, "dcn@frappe": 0.9845}  # on the original train split
FLOOR, GOAL = 0.983, 0.9861
SEEDS = (0, 1, 2)


def frappe_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """AUC of each ranker on the test split; its log loss stands beside it."""
    data, seeds = frappe(scratch), SEEDS[:1] if quick else SEEDS
    for name, published in PUBLISHED.items():
        if only not in name:
            continue
        found, seconds = [], []
        for seed in seeds:
            started = time.perf_counter()
            chosen = recipe(name, [f"train.seed={seed}", *(["train.epochs=2"] if quick else [])])
            made = train(data, chosen, out=scratch / f"{name}-{seed}")
            seconds.append(time.perf_counter() - started)
            found.append(measure(made, data, "test").means)
        aucs = [means["auc"] for means in found]
        yield Row(
            name=name.partition("@")[0],
            work="frappe",
            metric="auc",
            value=fmean(aucs),
            unit="share",
            peer="published",
            peer_value=published,
            given={
                "recipe": name,
                "floor": FLOOR,
                "goal": GOAL,
                "each": [round(value, 5) for value in aucs],
                "logloss": round(fmean(means["logloss"] for means in found), 4),
                "train_seconds": round(fmean(seconds), 1),
                "threads": usable_cores(),
            },
            seeds=seeds,
            interval=(min(aucs), max(aucs)),
        )

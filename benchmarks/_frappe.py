"""Click prediction on frappe: DLRM and DCN-V2 by their recipes, AUC of the labelled test rows.

Each row of the log is who, which app, eight contexts, and whether it was used; the user is one more context,
and no history is read, as in the published tables (BARS, frappe_x1: the same 7:2:1 split). The train split is
the rebuilt one that the data folder's README tells of: its negatives were drawn anew. The epochs were chosen
on the validation split.
"""

from __future__ import annotations

import lzma
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from benchmarks.quality import DATA
from benchmarks.rows import Row, usable_cores
from recray.composing import measure
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.recipes import recipe
from recray.training.run import train

FIELDS = "user item daytime weekday isweekend homework cost weather country city".split()  # noqa: SIM905
FILES = {"train": "train.rebuilt", "valid": "validation", "test": "test"}
PUBLISHED = {"dlrm": 0.9840, "dcn": 0.9845}  # on the original train split
LABELS = (
    "options.loss=labels",
    "options.history=off",
    "options.dim=16",
    "options.hidden=256,256",
    "options.dropout=0.3",
    "options.unknown=0",
    "train.batch_size=2048",
    "train.lr=0.001",
    "train.epochs=10",
)
SETTINGS = {
    "dlrm": (*LABELS, "options.norm=false", "train.table_lr=0.01", "train.weight_decay=2"),
    "dcn": (*LABELS, "train.table_lr=0.005", "train.weight_decay=1"),
}
SEEDS = (0, 1, 2)


def frappe(scratch: Path, quick: bool) -> Iterator[Row]:
    """AUC of each ranker on the test split; its log loss stands beside it."""
    data, seeds = prepared(DATA / "frappe", scratch), SEEDS[:1] if quick else SEEDS
    for name, changes in SETTINGS.items():
        if quick:
            changes = (*changes, "train.epochs=2")
        found, seconds = [], []
        for seed in seeds:
            started = time.perf_counter()
            chosen = recipe(name, [*changes, f"train.seed={seed}"])
            made = train(data, chosen, out=scratch / f"{name}-{seed}")
            seconds.append(time.perf_counter() - started)
            found.append(measure(made, data, "test").means)
        aucs = [means["auc"] for means in found]
        yield Row(
            name=name,
            work="frappe",
            metric="auc",
            value=fmean(aucs),
            unit="share",
            peer="published",
            peer_value=PUBLISHED[name],
            given={
                "each": [round(value, 5) for value in aucs],
                "logloss": round(fmean(means["logloss"] for means in found), 4),
                "train_seconds": round(fmean(seconds), 1),
                "settings": " ".join(changes),
                "threads": usable_cores(),
            },
            seeds=seeds,
        )


def prepared(folder: Path, scratch: Path) -> Dataset:
    """The dataset of the three splits, rows of label 0 kept with weight 0."""
    for split, name in FILES.items():
        with lzma.open(folder / f"frappe.{name}.libfm.xz", "rt") as rows:
            with (scratch / f"{split}.csv").open("w") as made:
                made.write(",".join(["used", *FIELDS]) + "\n")
                for row in rows:
                    label, *features = row.split()
                    values = [feature.partition(":")[0] for feature in features]
                    made.write(",".join([str(int(float(label) > 0)), *values]) + "\n")
    return prepare(
        scratch / "train.csv",
        valid=scratch / "valid.csv",
        test=scratch / "test.csv",
        columns={"user": "user", "item": "item", "weight": "used"},
        context=[field for field in FIELDS if field != "item"],
        min_weight=0,
        split="none",
        out=scratch / "data",
    )

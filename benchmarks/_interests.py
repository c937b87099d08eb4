"""MIND beside its own one-interest version: the synthetic world, whose users have several, and Amazon Beauty.

Both have the same settings but for the number of interests; the interval is of the paired difference. The
world is taken twice: at the recipe's width, where one vector has room for the sum of a user's interests,
and at a quarter of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks._lines import full_ranking, mean_of
from benchmarks._sets import s3rec_beauty, there
from benchmarks.rows import Row, usable_cores
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.data.synthetic import WorldConfig, make, write_world
from recray.evaluation import Report
from recray.metrics.interval import paired
from recray.models.saved import load_model
from recray.recipes import recipe
from recray.training.run import train

METRICS = ("ndcg@10",)
WORLD = WorldConfig(n_users=6000, n_items=2000, mean_length=30)


def world(out: Path) -> Dataset:
    """Six thousand users of a small world."""
    write_world(make(WORLD), out)
    return prepare(out / "log.parquet", items=out / "items.parquet", out=out / "data")


WORKS: dict[str, tuple[Callable[[Path], Dataset], str, tuple[str, ...], int]] = {  # ..., recipe, seeds
    "synthetic world": (world, "mind", (), 3),
    "synthetic world, d = 16": (world, "mind", ("options.dim=16",), 3),
    "s3rec_beauty": (s3rec_beauty, "mind@s3rec_beauty", (), 1),
}


def interest_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """Several interests beside one."""
    for work, (prepared, name, width, seeds) in WORKS.items():
        if only not in work or (work == "s3rec_beauty" and (quick or not there(work))):
            continue
        place = scratch / work.replace(" ", "-")
        data = prepared(place / "data")
        several, one = (
            _reports(data, name, [*width, *changes], place, range(1 if quick else seeds), quick)
            for changes in ([], ["options.interests=1"])
        )
        means = [report.means["ndcg@10"] for report in several]
        ours, theirs = mean_of(several), mean_of(one)
        gained = paired(ours.values["ndcg@10"], theirs.values["ndcg@10"])
        interval = ours.interval("ndcg@10")
        yield Row(
            name="mind",
            work=work,
            metric="ndcg@10",
            value=fmean(means),
            unit="mean over users",
            peer="mind, one interest",
            peer_value=theirs.means["ndcg@10"],
            given={
                "recipe": name,
                "set": list(width),
                "gained": [round(value, 5) for value in (gained.mean, gained.low, gained.high)],
                "each": [round(value, 5) for value in means],
                "each_of_one": [round(report.means["ndcg@10"], 5) for report in one],
                "users": len(np.asarray(ours.user_rows)),
                "threads": usable_cores(),
            },
            seeds=tuple(range(len(several))),
            interval=(interval.low, interval.high),
        )


def _reports(
    data: Dataset, name: str, changes: list[str], scratch: Path, seeds: range, quick: bool
) -> list[Report]:
    measure, made = full_ranking(data, METRICS), []
    for seed in seeds:
        words = [*changes, f"train.seed={seed}", *(["train.epochs=2"] if quick else [])]
        out = scratch / f"{name}-{len(changes)}-{seed}"
        made.append(measure(load_model(train(data, recipe(name, words), out=out))))
    return made

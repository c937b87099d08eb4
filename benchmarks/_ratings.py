"""Ratings of MovieLens-100K: 80/20 of each user, drawn five times, beside Surprise's models on the same rows.

RMSE and MAE of the held-out ratings, means over the five; the interval is of that mean (Student's t).
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from numpy.typing import NDArray

from benchmarks._sets import DATA
from benchmarks.rows import Row, usable_cores
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.evaluation import evaluate_ratings, model_predict
from recray.models.ratings import PredictsRatings
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.training.run import train

REPEATS = 5
T_975 = 2.776  # of Student's t, four degrees of freedom
OURS = ("item-ratings", "user-ratings")
BAR = {"rmse": 0.95, "mae": 0.75}
Ratings = NDArray[np.float64]  # [n, 4]: user, item, rating, time


def ratings_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """RMSE and MAE of each model that predicts ratings, beside the best of Surprise's."""
    with lzma.open(DATA / "ml100k" / "u.data.xz", "rt") as file:
        log = np.loadtxt(file)
    found: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, list[float]] = {}
    repeats = 2 if quick else REPEATS
    for seed in range(repeats):
        known = drawn(log, seed)
        data = dataset(log, known, scratch / str(seed))
        sides: dict[str, Callable[[], tuple[float, float]]] = {
            name: partial(ours, name, data, scratch / f"{seed}-{name}") for name in OURS if only in name
        }
        sides |= surprise(log[known], log[~known])
        for name, ask in sides.items():
            started = time.perf_counter()
            found.setdefault(name, []).append(ask())
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    theirs = [name for name in found if name not in OURS]
    for place, metric in enumerate(("rmse", "mae")):
        means = {name: fmean(pair[place] for pair in pairs) for name, pairs in found.items()}
        first = min(theirs, key=lambda name: means[name], default=None)
        for name in (name for name in OURS if name in found):
            each = [pair[place] for pair in found[name]]
            wide = T_975 * stdev(each) / math.sqrt(len(each))
            yield Row(
                name=name,
                work="ml100k ratings",
                metric=metric,
                value=means[name],
                unit="stars",
                peer=first or "surprise",
                peer_value=None if first is None else means[first],
                given={
                    "recipe": name,
                    "bar": BAR[metric],
                    "each": [round(value, 4) for value in each],
                    "peers": {other: round(means[other], 4) for other in theirs},
                    "seconds": round(fmean(seconds[name]), 1),
                    "peer_seconds": {other: round(fmean(seconds[other]), 1) for other in theirs},
                    "threads": usable_cores(),
                },
                seeds=tuple(range(repeats)),
                interval=(means[name] - wide, means[name] + wide),
            )


def drawn(log: Ratings, seed: int) -> NDArray[np.bool_]:
    """bool[n]: the four fifths of each user's ratings that are train, drawn with a seed."""
    rng = np.random.default_rng(seed)
    order = np.lexsort((rng.random(len(log)), log[:, 0]))
    users = log[order, 0]
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    sizes = np.diff(np.r_[starts, len(log)])
    place = np.arange(len(log)) - np.repeat(starts, sizes)
    known = np.zeros(len(log), dtype=bool)
    known[order] = place < np.repeat(np.round(0.8 * sizes), sizes)
    return known


def dataset(log: Ratings, known: NDArray[np.bool_], scratch: Path) -> Dataset:
    """Both parts as a dataset whose test split is the held-out fifth."""
    scratch.mkdir(parents=True)
    files = {"train": scratch / "train.tsv", "test": scratch / "test.tsv"}
    for file, part in zip(files.values(), (log[known], log[~known])):
        np.savetxt(file, part, fmt="%d", delimiter="\t")
    columns = {"user": "0", "item": "1", "weight": "2", "time": "3"}
    return prepare(files["train"], test=files["test"], columns=columns, split="none", out=scratch / "data")


def ours(name: str, data: Dataset, out: Path) -> tuple[float, float]:
    """(RMSE, MAE) of a recipe."""
    model = load_model(train(data, recipe(name), out=out))
    assert isinstance(model, PredictsRatings)
    means = evaluate_ratings(model_predict(model), data.cases("test")).means
    return means["rmse"], means["mae"]


def surprise(known: Ratings, held: Ratings) -> dict[str, Callable[[], tuple[float, float]]]:
    """Surprise's models at their defaults on the same rows; none where it is not installed."""
    try:
        import pandas as pd
        from surprise import SVD, Dataset, KNNBaseline, Reader, SVDpp, accuracy
    except ImportError:
        say("scikit-surprise is not installed: no rows of its models")
        return {}
    columns = ["user", "item", "rating"]
    table = pd.DataFrame(known[:, :3], columns=columns)
    rows = Dataset.load_from_df(table, Reader(rating_scale=(1, 5))).build_full_trainset()
    asked = [tuple(row) for row in held[:, :3]]

    def fitted(model: object) -> tuple[float, float]:
        said = model.fit(rows).test(asked)  # type: ignore[attr-defined]
        return accuracy.rmse(said, verbose=False), accuracy.mae(said, verbose=False)

    return {
        "surprise-svd": lambda: fitted(SVD(random_state=0)),
        "surprise-svd++": lambda: fitted(SVDpp(random_state=0)),
        "surprise-knn-baseline": lambda: fitted(KNNBaseline(verbose=False)),
    }

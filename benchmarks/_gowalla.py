"""Full ranking on Gowalla, the split of LightGCN: Recall@20 and NDCG@20 of models in closed form.

The definitions are those of its code, and of metrics/ranking.py: recall is hits by the number of a user's
test items; the ideal list of NDCG has min(20, test items) hits, discounted by log2; the mean is over users
with test items; the items of train are left out of the lists.

Settings were chosen on a validation split cut from train: a fifth of each user's items, recall of 2,000 users
or more. There item-knn had .1706 with a = .5 and .2006 with a = .7 (100 neighbours: -.003, 500: +.005);
spectral with 512 dims .2111 without sharpening, .2125 with .5 (both 200 neighbours), .2147 with 500, where
GF-CF itself had .2077; ease .3281, .3409, .3403 with reg 30, 100, 300 (the 6,000 most popular items alone).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality import DATA, rows, trained
from benchmarks.rows import Row, usable_cores
from recray.data.dataset import Cases, Dataset
from recray.data.prepare import prepare
from recray.evaluation import Report, TopK, evaluate, model_top_k
from recray.progress import say

WORK = "lightgcn_gowalla"
METRICS = ("recall@20", "ndcg@20")
SETTINGS: dict[str, tuple[str, ...]] = {
    "popularity": (),
    "item-knn": (
        "options.weighting=unit",
        "options.alpha=0.7",
        "options.shrink=0",
        "options.neighbours=500",
    ),
    "user-knn": ("options.neighbours=200",),
    "spectral": ("options.dim=512",),
    "ease": ("options.reg=100",),
}
FLOORS = {"item-knn": (0.1570, 0.1214), "spectral": (0.1849, 0.1518), "ease": (0.1765, 0.1467)}
SLOW = {"spectral", "ease"}  # minutes: not in --quick


def lightgcn_gowalla(scratch: Path, quick: bool) -> Iterator[Row]:
    """Recall@20 and NDCG@20 of every model in closed form, item neighbours beside implicit's."""
    data = gowalla(scratch / "data")
    cases = data.cases("test")
    for name, changes in SETTINGS.items():
        if quick and name in SLOW:
            continue
        model, seconds = trained(data, name, changes, scratch)
        report = evaluate(model_top_k(model), cases, ks=(20,))
        floor = dict(zip(METRICS, FLOORS.get(name, ())))
        yield from rows(name, WORK, report, seconds, changes, floor, metrics=METRICS)
        del model
    yield from beside_implicit(data, cases)


def gowalla(out: Path) -> Dataset:
    """The split as it is shipped: a user's items a line."""
    folder = DATA / WORK
    return prepare(folder / "train.sorted.txt.xz", test=folder / "test.txt.xz", split="none", out=out)


def beside_implicit(data: Dataset, cases: Cases) -> Iterator[Row]:
    """implicit's cosine neighbours, 500 an item, as rows of their own; none where it is not installed."""
    try:
        from implicit.nearest_neighbours import CosineRecommender
    except ImportError:
        say("implicit is not installed: no row of its neighbours")
        return
    taken = data.histories("train").to_csr(data.n_items)
    peer = CosineRecommender(K=500, num_threads=usable_cores())
    peer.fit(taken, show_progress=False)
    report: Report = evaluate(_lists(peer, taken), cases, ks=(20,))
    for metric in METRICS:
        mean = report.interval(metric)
        yield Row(
            name="implicit's cosine neighbours", work=WORK, metric=metric, value=mean.mean,
            unit="mean over users", given={"users": len(report.user_rows), "neighbours": 500},
            interval=(mean.low, mean.high),
        )  # fmt: skip


def _lists(peer: object, taken: object) -> TopK:
    def top_k(cases: Cases, k: int) -> NDArray[np.int64]:
        asked = taken[cases.user_rows]  # type: ignore[index]
        found, scores = peer.recommend(cases.user_rows, asked, N=k, filter_already_liked_items=True)  # type: ignore[attr-defined]
        return np.where(scores > 0, found, -1).astype(np.int64)

    return top_k

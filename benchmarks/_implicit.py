"""implicit's models as peers: fitted on the same train split, asked for the same lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._lines import measured
from benchmarks.rows import usable_cores
from recray.data.dataset import Cases, Dataset
from recray.evaluation import TopK
from recray.progress import say


def peers(data: Dataset, metrics: Sequence[str], *, dim: int = 64) -> dict[str, list[float]]:
    """Means on the test split of its cosine neighbours, BPR and ALS; none where it is not installed.

    Fitted on train. Lists leave out all that is known at test time, as ours do; neighbours and, where a
    validation split adds to it, ALS take that for the user's history. Its defaults, but for the width, 500
    neighbours, and an epoch count that BPR needs (100, which it takes).
    """
    try:
        from implicit.als import AlternatingLeastSquares
        from implicit.bpr import BayesianPersonalizedRanking
        from implicit.nearest_neighbours import CosineRecommender
        from threadpoolctl import threadpool_limits
    except ImportError:
        say("implicit is not installed: no row of its models")
        return {}
    taken = data.histories("train").to_csr(data.n_items)
    taken.data[:] = 1
    cores = usable_cores()
    models: Mapping[str, Any] = {
        "implicit-cosine": CosineRecommender(K=500, num_threads=cores),
        "implicit-bpr": BayesianPersonalizedRanking(factors=dim, num_threads=cores, random_state=0),
        "implicit-als": AlternatingLeastSquares(factors=dim, num_threads=cores, random_state=0),
    }
    found = {}
    with threadpool_limits(1, "blas"):
        for name, model in models.items():
            model.fit(taken, show_progress=False)
            fold = name == "implicit-als" and data.has_split("valid")
            found[name] = measured(data, lists(model, data.n_items, fold), metrics)
            say(f"{name}: " + ", ".join(f"{m} {v:.4f}" for m, v in zip(metrics, found[name])))
    return found


def lists(model: Any, n_items: int, fold: bool = False) -> TopK:
    """The peer's own lists, what is known left out; `fold`: each user's vector is solved anew from that."""

    def top_k(cases: Cases, k: int) -> NDArray[np.int64]:
        known = cases.histories.to_csr(n_items)
        known.data[:] = 1
        found, scores = model.recommend(
            cases.user_rows, known, N=k, filter_already_liked_items=True, recalculate_user=fold
        )
        return np.where(np.isfinite(scores) & (scores > -1e30), found, -1).astype(np.int64)

    return top_k

"""recray: from an interaction log to a recommender that answers inside a latency budget.

The path of data, which is also the listing of this package (a test walks it):

    interactions   data/interactions.py    a log of (user, item, time, weight), columnar, validated
    ids            data/ids.py             external id <-> dense row; append-only
    dataset        data/dataset.py         ids + interactions + features + splits, one artefact
    sequences      data/sequences.py       one history per user, cut and shifted
    feed           data/feed.py            large logs in mapped files; batches made ahead
    batches        data/batches.py         arrays of rows, negatives, one seed per (epoch, shard)
    model          models/                 plain nn.Module, or plain sparse algebra, one process
    training       training/               the same model with its tables sharded       -> ray.train
    checkpoint     training/checkpoint.py  row ranges + position; read by any number of ranks
    compression    compression/            encode tables, quantize and export graphs
    index          retrieval/              item vectors -> k candidates
    feedback       feedback/               events and impressions, kept, logged and joined
    bundle         bundles/                ids + weights + tables + index + ranker + manifest
    response       recommender.py          history -> retrieve -> filter -> rank -> answer, no Ray
    search         tuning/                 trials under a latency and a size budget     -> ray.tune
    serve graph    serving/                Ingress -> Retriever -> Ranker, autoscaled   -> ray.serve

The verbs live in `recray.api` and are re-exported here, imported at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "build",
    "bundle",
    "compress",
    "demo",
    "evaluate",
    "plan",
    "prepare",
    "recommend",
    "refit",
    "rollback",
    "serve",
    "ship",
    "show",
    "train",
    "tune",
    "why",
]

if TYPE_CHECKING:
    from recray.api import (
        bundle,
        compress,
        demo,
        evaluate,
        plan,
        prepare,
        recommend,
        refit,
        rollback,
        serve,
        ship,
        show,
        train,
        tune,
        why,
    )
    from recray.domains import build


def __getattr__(name: str) -> Any:
    if name in __all__:
        from recray import api, domains

        return getattr(domains if name == "build" else api, name)
    raise AttributeError(f"module 'recray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

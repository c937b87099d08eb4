"""Sequences, leave-one-out, full ranking: Amazon Beauty (S3-Rec's) and MovieLens-1M, beside RecTools.

Its run is the one that `benchmarks._sasrec` keeps; its best epoch on the test split stands here, which is
kinder to it than our early stopping on the validation split is to us.

Settings were chosen on the validation split. Beauty, NDCG@10 of all its users: sasrec with 64 dims and
dropout .2 .0700, .4 .0707; with 128 dims and .5 .0711, which takes three times as long; esasrec with 1,024
negatives and dropout .4 .0656.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks._lines import METRICS_10 as METRICS
from benchmarks._lines import Line, line_rows
from benchmarks._sasrec import kept_run
from benchmarks._sets import ml1m, s3rec_beauty
from benchmarks.rows import Row

BEAUTY_PUBLISHED = {
    "published: SASRec, sampled softmax": (0.0921, 0.0531),
    "published: eSASRec": (0.0928, 0.0523),
}
ML1M_PUBLISHED = {"published: eSASRec": (0.3133, 0.1772), "published: HSTU": (0.3294, 0.1893)}
RECTOOLS = "rectools"
BEAUTY = (
    Line(recipe="popularity"),
    Line(recipe="item-knn"),
    Line(
        recipe="sasrec@s3rec_beauty",
        floor=(0.0850, 0.0480),
        goal=(0.095, 0.0545),
        peers={RECTOOLS: (), **BEAUTY_PUBLISHED},
        seeds=3,
        slow=True,
    ),
    Line(recipe="esasrec@s3rec_beauty", slow=True),
)
ML1M = (
    Line(recipe="popularity"),
    Line(recipe="item-knn"),
    Line(
        recipe="sasrec@ml1m",
        floor=(0.300, 0.170),
        goal=(0.330, 0.190),
        peers={**ML1M_PUBLISHED, RECTOOLS: ()},
        slow=True,
    ),
)


def beauty_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """Short histories: 7 items a user."""
    data = s3rec_beauty(scratch / "data")
    yield from line_rows("s3rec_beauty", data, _known(BEAUTY, "s3rec_beauty", only), METRICS, quick=quick)


def ml1m_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """Long histories: 166 items a user."""
    data = ml1m(scratch / "data")
    yield from line_rows("ml1m", data, _known(ML1M, "ml1m", only), METRICS, quick=quick)


def _known(lines: Sequence[Line], work: str, only: str) -> list[Line]:
    """The lines that are asked for, with the peer's kept run in its place."""
    kept, made = kept_run(work), []
    best = max(kept["epochs"], key=lambda epoch: epoch["ndcg@10"]) if kept else None
    for line in lines:
        if only in line.recipe:
            beside = dict(line.peers)
            if RECTOOLS in beside:
                beside[RECTOOLS] = [best[metric] for metric in METRICS] if best else ()
            made.append(replace(line, peers={name: values for name, values in beside.items() if values}))
    return made

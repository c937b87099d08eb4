"""Every recipe as it comes on MovieLens-100K, and two of them together: leave-one-out, full ranking."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks._lines import METRICS_10, Line, line_rows
from benchmarks._sets import ml100k
from benchmarks.rows import Row
from recray.recipes import RECIPES

LABELS_ONLY = ("content",)  # needs what this log does not have
LINES = tuple(Line(recipe=name) for name in RECIPES if name not in LABELS_ONLY)


def shelf_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """HR@10 and NDCG@10 of each."""
    data = ml100k(scratch / "data")
    lines = [line for line in LINES if only in line.recipe]
    yield from line_rows("ml100k", data, lines, METRICS_10, quick=quick)

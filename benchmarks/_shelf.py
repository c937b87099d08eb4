"""Every recipe as it comes on MovieLens-100K, and two of them together: leave-one-out, full ranking.

Beside them stand RecBole's models from their kept run (`_recbole`) and, fitted in this run, implicit's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks._implicit import peers
from benchmarks._lines import METRICS_10, Line, line_rows
from benchmarks._recbole import KEPT, kept_peers
from benchmarks._sets import ml100k
from benchmarks.rows import Row
from recray.data.dataset import Dataset
from recray.recipes import RECIPES

LABELS_ONLY = ("content",)  # needs what this log does not have
LINES = tuple(Line(recipe=name) for name in RECIPES if name not in LABELS_ONLY)
IMPLICIT = {"item-knn": "implicit-cosine", "ials": "implicit-als", "bpr": "implicit-bpr"}


def shelf_rows(scratch: Path, quick: bool, only: str = "", kept: Path = KEPT) -> Iterator[Row]:
    """HR@10 and NDCG@10 of each; `kept` holds RecBole's figures. --quick has no peers."""
    data = ml100k(scratch / "data")
    lines = [line for line in LINES if only in line.recipe]
    if not quick:
        lines = beside(data, lines, kept)
    yield from line_rows("ml100k", data, lines, METRICS_10, quick=quick)


def beside(data: Dataset, lines: Sequence[Line], kept: Path) -> list[Line]:
    """The lines with their peers' figures, implicit's first."""
    recbole = kept_peers(METRICS_10, kept)
    wanted = any(line.recipe in IMPLICIT for line in lines)
    implicit = peers(data, METRICS_10) if wanted else {}
    made = []
    for line in lines:
        name = IMPLICIT.get(line.recipe, "")
        figures = {name: implicit[name]} if name in implicit else {}
        made.append(replace(line, peers={**figures, **recbole.get(line.recipe, {})}))
    return made

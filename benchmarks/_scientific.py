"""Content alone on Amazon Scientific: leave-one-out, full ranking, beside popularity on the same users.

Settings were chosen on the validation split (recall@10): 256, 512, 1,024 dims .1061, .1129, .1207; decay 1,
.8, .7, .5 with 256 dims .082, .097, .100, .098 while pairs of neighbouring words counted as words, too, which
cost .007.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks._lines import Line, line_rows
from benchmarks._sets import scientific_text
from benchmarks.rows import Row

METRICS = ("recall@10", "ndcg@10")
UNISREC = {  # recalled figures of UniSRec, KDD 2022, on another version of the log
    "recalled: SASRec": (0.1080, 0.0553),
    "recalled: UniSRec, text": (0.1188, 0.0641),
}
LINES = (Line(recipe="popularity"), Line(recipe="content@scientific_text", peers=UNISREC))


def scientific_rows(scratch: Path, quick: bool, only: str = "") -> Iterator[Row]:
    """Items that are like those of the history."""
    data = scientific_text(scratch)
    lines = [line for line in LINES if only in line.recipe]
    yield from line_rows("scientific_text", data, lines, METRICS, quick=quick)

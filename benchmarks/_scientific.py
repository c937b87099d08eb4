"""Content alone on Amazon Scientific: leave-one-out, full ranking, beside popularity on the same users.

Settings were chosen on the validation split (recall@10): 256, 512, 1,024 dims .1061, .1129, .1207; decay 1,
.8, .7, .5 with 256 dims .082, .097, .100, .098 while pairs of neighbouring words counted as words, too, which
cost .007.
"""

from __future__ import annotations

import csv
import lzma
from collections.abc import Iterator
from pathlib import Path

from benchmarks.quality import DATA, rows, trained
from benchmarks.rows import Row
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.evaluation import evaluate, model_top_k

WORK = "scientific_text"
METRICS = ("recall@10", "ndcg@10")
CONTENT = ("options.dim=512", "options.decay=0.6")


def scientific_text(scratch: Path, quick: bool) -> Iterator[Row]:
    """Recall@10 and NDCG@10 of content and of popularity."""
    data = scientific(scratch)
    for name, changes in (("popularity", ()), ("content", CONTENT)):
        model, seconds = trained(data, name, changes, scratch)
        report = evaluate(model_top_k(model), data.cases("test"), ks=(10,))
        yield from rows(name, WORK, report, seconds, changes, {}, metrics=METRICS)


def scientific(scratch: Path) -> Dataset:
    """Each user's sequence, the test item at its end, and the items' text."""
    folder = DATA / WORK
    log, items = scratch / "sequences.txt", scratch / "items.tsv"
    with lzma.open(folder / "Scientific.test.inter.xz", "rt") as lines, log.open("w") as out:
        next(lines)
        for line in lines:
            user, known, last = line.rstrip("\n").split("\t")
            print(user, known, last, file=out)
    with lzma.open(folder / "Scientific.item2index.xz", "rt") as lines:
        index = dict(line.split() for line in lines)
    with lzma.open(folder / "Scientific.text.xz", "rt") as lines, items.open("w") as out:
        next(lines)
        writer = csv.writer(out, delimiter="\t")
        writer.writerow(("item_id", "text"))
        for line in lines:
            name, _, text = line.rstrip("\n").partition("\t")
            if name in index:
                writer.writerow((index[name], text))
    return prepare(log, items=items, out=scratch / "data")

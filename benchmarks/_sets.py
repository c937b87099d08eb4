"""The real sets as datasets, each by the protocol that its published figures are told for.

A set lies in ../shared/data or $RECRAY_DATA; `there` says whether it does.
"""

from __future__ import annotations

import csv
import lzma
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.progress import say

DATA = Path(os.environ.get("RECRAY_DATA", Path(__file__).parents[2] / "shared" / "data"))


def there(name: str) -> bool:
    """Whether the set's folder is there; where it is not, a line says what to do."""
    found = (DATA / name).is_dir()
    if not found:
        say(f"{name}: no folder {DATA / name}; set RECRAY_DATA")
    return found


def ml100k(out: Path) -> Dataset:
    """MovieLens-100K: every rating is an interaction, at its time; leave-one-out."""
    columns = {"user": "0", "item": "1", "weight": "2", "time": "3"}
    return prepare(DATA / "ml100k" / "u.data.xz", columns=columns, out=out)


def ml1m(out: Path) -> Dataset:
    """MovieLens-1M: every rating is an interaction, in the user's order; leave-one-out."""
    columns = {"user": "user", "item": "movie", "time": "pos"}
    return prepare(DATA / "ml1m" / "ratings.tsv.xz", columns=columns, out=out)


def s3rec_beauty(out: Path) -> Dataset:
    """Amazon Beauty as S3-Rec ships it: the sequences as they are; leave-one-out."""
    return prepare(DATA / "s3rec_beauty" / "Beauty.txt.xz", out=out)


def ml1m_ncf(out: Path) -> Dataset:
    """MovieLens-1M as NCF splits it: no order, one held-out item a user."""
    folder = DATA / "ml1m_ncf"
    return prepare(
        folder / "ml-1m.train.rating.notime.tsv.xz",
        test=folder / "ml-1m.test.rating.xz",
        columns={"user": "0", "item": "1", "weight": "2"},
        split="none",
        out=out,
    )


def ml1m_ncf_negatives(data: Dataset) -> NDArray[np.int64]:
    """int64[U, 99] item rows; the file has '(user,item)' and 99 items a line."""
    made = np.full((data.n_users, 99), -1, dtype=np.int64)
    with lzma.open(DATA / "ml1m_ncf" / "ml-1m.test.negative.xz", "rt") as lines:
        for line in lines:
            pair, *items = line.split()
            (user,) = data.users.rows_of([pair.strip("()").partition(",")[0]])
            made[user] = data.items.rows_of(items)
    return made


def lightgcn_gowalla(out: Path) -> Dataset:
    """Gowalla as LightGCN splits it: a user's items a line, in no order."""
    folder = DATA / "lightgcn_gowalla"
    return prepare(folder / "train.sorted.txt.xz", test=folder / "test.txt.xz", split="none", out=out)


def scientific_text(out: Path) -> Dataset:
    """Amazon Scientific as UniSRec ships it: sequences, the test item last, and the items' text."""
    folder = DATA / "scientific_text"
    out.mkdir(parents=True, exist_ok=True)
    log, items = out / "sequences.txt", out / "items.tsv"
    with lzma.open(folder / "Scientific.test.inter.xz", "rt") as lines, log.open("w") as made:
        next(lines)
        for line in lines:
            user, known, last = line.rstrip("\n").split("\t")
            print(user, known, last, file=made)
    with lzma.open(folder / "Scientific.item2index.xz", "rt") as lines:
        index = dict(line.split() for line in lines)
    with lzma.open(folder / "Scientific.text.xz", "rt") as lines, items.open("w") as made:
        next(lines)
        writer = csv.writer(made, delimiter="\t")
        writer.writerow(("item_id", "text"))
        for line in lines:
            name, _, text = line.rstrip("\n").partition("\t")
            if name in index:
                writer.writerow((index[name], text))
    return prepare(log, items=items, out=out / "data")


FRAPPE = "user item daytime weekday isweekend homework cost weather country city".split()  # noqa: SIM905
_FRAPPE_FILES = {"train": "train.rebuilt", "valid": "validation", "test": "test"}


def frappe(out: Path) -> Dataset:
    """App usage, labelled, 7:2:1; what was not used has weight 0, and the user is one more context."""
    out.mkdir(parents=True, exist_ok=True)
    for split, name in _FRAPPE_FILES.items():
        with lzma.open(DATA / "frappe" / f"frappe.{name}.libfm.xz", "rt") as rows:
            with (out / f"{split}.csv").open("w") as made:
                made.write(",".join(["used", *FRAPPE]) + "\n")
                for row in rows:
                    label, *features = row.split()
                    values = [feature.partition(":")[0] for feature in features]
                    made.write(",".join([str(int(float(label) > 0)), *values]) + "\n")
    return prepare(
        out / "train.csv",
        valid=out / "valid.csv",
        test=out / "test.csv",
        columns={"user": "user", "item": "item", "weight": "used"},
        context=[field for field in FRAPPE if field != "item"],
        min_weight=0,
        split="none",
        out=out / "data",
    )

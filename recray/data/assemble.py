"""Writing the dataset artefact: ids, part files, features, links, and the report of what was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recray import columns as col
from recray.data import features as feats
from recray.data.dataset import Dataset
from recray.data.encode import Vocabulary
from recray.data.request import Request, Tally
from recray.manifest import write_artefact
from recray.progress import bar, say


@dataclass(frozen=True)
class Written:
    """One part: its number, its users [first, last), the bytes and rows of its files by split, and how
    many rows of it repeat an earlier one."""

    part: int
    first: int
    last: int
    files: Mapping[str, tuple[bytes, int]]
    repeated: int


def write(out: Any, request: Request, ids: Vocabulary, tally: Tally, written: Iterable[Written]) -> Dataset:
    """Write the artefact: ids with those of the feature files after them, parts, features, links."""
    options, users, items = request.options, ids.users, ids.items
    about: dict[str, Any] = {}
    tables: dict[str, feats.Features] = {}
    if options.items is not None:
        tables["items"] = feats.read_features(options.items, col.ITEM, items)
        items = items.extend(tables["items"].ids)
    if options.users is not None:
        tables["users"] = feats.read_features(options.users, col.USER, users)
        users = users.extend(tables["users"].ids)
    pairs = None
    if options.links is not None:
        pairs = feats.read_links(options.links, users)
        users = users.extend(pa.chunked_array(list(pairs)))

    def fill(folder: Path) -> dict[str, Any]:
        users.save(folder / "ids" / "users.parquet")
        items.save(folder / "ids" / "items.parquet")
        in_parts = fill_parts(folder, written)
        for name, table in tables.items():
            made = feats.aligned(table, items if name == "items" else users)
            pq.write_table(made, folder / f"{name}.parquet", compression="zstd")
            about[f"{name}_file"] = {"rows": len(table.ids), "skipped": table.skipped}
        if pairs is not None:
            rows = feats.link_rows(users, *pairs)
            table = pa.table({"user_row": rows[:, 0], "other_row": rows[:, 1]})
            pq.write_table(table, folder / "links.parquet", compression="zstd")
            about["links"] = len(rows)
        if ids.context:
            (folder / "context.json").write_text(json.dumps(ids.context, ensure_ascii=False))
        return {
            "rows_read": tally.rows,
            "dropped": dropped(tally),
            "valid_rows": tally.rows - sum(p.count for p in tally.problems.values()),
            "duplicates_dropped": request.plan.dedupe,
            "users": len(users),
            "items": len(items),
            "users_in_log": len(ids.users),
            "items_in_log": len(ids.items),
            "has_times": request.has_times,
            "events": list(ids.events),
            **in_parts,
            **about,
        }

    artefact = write_artefact(out, "dataset", fill, recipe=request.recipe)
    dataset = Dataset(artefact)
    for line in describe(dataset.report):
        say(line)
    return dataset


def dropped(tally: Tally) -> dict[str, Any]:
    """What the report says of the rows that were left out, by reason."""
    return {
        reason: {"count": p.count, "file": p.file, "line": p.place(), "example": p.example}
        for reason, p in tally.problems.items()
    }


def fill_parts(folder: Path, written: Iterable[Written]) -> dict[str, Any]:
    """Write the part files as they come; returns what the report says of them."""
    listed: dict[str, list[tuple[int, str, int, int]]] = {name: [] for name in col.SPLITS}
    counts = dict.fromkeys(col.SPLITS, 0)
    repeated = 0
    with bar("writing", unit="row") as progress:
        for made in written:
            repeated += made.repeated
            for split, (data, rows) in made.files.items():
                name = f"interactions/{split}/part-{made.part:05d}.parquet"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
                listed[split].append((made.part, name, made.first, made.last))
                counts[split] += rows
                progress.update(rows)
    return {
        "interactions": counts,
        "parts": {split: [list(entry[1:]) for entry in sorted(found)] for split, found in listed.items()},
        "duplicates": repeated,
    }


def describe(report: Mapping[str, Any]) -> list[str]:
    """Lines for a person: what was read, left out and why, and what there is now."""
    lines = [
        f"{report['rows_read']:,} rows read, {report['valid_rows']:,} valid: "
        f"{report['users_in_log']:,} users, {report['items_in_log']:,} items"
    ]
    for reason, found in report["dropped"].items():
        where = f"{os.path.basename(found['file'])}:{found['line']}"
        lines.append(f"  left out {found['count']:,}: {reason} (first at {where}: {found['example']})")
    if report["duplicates"]:
        what = "dropped" if report["duplicates_dropped"] else "kept; --dedupe drops them"
        same = "user, item and time" if report["has_times"] else "user and item"
        lines.append(f"  {report['duplicates']:,} duplicates (same {same}), {what}")
    for name in ("items", "users"):
        if found := report.get(f"{name}_file"):
            lines.append(f"  {name} file: {found['rows']:,} rows, {found['skipped']:,} left out")
    lines.append("  " + ", ".join(f"{name} {n:,}" for name, n in report["interactions"].items() if n))
    return lines

"""A dataset and newer logs -> a dataset that holds both. Ids keep their rows, and new ones come after.

So a model that was trained on the old one can go on with the new one. The split is made anew, by the
parent's method; what was given as valid or test stays so, and what is new is then trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recray import columns as col
from recray.data import parts
from recray.data.assemble import describe, dropped, fill_parts
from recray.data.dataset import Dataset
from recray.data.encode import Vocabulary, Words, rows_of, together, vocabulary, words_of
from recray.data.interactions import Interactions, read_blocks
from recray.data.prepare import parts_of
from recray.data.request import Options, Tally, inspect
from recray.errors import InputError
from recray.manifest import write_artefact
from recray.progress import say

ADDED = "added.parquet"  # of a dataset without times: the rows that were added to it, with the times they had


def extend(parent: Dataset, logs: Any, *, out: Any) -> Dataset:
    """Leave `parent` with the interactions of `logs`, which have times, at `out`.

    A row that the parent holds already (user, item and second) is not added; where the parent has no
    times, one that was added before is not. Context that the logs do not have is
    unknown, and so are features of new users and items. Raises InputError as `prepare`, and where nothing
    is new.
    """
    recipe, known = parent.artefact.manifest.recipe, parent.report
    words, more, tally, inputs = _read(parent, logs, recipe)
    old, codes = _old(parent)
    timed = _timed(parent, old)
    new = _new(timed, more)
    log, fresh = _both(old, more.take(new)), int(np.count_nonzero(new))
    if fresh == 0:
        raise InputError("hold nothing that the dataset does not know", where="the new logs")
    given = recipe.get("split") == "given"
    codes = np.concatenate([codes, np.zeros(len(log) - len(codes), np.int8)])
    plan = parts.Plan("none" if given else recipe.get("split", "none"), bool(recipe.get("dedupe")), given)
    if log.event_names:
        log = replace(log, event_names=words.events)

    def fill(folder: Path) -> dict[str, Any]:
        words.users.save(folder / "ids" / "users.parquet")
        words.items.save(folder / "ids" / "items.parquet")
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            made = parts_of(pool, log, codes if given else None, plan, len(words.users))
            in_parts = fill_parts(folder, made)
        _features(folder, parent, len(words.users), len(words.items))
        if not old.has_times:
            _write_added(folder, timed, more.take(new))
        return {
            **{key: known[key] for key in ("items_file", "users_file", "links") if key in known},
            "rows_read": known["rows_read"] + tally.rows,
            "dropped": dropped(tally),
            "valid_rows": len(log),
            "duplicates_dropped": plan.dedupe,
            "users": len(words.users),
            "items": len(words.items),
            "users_in_log": len(np.unique(log.user_rows)),
            "items_in_log": len(np.unique(log.item_rows)),
            "has_times": log.has_times,
            "events": list(log.event_names),
            "added": fresh,
            **in_parts,
        }

    made = {**recipe, "extended": inputs}
    dataset = Dataset(write_artefact(out, "dataset", fill, parents={"dataset": parent.artefact}, recipe=made))
    say(f"{fresh:,} rows added to {len(old):,}")
    for line in describe(dataset.report):
        say(line)
    return dataset


def _read(
    parent: Dataset, logs: Any, recipe: Mapping[str, Any]
) -> tuple[Vocabulary, Interactions, Tally, Any]:
    """(all words, the parent's first; the new rows; what was dropped; the logs' fingerprints)."""
    options = Options(
        event_weights=recipe.get("event_weights", {}), min_weight=recipe.get("min_weight"), split="none"
    )
    request = inspect(logs, options)
    where = request.groups["train"][0].place
    if not request.has_times:
        raise InputError("has no time column", where=where)
    blocks = [block for span in request.spans["train"] for block in read_blocks(span, request.rules)]
    tally = Tally()
    for block in blocks:
        tally.count(block.rows, block.problems)
    tally.check(sum(len(block) for block in blocks), where)
    words, maps = vocabulary([_words_of(parent), *map(words_of, blocks)], request)
    more = together([rows_of(b, m, request, words.events) for b, m in zip(blocks, maps[1:])])
    return words, more, tally, request.recipe["inputs"]


def _words_of(parent: Dataset) -> Words:
    """The parent's ids, as if a first block had them."""
    made = {col.USER: parent.users.values.cast(pa.string()), col.ITEM: parent.items.values.cast(pa.string())}
    events = list(parent.report.get("events", ()))
    return made | ({col.EVENT: pa.array(events, pa.string())} if events else {})


def _old(parent: Dataset) -> tuple[Interactions, NDArray[np.int8]]:
    """All that the parent holds, user by user in the order of time; and the split of each."""
    logs = [parent.interactions(split) for split in col.SPLITS]
    sizes = [len(log) for log in logs]
    return together(logs), np.repeat(np.arange(3, dtype=np.int8), sizes)


_Timed = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]  # users, times, items, a row each


def _timed(parent: Dataset, old: Interactions) -> _Timed:
    """All that the parent holds and whose time is known."""
    if old.has_times:
        return old.user_rows, old.times, old.item_rows
    if ADDED not in parent.artefact.manifest.files:
        return np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int32)
    table = pq.read_table(pa.BufferReader(parent.artefact.file(ADDED).read_bytes()))
    users, times, items = (table[name].to_numpy() for name in (col.USER, col.TIME, col.ITEM))
    return users, times, items


def _write_added(folder: Path, timed: _Timed, more: Interactions) -> None:
    """Keep what was added, by the rows that ids keep, so that it is known the next time."""
    pairs = zip((col.USER, col.TIME, col.ITEM), timed, (more.user_rows, more.times, more.item_rows))
    table = pa.table({name: np.concatenate([before, now]) for name, before, now in pairs})
    pq.write_table(table, folder / ADDED, compression="zstd")


def _new(timed: _Timed, more: Interactions) -> NDArray[np.bool_]:
    """Which rows of `more` are neither known nor said twice."""
    users = np.concatenate([timed[0], more.user_rows])
    times = np.concatenate([timed[1], more.times])
    items = np.concatenate([timed[2], more.item_rows])
    order = parts.order_by(users, times)
    again = order[parts.duplicates(users[order], times[order], items[order])] - len(timed[0])
    new = np.ones(len(more), bool)
    new[again[again >= 0]] = False
    return new


def _both(old: Interactions, more: Interactions) -> Interactions:
    """The old interactions and then the new ones."""
    context = {name: np.zeros(len(more), np.int32) for name in old.context}
    events = None if old.events is None else more.events
    weights = more.weights if len(more.weights) else np.ones(len(more), np.float32)
    times = more.times if old.has_times else np.zeros(len(more), np.int64)
    more = replace(
        more, context=context, events=events, has_times=old.has_times, weights=weights, times=times
    )
    log = together([old, more])
    if (log.weights == 1).all():
        log = replace(log, weights=np.empty(0, np.float32))
    return log


def _features(folder: Path, parent: Dataset, n_users: int, n_items: int) -> None:
    """The parent's features, unknown for whom it did not know; its links and context values."""
    for name, table, rows in (
        ("items", parent.item_features, n_items), ("users", parent.user_features, n_users),
    ):  # fmt: skip
        if table is not None:
            blank = pa.table(
                [pa.nulls(rows - len(table), field.type) for field in table.schema], table.schema
            )
            pq.write_table(pa.concat_tables([table, blank]), folder / f"{name}.parquet", compression="zstd")
    if "links.parquet" in parent.artefact.manifest.files:
        (folder / "links.parquet").write_bytes(parent.artefact.file("links.parquet").read_bytes())
    if parent.context_values:
        (folder / "context.json").write_text(json.dumps(dict(parent.context_values), ensure_ascii=False))

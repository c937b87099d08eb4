"""prepare: logs -> a dataset. Read and check blocks, give rows to ids, sort, split, write.

inspect      look at every file: how it is read, its sha256, its spans
read_blocks  spans -> checked blocks, in order                 (threads here, tasks on a cluster)
vocabulary   the blocks' words -> ids in order of first appearance
finish       a range of users -> its part files                (threads here, tasks on a cluster)
write        the artefact
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recray import columns as col
from recray.data import parts, splits
from recray.data.assemble import Written, write
from recray.data.dataset import Dataset, open_dataset
from recray.data.encode import rows_of, together, vocabulary, words_of
from recray.data.interactions import Block, Interactions, Rules, read_blocks
from recray.data.request import Options, Request, Tally, inspect
from recray.data.spans import Span
from recray.errors import ArtefactError
from recray.manifest import digest
from recray.progress import bar, say
from recray.storage import check_writable, place


def prepare(
    logs: Any,
    *,
    items: Any = None,
    users: Any = None,
    links: Any = None,
    columns: Mapping[str, str] | None = None,
    context: Sequence[str] = (),
    event_weights: Mapping[str, float] | None = None,
    valid: Any = None,
    test: Any = None,
    split: str = "leave-one-out",
    dedupe: bool = False,
    min_weight: float | None = None,
    out: Any,
    workers: int = 0,
) -> Dataset:
    """Make the dataset artefact at `out` from logs (a path, a folder, a URI or several of them).

    items, users: feature files; links: user-user pairs; columns: role -> header or position; context:
    columns carried along as categories; event_weights: kind -> factor on the weight, 1 where not named;
    valid, test: files that are these splits (then the whole log is train); dedupe: keep the first of equal
    (user, item, time); min_weight: rows below are left out, by default those not above zero; workers:
    above 0 the work runs on Ray. An `out` that holds the same already is returned at once.

    Raises InputError for what cannot be read, with the first line it stumbled over.
    """
    check_writable(out)
    options = Options(
        items=items,
        users=users,
        links=links,
        columns=dict(columns or {}),
        context=tuple(context),
        event_weights=dict(event_weights or {}),
        valid=valid,
        test=test,
        split=split,
        dedupe=dedupe,
        min_weight=min_weight,
    )
    request = inspect(logs, options)
    found = _already(out, request)
    if found is not None:
        say(f"{place(out)} already holds this dataset; nothing to do")
        return found
    if workers > 0:
        from recray.data import on_ray

        return on_ray.prepare(request, out, workers)
    return _prepare_here(request, out)


def _already(out: Any, request: Request) -> Dataset | None:
    try:
        found = open_dataset(out)
    except ArtefactError:
        return None
    return found if digest(found.artefact.manifest.recipe) == digest(request.recipe) else None


def _prepare_here(request: Request, out: Any) -> Dataset:
    tally = Tally()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        blocks: list[Block] = []
        sizes = []
        for name in col.SPLITS:
            found = _gather(pool, name, request.spans.get(name, ()), request.rules)
            for block in found:
                tally.count(block.rows, block.problems)
            blocks += found
            sizes.append(sum(len(block) for block in found))
        tally.check(sizes[0], request.groups["train"][0].place)
        words, maps = vocabulary([words_of(block) for block in blocks], request)
        log = together([rows_of(block, rows, request, words.events) for block, rows in zip(blocks, maps)])
        blocks.clear()
        codes = np.repeat(np.arange(len(sizes), dtype=np.int8), sizes) if request.plan.given else None
        return write(out, request, words, tally, parts_of(pool, log, codes, request.plan, len(words.users)))


def _gather(pool: ThreadPoolExecutor, name: str, spans: Sequence[Span], rules: Rules) -> list[Block]:
    made: list[Block] = []
    if not spans:
        return made
    with bar(f"reading {name}", unit="row") as progress:
        for blocks in pool.map(lambda span: list(read_blocks(span, rules)), spans):
            made += blocks
            progress.update(sum(block.rows for block in blocks))
    return made


def parts_of(
    pool: ThreadPoolExecutor,
    log: Interactions,
    codes: NDArray[np.int8] | None,
    plan: parts.Plan,
    n_users: int,
) -> Iterator[Written]:
    """The part files of a log, as they are made; codes: int8[N] of given splits, else `plan` decides."""
    if plan.split == "time":
        plan = plan.cut(splits.time_cuts(log.times), int(log.times.min()))
    borders = parts.bounds(np.bincount(log.user_rows, minlength=n_users))
    of_row = parts.part_of(borders)[log.user_rows]
    order = np.argsort(of_row, kind="stable")  # 16 bits wide: numpy counts instead of comparing
    ends = np.concatenate([[0], np.cumsum(np.bincount(of_row, minlength=len(borders) - 1))])

    def make(p: int) -> Written:
        at = order[ends[p] : ends[p + 1]]
        tables, repeated = parts.finish(log.take(at), None if codes is None else codes[at], plan)
        files = {name: (parts.encoded(table), table.num_rows) for name, table in tables.items()}
        return Written(p, int(borders[p]), int(borders[p + 1]), files, repeated)

    yield from pool.map(make, range(len(borders) - 1))

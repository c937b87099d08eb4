"""Words -> rows. Every block names its own words; one vocabulary in order of first appearance holds all.

The vocabulary is made from the blocks' words alone, in the blocks' order, so it is the same however many
workers read the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recray import columns as col
from recray.data.headers import CONTEXT
from recray.data.ids import Ids, merge
from recray.data.interactions import Block, Interactions
from recray.data.request import Request
from recray.errors import InputError

MOST_VALUES = 10_000  # of a context column
MOST_EVENTS = 127
Words = Mapping[str, Any]  # role or context column -> Arrow string array of a block's words
Maps = Mapping[str, NDArray[np.int32]]  # role or context column -> int32[words] rows of a block's words


@dataclass(frozen=True)
class Vocabulary:
    """All words. `context` values start with "" at row 0, for unknown; rows of events are codes."""

    users: Ids
    items: Ids
    events: tuple[str, ...]
    context: Mapping[str, list[str]]


def words_of(block: Block) -> Words:
    """The words of a block by role."""
    return {role: coded.words for role, coded in block.coded.items()}


def vocabulary(blocks: Sequence[Words], request: Request) -> tuple[Vocabulary, list[Maps]]:
    """(all words, for every block the rows of its words). Blocks come in input order."""
    none = pa.array([""], pa.string())
    maps: list[dict[str, NDArray[np.int32]]] = [{} for _ in blocks]

    def merged(role: str) -> Any:
        words, rows = merge([block.get(role, none) for block in blocks])
        for made, of_block in zip(maps, rows):
            made[role] = of_block
        return words

    users, items = Ids(merged(col.USER)), Ids(merged(col.ITEM))
    events: list[str] = merged(col.EVENT).to_pylist() if request.has_events else []
    if len(events) > MOST_EVENTS:
        raise InputError(f"the event column has {len(events)} kinds", fix="is it the right column?")
    context = {}
    for name in request.options.context:
        values = merged(CONTEXT + name).to_pylist()
        if len(values) > MOST_VALUES:
            raise InputError(
                f"context column {name!r} has {len(values)} values", fix="make fewer groups of them first"
            )
        context[name] = ["", *(value for value in values if value)]
        row = {value: i for i, value in enumerate(context[name])}
        to_value = np.array([row[value] for value in values], np.int32)
        for made in maps:
            made[CONTEXT + name] = to_value[made[CONTEXT + name]]
    return Vocabulary(users, items, tuple(events), context), list(maps)


def rows_of(block: Block, maps: Maps, request: Request, names: tuple[str, ...]) -> Interactions:
    """A block's interactions as rows; `names` are all kinds of events."""
    n = len(block)

    def rows(role: str) -> NDArray[np.int32]:
        coded = block.coded.get(role)
        found: NDArray[np.int32] = np.full(n, maps[role][0]) if coded is None else maps[role][coded.codes]
        return found

    times = np.empty(0, np.int64)
    if request.has_times:
        times = np.zeros(n, np.int64) if block.times is None else block.times
    weights = np.empty(0, np.float32)
    if request.has_weights:
        weights = np.ones(n, np.float32) if block.weights is None else block.weights
    return Interactions(
        rows(col.USER),
        rows(col.ITEM),
        times,
        weights,
        request.has_times,
        rows(col.EVENT).astype(np.int8) if request.has_events else None,
        names,
        {name: rows(CONTEXT + name) for name in request.options.context},
    )


def together(logs: Sequence[Interactions]) -> Interactions:
    """Interactions one after the other."""
    first = logs[0]
    return Interactions(
        np.concatenate([log.user_rows for log in logs]),
        np.concatenate([log.item_rows for log in logs]),
        np.concatenate([log.times for log in logs]),
        np.concatenate([log.weights for log in logs]),
        first.has_times,
        None
        if first.events is None
        else np.concatenate([log.events for log in logs if log.events is not None]),
        first.event_names,
        {name: np.concatenate([log.context[name] for log in logs]) for name in first.context},
    )

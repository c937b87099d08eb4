"""`shard(model, ...)` replaces a model's tables by this rank's part of them, and nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from recray.models.base import Model
from recray.models.embeddings import DenseTable
from recray.training.common import CommonTable
from recray.training.row_update import RowOptimizer
from recray.training.sharding import ShardedTable
from recray.training.wire import Wire


def make_table(
    plain: DenseTable, name: str, wire: Wire, optimizer: RowOptimizer, **options: Any
) -> ShardedTable:
    """This rank's part of a table, in memory that the ranks share where they can."""
    kind = CommonTable if wire.shares_memory else ShardedTable
    return kind(plain, name, wire, optimizer, **options)


def shard(
    model: Model,
    wire: Wire,
    optimizer: RowOptimizer,
    **options: Any,
) -> dict[str, ShardedTable]:
    """Replace every plain table of `model` by this rank's part of it; gives them by name.

    `options` are those of ShardedTable. A table without memory (`unallocated_tables`) is drawn here,
    each rank its own rows.
    """
    made: dict[str, ShardedTable] = {}
    for number, (name, table) in enumerate(model.tables.items()):
        assert isinstance(table, DenseTable)
        seed = options.get("seed", 0) * 1009 + number
        made[name] = make_table(table, name, wire, optimizer, **{**options, "seed": seed})
        model.tables[name] = made[name]
    return made


def unshard(model: Model) -> None:
    """Put plain tables with all rows back. Every rank must call it; each holds all rows then."""
    with torch.no_grad():
        for name, table in list(model.tables.items()):
            if isinstance(table, ShardedTable):
                model.tables[name] = DenseTable.of(table.dense())


@contextmanager
def gathered(model: Model) -> Iterator[Model]:
    """Inside the block the model has plain tables with all rows: to evaluate what fits one rank."""
    kept: Mapping[str, nn.Module] = dict(model.tables.items())
    unshard(model)
    try:
        yield model
    finally:
        for name, table in kept.items():
            model.tables[name] = table

"""The seam that sharding and compression share: a model reads its embedding rows through a Table.

A model holds its tables in `self.tables` (an nn.ModuleDict) and nothing else of it grows with the
catalogue. Training replaces a table by one whose rows are spread over ranks; compression by one
whose rows are encoded. Shapes: N rows of D floats.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from recray.models.losses import full_softmax

_UNALLOCATED: ContextVar[bool] = ContextVar("unallocated", default=False)


@contextmanager
def unallocated_tables() -> Iterator[None]:
    """Tables made inside the block have a shape and no memory: training gives each rank its own rows."""
    token = _UNALLOCATED.set(True)
    try:
        yield
    finally:
        _UNALLOCATED.reset(token)


def normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std^2); on the meta device its shape alone.

    There is nothing to draw there, and asking torch to would import its compiler: over a second at
    the start of every replica.
    """
    made = torch.empty(*shape)
    return nn.Parameter(made if made.is_meta else made.normal_(std=std))


class Table(nn.Module):
    """N rows of D floats, read by row."""

    num_rows: int
    dim: int

    @abstractmethod
    def forward(self, rows: Tensor) -> Tensor:
        """int64[...] rows -> float32[..., D]; negative rows (padding) give zeros."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All rows, float32[N, D]. Not to be called on a table larger than memory."""

    def full_softmax(self, states_PD: Tensor, targets_P: Tensor) -> Tensor:
        """Summed cross-entropy of each state's target row against all rows, a scalar."""
        return full_softmax(states_PD, self.dense(), targets_P)


class DenseTable(Table):
    """The plain table: a float32 parameter `weight` of shape [N, D]."""

    def __init__(self, num_rows: int, dim: int, *, std: float | None = None) -> None:
        super().__init__()
        self.num_rows, self.dim = num_rows, dim
        self.std = dim**-0.5 if std is None else std
        if _UNALLOCATED.get():
            self.weight = nn.Parameter(torch.empty(num_rows, dim, device="meta"))
        else:
            self.weight = normal(num_rows, dim, std=self.std)

    def forward(self, rows: Tensor) -> Tensor:
        found = nn.functional.embedding(rows.clamp(min=0), self.weight)
        return found * (rows >= 0).unsqueeze(-1)

    def dense(self) -> Tensor:
        return self.weight

    @staticmethod
    def of(weight: Tensor) -> DenseTable:
        """A table with these rows, float32[N, D]."""
        made = DenseTable.__new__(DenseTable)
        nn.Module.__init__(made)
        made.num_rows, made.dim = weight.shape
        made.std = made.dim**-0.5
        made.weight = nn.Parameter(weight.float().contiguous(), requires_grad=False)
        return made


def replace_tables(model: Any, tables: dict[str, Table]) -> None:
    """Put other tables of the same shapes into a model, by name."""
    for name, table in tables.items():
        old = model.tables[name]
        if (old.num_rows, old.dim) != (table.num_rows, table.dim):
            raise ValueError(
                f"table {name!r} is {old.num_rows} x {old.dim}, not {table.num_rows} x {table.dim}"
            )
        model.tables[name] = table

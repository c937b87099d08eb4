"""Indexes: item vectors in, the best k rows for a query out.

An index is built over a `Table`, normally the retriever's encoded one, and asks it for vectors, so
that no vector lies on disk twice: a saved index holds only what the table cannot give back.
Shapes: B queries, N items of D floats, k asked for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray import config
from recray.data.sequences import Histories
from recray.models.embeddings import DenseTable, Table

INDEXES = {  # name -> module:class, imported when asked for
    "exact": "recray.retrieval.exact:Exact",
    "hnsw": "recray.retrieval.hnsw:Hnsw",
    "ivf": "recray.retrieval.ivf:Ivf",
}

_NO_ROW = 0xFFFFFFFF  # -1 as 32 bits without a sign: behind every row
Found = tuple[NDArray[np.float32], NDArray[np.int64]]  # scores f32[B, k], rows int64[B, k]


@dataclass(frozen=True, kw_only=True)
class IndexParams:
    """Base of each index's own frozen parameters (`Index.Params`)."""


class Index(ABC):
    """Search by inner product. Safe to call from several threads once it is made."""

    name: ClassVar[str]
    Params: ClassVar[type[IndexParams]]

    def __init__(self, table: Table, params: Any) -> None:
        self.table, self.params = table, params

    @classmethod
    @abstractmethod
    def over(cls, table: Table, params: Any) -> Index:
        """Build over every row of the table."""

    @abstractmethod
    def search(self, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        """The best k rows a query, best first, equal scores by row.

        `allowed` bool[N] leaves out items. Where fewer than k are left: row -1, score -inf.
        """

    def search_without(
        self,
        queries_BD: Tensor,
        k: int,
        barred: Histories | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """`search` without the barred rows of each query (rows < 0 mean nothing)."""
        reach = min(self.table.num_rows, k + longest(barred))
        return without(self.search(queries_BD, reach, allowed), barred, k)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that the index holds in memory beside the table."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what the table cannot give back, which may be nothing."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, table: Table, params: Any) -> Index:
        """What `save` wrote, over the same table. Raises ArtefactError for anything else."""

    def _scanned(self, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None) -> Found:
        """`scan` of all that is allowed."""
        rows = np.arange(self.table.num_rows) if allowed is None else np.flatnonzero(allowed)
        return scan(self.table, queries_BD, rows, k)

    def _filled(
        self, queries_BD: Tensor, rows_BC: NDArray[np.int64], k: int, allowed: NDArray[np.bool_] | None
    ) -> Found:
        """The candidates (-1 for none) scored exactly; where they are fewer than k, all is scanned."""
        scores, rows = rescored(self.table, queries_BD, torch.from_numpy(rows_BC), k)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            scores[short], rows[short] = self._scanned(queries_BD[torch.from_numpy(short)], k, allowed)
        return scores, rows


def index_class(name: str) -> type[Index]:
    """The class of a registered index; an unknown name raises ConfigError naming the nearest."""
    if name not in INDEXES:
        raise config.unknown_name("index", name, INDEXES)
    module, _, attribute = INDEXES[name].partition(":")
    found: type[Index] = getattr(importlib.import_module(module), attribute)
    return found


def index_params(name: str, params: Mapping[str, Any]) -> Any:
    """The checked parameters of an index; an unknown one raises ConfigError."""
    return config.build(index_class(name).Params, params, where="index_params")


def build_index(name: str, vectors: Table | Tensor, params: Mapping[str, Any] | None = None) -> Index:
    """Build the index of that name over a table, or over vectors float32[N, D]."""
    table = vectors if isinstance(vectors, Table) else DenseTable.of(vectors)
    with torch.inference_mode():
        return index_class(name).over(table, index_params(name, params or {}))


def ordered(scores: NDArray[np.float32], rows: NDArray[np.int64], k: int) -> Found:
    """The best k of each line, best first and equal scores by row; padded to k with (-inf, -1)."""
    b, width = rows.shape
    # one whole number a candidate that sorts as it should: the score turned round above, the row below
    bits = (scores + np.float32(0)).view(np.int32)  # + 0 makes -0 and 0 one
    falling = np.where(bits < 0, bits & 0x7FFFFFFF, ~bits).astype(np.int64)
    lost = np.isneginf(scores)
    keys = np.sort((falling << 32) | np.where(lost, _NO_ROW, rows & _NO_ROW), axis=1)[:, :k]
    rows = (keys & _NO_ROW).astype(np.uint32).view(np.int32).astype(np.int64)
    falling = (keys >> 32).astype(np.int32)
    scores = np.where(falling < 0, ~falling, falling | np.int32(-(2**31))).astype(np.int32).view(np.float32)
    if width < k:
        scores = np.concatenate([scores, np.full((b, k - width), -np.inf, np.float32)], axis=1)
        rows = np.concatenate([rows, np.full((b, k - width), -1, np.int64)], axis=1)
    return scores, rows


def without(found: Found, barred: Histories | None, count: int) -> Found:
    """Drop each user's barred rows and keep `count`, the order as it was."""
    scores, rows = found
    if barred is not None and len(barred.items):
        width = int(max(rows.max(initial=0), barred.items.max(initial=0))) + 2
        line = np.arange(len(rows), dtype=np.int64) * width
        # a row and its line as one number; -1 is then a place of the line before that no row has
        shut = np.sort(np.repeat(line, barred.lengths) + np.maximum(barred.items, -1))
        keys = rows + line[:, None]
        hit = shut.take(np.searchsorted(shut, keys), mode="clip") == keys
        rows = np.where(hit, -1, rows)
        scores = np.where(hit, np.float32(-np.inf), scores)
    return ordered(scores, rows, count)


def longest(barred: Histories | None) -> int:
    """The most rows that are barred for one user."""
    return 0 if barred is None else int(barred.lengths.max(initial=0))


def top_rows(scores_BN: Tensor, reach: int) -> Found:
    """The best `reach` of whole lines of scores; among equal ones the lower rows."""
    best = scores_BN.topk(reach, dim=1)
    scores, rows = best.values, best.indices
    torn = (scores_BN >= scores[:, -1:]).sum(dim=1) > reach  # equal scores on both sides of the edge
    if bool(torn.any()):
        again = scores_BN[torn].sort(dim=1, descending=True, stable=True)
        scores[torn], rows[torn] = again.values[:, :reach], again.indices[:, :reach]
    return scores.float().numpy(), rows.numpy()


def rescored(
    table: Table, queries_BD: Tensor, rows_BC: Tensor, k: int, vectors_ND: Tensor | None = None
) -> Found:
    """Order the candidates int64[B, C] (-1 for none) by float32 inner products and keep k.

    Each product is summed alone, so a user's scores do not depend on who else is in the batch.
    """
    if vectors_ND is None:
        found_BCD = table(rows_BC)
    else:
        found_BCD = torch.nn.functional.embedding(rows_BC.clamp(min=0), vectors_ND)
    scores_BC = (found_BCD * queries_BD.unsqueeze(1)).sum(dim=2)
    scores_BC = scores_BC.masked_fill(rows_BC < 0, -torch.inf)
    return ordered(scores_BC.numpy(), rows_BC.numpy(), k)


def scan(table: Table, queries_BD: Tensor, rows_R: NDArray[np.int64], k: int) -> Found:
    """Exact search among the given rows only, in blocks of rows; for small parts of a catalogue."""
    b = len(queries_BD)
    scores = np.empty((b, 0), np.float32)
    rows = np.empty((b, 0), np.int64)
    for start in range(0, len(rows_R), SCAN_ROWS):
        part_R = torch.from_numpy(rows_R[start : start + SCAN_ROWS])
        scores_BR = queries_BD @ table(part_R).T
        _, at_BC = top_rows(scores_BR, min(k + SLACK, len(part_R)))
        more, at = rescored(table, queries_BD, part_R[torch.from_numpy(at_BC)], k)
        scores, rows = ordered(np.concatenate([scores, more], 1), np.concatenate([rows, at], 1), k)
    return ordered(scores, rows, k)


SCAN_ROWS = 1 << 16  # rows that `scan` decodes at a time
SLACK = 16  # a matmul's last bits may swap neighbours: so many more are taken and scored again

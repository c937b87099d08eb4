"""Exact search: a matmul over the whole table, an edge that k items reach, float32 products again.

Selecting costs more than multiplying, so most of it is avoided. The items are dealt to S groups, and each
group's best score is a maximum over its lanes: the item of lane l and group s is row l * S + s, so that
maximum runs along memory. The want-th greatest of these S maxima is an edge that at least `want` items
reach, and hardly more than that do: only the groups that reach it are looked into. Scores are compared by
their bits as whole numbers, which processors do several times faster than for bfloat16.

Above `bf16_from` rows the matmul runs in bfloat16 (where the processor has it). Float32 products order a
choice that is wider than k by what the rounding may have swapped.

Shapes: B queries, N items of D floats, S groups of L lanes, P pairs of a query and a group, C candidates.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.embeddings import Table
from recray.retrieval.index import (
    SLACK,
    Found,
    Index,
    IndexParams,
    longest,
    ordered,
    rescored,
    scan,
    top_rows,
    without,
)

MOST_LANES = 128  # rows are padded to a multiple of it
CELLS = 1 << 22  # scores held at a time: 8 MB of bfloat16, which stay near the processor
CELLS_F32 = 1 << 24  # there each product copies all items first, which pays for many queries only


@dataclass(frozen=True, kw_only=True)
class ExactParams(IndexParams):
    """`precision` of the first pass: auto = bf16 for large catalogues on processors that have it.

    threads: parts of a large batch that are searched at a time; with 1, torch may use its own for a product.
    """

    precision: Literal["auto", "f32", "bf16"] = "auto"
    bf16_from: int = 20_000  # rows from which `auto` takes bf16
    threads: int = 1

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ConfigError(f"index_params {self} are out of range", fix="threads >= 1")


class Exact(Index):
    """The scan. Memory: a copy of the table, decoded, in float32 or bfloat16."""

    name = "exact"
    Params = ExactParams

    def __init__(self, table: Table, params: ExactParams) -> None:
        super().__init__(table, params)
        with torch.inference_mode():
            self._make()

    def _make(self) -> None:
        self.n = self.table.num_rows
        self._rooms = threading.local()
        self._pool = _workers(self.params.threads) if self.params.threads > 1 else None
        low = self.params.precision == "bf16" or (
            self.params.precision == "auto" and self.n >= self.params.bf16_from and _has_bf16()
        )
        dense_ND = self.table.dense().detach()
        if low:
            self.columns_DN = nn.functional.pad(dense_ND.bfloat16(), (0, 0, 0, -self.n % MOST_LANES)).T
        else:  # dimension by dimension: one query's product then takes less than half as long
            self.columns_DN = dense_ND.T.contiguous()
        # what the last products are taken from: nothing but the table where that would be another copy
        self.full_ND = dense_ND if _held(self.table, dense_ND) else None

    @classmethod
    def over(cls, table: Table, params: ExactParams) -> Exact:
        return cls(table, params)

    @classmethod
    def load(cls, folder: Path, table: Table, params: ExactParams) -> Exact:
        return cls(table, params)

    def save(self, folder: Path) -> None:
        """Nothing: the table is the index."""

    @property
    def nbytes(self) -> int:
        return self.columns_DN.numel() * self.columns_DN.element_size()

    def search(self, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        return self.search_without(queries_BD, k, None, allowed)

    @torch.inference_mode()
    def search_without(
        self,
        queries_BD: Tensor,
        k: int,
        barred: Histories | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Found:
        """`search` without the barred rows of each query, struck out before anything is selected."""
        queries_BD = queries_BD.float().contiguous()
        if allowed is not None:
            rows_R = np.flatnonzero(allowed)
            if len(rows_R) <= max(self.n // 8, MOST_LANES):
                return without(scan(self.table, queries_BD, rows_R, k + longest(barred)), barred, k)
        mask_N = None if allowed is None else torch.from_numpy(~allowed)
        cells = CELLS if self.columns_DN.dtype == torch.bfloat16 else CELLS_F32
        step, b = max(1, cells // max(self.n, 1)), len(queries_BD)
        if 0 < b <= step:
            return self._search(queries_BD, k, barred, mask_N)

        def part(start: int) -> Found:
            some = slice(start, start + step)
            return self._search(queries_BD[some], k, None if barred is None else barred.take(some), mask_N)

        parts = list((map if self._pool is None else self._pool.map)(part, range(0, b, step)))
        if not parts:
            return ordered(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64), k)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    @torch.inference_mode()
    def _search(self, queries_BD: Tensor, k: int, barred: Histories | None, mask_N: Tensor | None) -> Found:
        low = self.columns_DN.dtype == torch.bfloat16
        scores_BN = self._room(len(queries_BD))
        goal = scores_BN[:, : self.columns_DN.shape[1]]
        torch.mm(queries_BD.to(goal.dtype), self.columns_DN, out=goal)
        scores_BN[:, self.n :] = -torch.inf
        if mask_N is not None:
            scores_BN[:, : self.n].masked_fill_(mask_N, -torch.inf)
        if barred is not None and len(barred.items):
            barred, wide = barred.known(), scores_BN.shape[1]
            cells = np.repeat(np.arange(0, len(barred) * wide, wide), barred.lengths) + barred.items
            scores_BN.view(-1).index_fill_(0, torch.from_numpy(cells), -torch.inf)
        want = k + max(k // 4, SLACK) if low else k + SLACK
        rows_BC = _best(scores_BN, min(want, self.n))
        return rescored(self.table, queries_BD, rows_BC, k, self.full_ND)

    def _room(self, b: int) -> Tensor:
        """Memory for a batch's scores, a thread's own and kept: new megabytes cost page faults each time."""
        wide = self.n + -self.n % MOST_LANES
        if getattr(self._rooms, "cells", None) is None or self._rooms.cells.numel() < b * wide:
            self._rooms.cells = torch.empty(b * wide, dtype=self.columns_DN.dtype)
        cells: Tensor = self._rooms.cells
        return cells[: b * wide].view(b, wide)


def _best(scores_BN: Tensor, want: int) -> Tensor:
    """Rows int64[B, C] of at least the `want` greatest scores, in no order that counts; -1 for none.

    N is a multiple of MOST_LANES. Where many scores are equal, just `want` of them.
    """
    b, n = scores_BN.shape
    lanes = MOST_LANES
    while lanes > 8 and (n < 8 * want * lanes or n < lanes**2 * want):
        lanes //= 2  # so many that looking into the groups costs as little as finding them
    groups = n // lanes
    if groups < 4 * want:
        return _by_looking_at_each(scores_BN, want)
    keys_BN = scores_BN.view(torch.int16 if scores_BN.element_size() == 2 else torch.int32).numpy()
    best_BS, edge_B = _edges(keys_BN, lanes, want)
    low = bool(edge_B.min(initial=1) <= 0)
    if low:  # as whole numbers the bits are in order above zero only
        keys_BN = np.where(keys_BN < 0, keys_BN ^ np.iinfo(keys_BN.dtype).max, keys_BN)
        best_BS, edge_B = _edges(keys_BN, lanes, want)
    query_P, group_P = np.divmod(np.flatnonzero(best_BS >= edge_B[:, None]), groups)
    cells_PL = (query_P * n + group_P)[:, None] + np.arange(0, n, groups)
    reached = np.flatnonzero(keys_BN.reshape(-1).take(cells_PL) >= edge_B[query_P, None])
    query_C, row_C = np.divmod(cells_PL.reshape(-1)[reached], n)
    count_B = np.bincount(query_C, minlength=b)
    if count_B.max(initial=0) > 4 * want:
        return _by_looking_at_each(scores_BN, want)
    place_C = np.arange(len(query_C)) - (np.cumsum(count_B) - count_B)[query_C]
    rows_BC = np.full((b, int(count_B.max(initial=0))), -1)
    rows_BC[query_C, place_C] = row_C
    found_BC = torch.from_numpy(rows_BC)
    if not low:  # what is -inf did not reach the edge
        return found_BC
    lost_BC = torch.isneginf(scores_BN.gather(1, found_BC.clamp(min=0)))
    return found_BC.masked_fill_(lost_BC, -1)


def _edges(keys_BN: NDArray[Any], lanes: int, want: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The best of each group [B, S], and the want-th greatest of them [B]."""
    b, n = keys_BN.shape
    best_BS = keys_BN.reshape(b, lanes, n // lanes).max(axis=1)
    at = n // lanes - want
    return best_BS, np.partition(best_BS, at, axis=1)[:, at]


def _by_looking_at_each(scores_BN: Tensor, want: int) -> Tensor:
    """Rows int64[B, want] of the greatest scores, of equal ones the lower rows; -1 where one is -inf."""
    values_BC, rows_BC = top_rows(scores_BN, want)
    return torch.from_numpy(rows_BC).masked_fill_(torch.from_numpy(np.isneginf(values_BC)), -1)


def _held(table: Table, dense_ND: Tensor) -> bool:
    """Whether the table's own memory is what it gives as `dense`."""
    return any(t.data_ptr() == dense_ND.data_ptr() for t in (*table.parameters(), *table.buffers()))


def _workers(count: int) -> ThreadPoolExecutor:
    """Threads that each compute alone: most of a search is not torch's, and torch's waits for its helpers."""
    before, started = torch.get_num_threads(), threading.Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(1)  # of this thread, and of those that start later
        started.wait()

    made = ThreadPoolExecutor(count, thread_name_prefix="exact", initializer=begin)
    for _ in range(count):
        made.submit(int)
    started.wait()
    torch.set_num_threads(before)
    return made


def _has_bf16() -> bool:
    """Whether a bfloat16 matmul is an instruction of this processor; emulated, it would be slower."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked and asked())

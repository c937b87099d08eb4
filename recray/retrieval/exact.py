"""Exact search: a matmul over the whole table, the best blocks of 32, then float32 products again.

Selecting costs more than multiplying: the best k items lie in the k blocks with the greatest
maxima, so only those blocks are sorted. Above `bf16_from` rows the matmul runs in bfloat16 (where
the processor has it) and float32 products order a wider choice, which leaves rank 10 untouched and
a handful in a thousand of rank 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.models.embeddings import Table
from recray.retrieval.index import SLACK, Found, Index, IndexParams, ordered, rescored, scan

BLOCK = 32
CELLS = 1 << 24  # scores held at a time: 64 MB of float32


@dataclass(frozen=True, kw_only=True)
class ExactParams(IndexParams):
    """`precision` of the first pass: auto = bf16 for large catalogues on processors that have it."""

    precision: Literal["auto", "f32", "bf16"] = "auto"
    bf16_from: int = 20_000  # rows from which `auto` takes bf16


class Exact(Index):
    """The scan. Memory: the table decoded once (float32), or its bfloat16 copy."""

    name = "exact"
    Params = ExactParams

    def __init__(self, table: Table, params: ExactParams) -> None:
        super().__init__(table, params)
        with torch.inference_mode():
            self._make()

    def _make(self) -> None:
        self.n = self.table.num_rows
        low = self.params.precision == "bf16" or (
            self.params.precision == "auto" and self.n >= self.params.bf16_from and _has_bf16()
        )
        dense_ND = self.table.dense().detach()
        self.vectors_ND = dense_ND.bfloat16() if low else dense_ND
        self.full_ND = None if low else dense_ND  # what the last products are taken from

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
        return self.vectors_ND.numel() * self.vectors_ND.element_size()

    @torch.inference_mode()
    def search(self, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None = None) -> Found:
        queries_BD = queries_BD.float().contiguous()
        if allowed is not None:
            rows_R = np.flatnonzero(allowed)
            if len(rows_R) <= max(self.n // 8, 4 * BLOCK):
                return scan(self.table, queries_BD, rows_R, k)
        mask_N = None if allowed is None else torch.from_numpy(~allowed)
        step = max(1, CELLS // max(self.n, 1))
        parts = [self._search(part, k, mask_N) for part in torch.split(queries_BD, step)]
        if not parts:
            return ordered(np.empty((0, 0), np.float32), np.empty((0, 0), np.int64), k)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _search(self, queries_BD: Tensor, k: int, mask_N: Tensor | None) -> Found:
        scores_BN = queries_BD.to(self.vectors_ND.dtype) @ self.vectors_ND.T
        if mask_N is not None:
            scores_BN.masked_fill_(mask_N, -torch.inf)
        want = k + SLACK if self.full_ND is not None else k + max(k // 2, 2 * SLACK)
        rows_BC = _best(scores_BN, min(want, self.n))
        return rescored(self.table, queries_BD, rows_BC, k, self.full_ND)


def _best(scores_BN: Tensor, want: int) -> Tensor:
    """Rows int64[B, want] of the greatest scores in no order that counts; -1 where a score is -inf."""
    b, n = scores_BN.shape
    blocks = n // BLOCK
    if want * 4 >= blocks:
        top = scores_BN.topk(want, dim=1, sorted=False)
        return top.indices.masked_fill(torch.isneginf(top.values), -1)
    whole_BGS = scores_BN[:, : blocks * BLOCK].view(b, blocks, BLOCK)
    picked_BW = whole_BGS.amax(dim=2).topk(want, dim=1, sorted=False).indices
    lanes_S = torch.arange(BLOCK)
    rows_BM = (picked_BW.unsqueeze(2) * BLOCK + lanes_S).flatten(1)
    rest_R = torch.arange(blocks * BLOCK, n).expand(b, -1)
    rows_BM = torch.cat([rows_BM, rest_R], dim=1)
    top = scores_BN.gather(1, rows_BM).topk(want, dim=1, sorted=False)
    return rows_BM.gather(1, top.indices).masked_fill(torch.isneginf(top.values), -1)


def _has_bf16() -> bool:
    """Whether a bfloat16 matmul is an instruction of this processor; emulated, it would be slower."""
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(asked and asked())

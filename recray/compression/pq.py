"""Product quantization (Jegou, Douze & Schmid 2011): a row is cut into parts, each coded as one of K vectors.

The codebooks are found by k-means, a part at a time. A mean lies nearer to zero than most of what it stands
for, so decoded rows are too short, by a share that differs from row to row: that alone reorders the lists
that items compete in, more than the rounding does. So a byte a row stretches it by
<row, row> / <row, decoded>, after which a query along the row scores as before (the correction of RaBitQ,
Gao & Long 2024), within LEAST and MOST.

Rotations were tried on trained tables (the principal axes, with bits by variance): a third of the squared
error, and worse lists, since the axes of little variance are what tells items apart.

Shapes: N rows of D floats, R of them asked for, M parts of W floats, K codes a part, B queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import faiss as _faiss
import numpy as np
import torch
from torch import Tensor, nn

from recray.compression.codec import Arrays, Codec, CodecParams, picked
from recray.compression.int8 import LEVELS, TINY
from recray.errors import ConfigError

faiss: Any = _faiss  # its stubs do not know all of it

LEAST, MOST = 0.5, 1.5  # how much shorter and longer a decoded row may be made
STEPS = 254  # between the two; so one of them is 1
SWEEPS = 20
BLOCK = 1 << 16  # rows that are assigned, or scored, at a time


@dataclass(frozen=True, kw_only=True)
class PQParams(CodecParams):
    """How many floats a part has (the last may have fewer), and the bits of each part's code."""

    width: int = 8
    bits: Literal[4, 8] = 8

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"pq has parts of {self.width} floats", fix="give at least 1")


class PQ(Codec):
    """value = book[m, code] * unit[m] * stretch[row], the books in eight bits.

    N * (ceil(M * bits / 8) + 1) + M * K * W + 4 M bytes. A decoded value is within MOST times the range of
    its column's mean values, which is all that is certain of its error.
    """

    name = "pq"
    largest = 1e30
    Params = PQParams

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        n, dim = table_ND.shape
        parts, wide, codes = self._shape(n, dim)
        whole = table_ND.abs().max().clamp(min=TINY) if n and dim else torch.ones(())
        x_NMW = nn.functional.pad(table_ND / whole, (0, parts * wide - dim)).view(n, parts, wide)
        shares = None if weights_N is None else (weights_N.float().numpy() + 1) ** 0.5
        book_MKW = torch.zeros(parts, codes, wide)
        code_NM = torch.zeros(n, parts, dtype=torch.uint8)
        for m in range(parts if n else 0):
            book_MKW[m], code_NM[:, m] = _means(x_NMW[:, m].contiguous().numpy(), codes, shares)
        unit_M = (book_MKW.abs().flatten(1).max(dim=1).values if n else torch.zeros(parts)) / LEVELS
        rounded = (book_MKW / unit_M.clamp(min=TINY).view(-1, 1, 1)).round_().to(torch.int8)
        arrays = {
            "codes": _packed(code_NM, self.params.bits),
            "stretch": torch.full((n,), STEPS // 2, dtype=torch.uint8),
            "book": rounded,
            "unit": unit_M * whole,
        }
        arrays["stretch"] = self._stretch(table_ND, arrays)
        return arrays

    def _stretch(self, table_ND: Tensor, arrays: Arrays) -> Tensor:
        """What makes each row's decoded form score right for a query along the row, uint8[N].

        Of an `arrays` whose stretch is 1.
        """
        made = []
        for start in range(0, len(table_ND), BLOCK):
            x_RD = table_ND[start : start + BLOCK].double()
            rows_R = torch.arange(start, start + len(x_RD))
            along_R = (x_RD * self.decode(arrays, rows_R, table_ND.shape[1])).sum(dim=1)
            longer_R = torch.where(along_R > 0, (x_RD * x_RD).sum(dim=1) / along_R, 1.0)
            share_R = (longer_R.clamp(LEAST, MOST) - LEAST) / (MOST - LEAST)
            made.append((share_R * STEPS).round_().to(torch.uint8))
        return torch.cat(made) if made else torch.zeros(0, dtype=torch.uint8)

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        book_MKW, unit_M = arrays["book"], arrays["unit"]
        parts, codes, wide = book_MKW.shape
        code_RM = _unpacked(picked(arrays["codes"], rows_R), parts, self.params.bits)
        at_RM = code_RM.long() + torch.arange(parts) * codes
        longer_R = _longer(picked(arrays["stretch"], rows_R))
        found = book_MKW.view(parts * codes, wide).index_select(0, at_RM.view(-1)).float()
        found_RMW = found.view(len(at_RM), parts, wide) * (unit_M.unsqueeze(1) * longer_R.view(-1, 1, 1))
        return found_RMW.view(len(at_RM), parts * wide)[:, :dim].contiguous()

    def scores(self, arrays: Arrays, queries_BD: Tensor, dim: int) -> Tensor:
        """From one table of products a query, float32[M * K], summed by the codes of each row."""
        book_MKW, unit_M = arrays["book"], arrays["unit"]
        parts, codes, wide = book_MKW.shape
        if not codes:
            return queries_BD.new_zeros(len(queries_BD), 0)
        q_MWB = nn.functional.pad(queries_BD, (0, parts * wide - dim)).T.reshape(parts, wide, -1)
        products_KB = (book_MKW.float() @ (q_MWB * unit_M.view(-1, 1, 1))).view(parts * codes, -1)
        made = []
        for start in range(0, len(arrays["codes"]), BLOCK):
            part = slice(start, start + BLOCK)
            code_RM = _unpacked(arrays["codes"][part], parts, self.params.bits)
            at_RM = code_RM.long() + torch.arange(parts) * codes
            summed_RB = nn.functional.embedding_bag(at_RM, products_KB, mode="sum")
            made.append(summed_RB * _longer(arrays["stretch"][part]).unsqueeze(1))
        return torch.cat(made).T

    def bytes_of(self, num_rows: int, dim: int) -> int:
        parts, wide, codes = self._shape(num_rows, dim)
        coded = -(-parts * int(self.params.bits) // 8)
        return num_rows * (coded + 1) + parts * codes * wide + 4 * parts

    def error_bound(self, table_ND: Tensor) -> Tensor:
        if table_ND.numel() == 0:
            return torch.zeros(1)
        peak_1D = table_ND.abs().amax(dim=0, keepdim=True)
        rounding = table_ND.abs().max() * (1.0 / LEVELS) + LEVELS * TINY
        return table_ND.abs() + MOST * (peak_1D * (1 + 2.0**-18) + rounding)

    def _shape(self, num_rows: int, dim: int) -> tuple[int, int, int]:
        """Parts, floats of a part, codes of a part."""
        wide = min(self.params.width, max(dim, 1))
        return -(-dim // wide), wide, min(1 << self.params.bits, num_rows)


def _longer(stretch_R: Tensor) -> Tensor:
    return LEAST + stretch_R.float() * ((MOST - LEAST) / STEPS)


def _means(x_NW: Any, count: int, shares: Any) -> tuple[Tensor, Tensor]:
    """k-means: centres float32[K, W] and the nearest one of each row, uint8[N]. One thread: alike twice."""
    faiss.omp_set_num_threads(1)
    made = faiss.Kmeans(x_NW.shape[1], count, niter=SWEEPS, seed=1, min_points_per_centroid=1)
    made.train(x_NW, weights=shares)
    centres_KW = np.ascontiguousarray(made.centroids)
    nearest = [
        faiss.knn(x_NW[start : start + BLOCK], centres_KW, 1)[1][:, 0] for start in range(0, len(x_NW), BLOCK)
    ]
    return torch.from_numpy(centres_KW), torch.from_numpy(np.concatenate(nearest).astype(np.uint8))


def _packed(code_NM: Tensor, bits: int) -> Tensor:
    """Two codes of four bits a byte: the first half of the parts lies in the low bits."""
    if bits == 8:
        return code_NM
    code_NM = nn.functional.pad(code_NM, (0, code_NM.shape[1] % 2))
    half = code_NM.shape[1] // 2
    return code_NM[:, :half] | (code_NM[:, half:] << 4)


def _unpacked(packed: Tensor, parts: int, bits: int) -> Tensor:
    """uint8[R, M] of what `_packed` made."""
    return packed if bits == 8 else torch.cat([packed & 15, packed >> 4], dim=1)[:, :parts]

"""Product quantization (Jegou, Douze & Schmid 2011): a row is cut into parts, each coded as one of K vectors.

The codebooks are found by k-means, a part at a time, of rows brought to length 1, so that long and short ones
share them; a byte a row holds the length, in equal steps of its logarithm. A mean lies nearer to zero than
most of what it stands for, so that decoded rows would be too short, by a share that differs from row to row:
that alone reorders the lists that items compete in, more than the rounding does. So the length is
<row, row> / <row, decoded>, with which a query along the row scores as before (the correction of RaBitQ,
Gao & Long 2024), within LEAST and MOST times the row's own.

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

from recray.compression.askers import Askers, best_length, best_parts, wrong
from recray.compression.codec import Arrays, Codec, CodecParams, picked
from recray.compression.int8 import LEVELS, TINY
from recray.errors import ConfigError

faiss: Any = _faiss  # its stubs do not know all of it

LEAST, MOST = 0.5, 1.5  # how much shorter and longer than the row its books may be made
STEPS = 254  # of lengths, from the longest down to at most a RANGE-th of it; a byte of 0 is a row of zeros
RANGE = 1000.0
SWEEPS = 20
BLOCK = 1 << 16  # rows that are assigned, or scored, at a time


@dataclass(frozen=True, kw_only=True)
class PQParams(CodecParams):
    """How many floats a part has (the last may have fewer), and the bits of each part's code.

    fit: how often all codes are chosen anew for those who ask, where they are known (`askers.py`).
    """

    width: int = 8
    bits: Literal[4, 8] = 8
    fit: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ConfigError(f"pq has parts of {self.width} floats", fix="give at least 1")
        if self.fit < 0:
            raise ConfigError(f"pq is fitted {self.fit} times", fix="give 0 or more")


class PQ(Codec):
    """value = book[m, code] * unit[m] * length[row], the books in eight bits.

    N * (ceil(M * bits / 8) + 1) + M * K * W + 4 M + 8 bytes. A decoded value is no greater than MOST times
    the longest row, which is all that is certain of its error.
    """

    name = "pq"
    largest = 1e30
    Params = PQParams

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        n, dim = table_ND.shape
        parts, wide, codes = self._shape(n, dim)
        long_N = table_ND.double().norm(dim=1)
        whole = long_N.max().clamp(min=TINY) if n else torch.ones((), dtype=torch.float64)
        unit_ND = (table_ND / long_N.clamp(min=TINY).unsqueeze(1)).float()
        x_NMW = nn.functional.pad(unit_ND, (0, parts * wide - dim)).view(n, parts, wide)
        counts_N = torch.ones(n) if weights_N is None else (weights_N.float() + 1).sqrt()
        shares = (counts_N * (long_N / whole).square() + 1e-9).float().numpy()
        book_MKW = torch.zeros(parts, codes, wide)
        code_NM = torch.zeros(n, parts, dtype=torch.uint8)
        for m in range(parts if n else 0):
            book_MKW[m], code_NM[:, m] = _means(x_NMW[:, m].contiguous().numpy(), codes, shares)
        unit_M = (book_MKW.abs().flatten(1).max(dim=1).values if n else torch.zeros(parts)) / LEVELS
        rounded = (book_MKW / unit_M.clamp(min=TINY).view(-1, 1, 1)).round_().to(torch.int8)
        arrays = {
            "codes": _packed(code_NM, self.params.bits),
            "book": rounded,
            "unit": unit_M,
        }
        length_N = self._lengths(table_ND, long_N, arrays)
        top = length_N.max() if n else torch.zeros((), dtype=torch.float64)
        least = length_N[length_N > 0].min() if top > 0 else top
        arrays["ends"] = torch.stack([torch.maximum(least, top / RANGE), top]).float()
        arrays["stretch"] = _stretched(length_N, arrays["ends"])
        return arrays

    def _lengths(self, table_ND: Tensor, long_N: Tensor, arrays: Arrays) -> Tensor:
        """What makes each row's decoded form score right for a query along the row, float64[N]."""
        made = [torch.zeros(0, dtype=torch.float64)]
        for start in range(0, len(table_ND), BLOCK):
            x_RD, long_R = table_ND[start : start + BLOCK].double(), long_N[start : start + BLOCK]
            rows_R = torch.arange(start, start + len(x_RD))
            made.append(_along(x_RD, self._plain(arrays, rows_R, table_ND.shape[1]), long_R))
        return torch.cat(made)

    def refine(self, arrays: Arrays, table_ND: Tensor, askers: Askers) -> dict[str, Tensor]:
        """Codes by coordinate descent, at lengths of least `wrong`; a row that gains nothing stays.

        The length that is kept is again the one that a query along the row asks for: the other is shorter,
        the more so the fewer bits there are, and of tiers that moves the tail down in every list.
        """
        n, dim = table_ND.shape
        parts, _, wide = arrays["book"].shape
        beyond, book_MKW = parts * wide - dim, arrays["book"].float() * arrays["unit"].view(-1, 1, 1)
        ends = arrays["ends"]
        made = {name: array.clone() for name, array in arrays.items()}
        for start in range(0, n, askers.block):
            at = slice(start, min(start + askers.block, n))
            metric_BDD = nn.functional.pad(askers.metric(at.start, at.stop), (0, beyond, 0, beyond))
            x_BD = nn.functional.pad(table_ND[at], (0, beyond))
            code_BM = _unpacked(arrays["codes"][at], parts, self.params.bits).long()
            stretch_B = arrays["stretch"][at]
            long_B = x_BD.norm(dim=1)
            before_B = wrong(_joined(book_MKW, code_BM, _longer(stretch_B, ends)) - x_BD, metric_BDD)
            for _ in range(self.params.fit):
                code_BM = best_parts(x_BD, metric_BDD, book_MKW, code_BM, _longer(stretch_B, ends))
                plain_BD = _joined(book_MKW, code_BM, torch.ones(len(x_BD)))
                best_B = best_length(x_BD, metric_BDD, plain_BD)
                stretch_B = _stretched(torch.clamp(best_B, LEAST * long_B, MOST * long_B), ends)
            stretch_B = _stretched(_along(x_BD.double(), plain_BD, long_B), ends)
            after_B = wrong(_joined(book_MKW, code_BM, _longer(stretch_B, ends)) - x_BD, metric_BDD)
            gained_B = after_B < before_B
            made["codes"][at][gained_B] = _packed(code_BM.to(torch.uint8), self.params.bits)[gained_B]
            made["stretch"][at][gained_B] = stretch_B[gained_B]
        return made

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        length_R = _longer(picked(arrays["stretch"], rows_R), arrays["ends"])
        return self._plain(arrays, rows_R, dim).mul_(length_R.unsqueeze(1))

    def _plain(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        """The rows without their lengths, float32[R, D]."""
        book_MKW, unit_M = arrays["book"], arrays["unit"]
        parts, codes, wide = book_MKW.shape
        code_RM = _unpacked(picked(arrays["codes"], rows_R), parts, self.params.bits)
        at_RM = code_RM.long() + torch.arange(parts) * codes
        found = book_MKW.view(parts * codes, wide).index_select(0, at_RM.view(-1)).float()
        found_RMW = found.view(len(at_RM), parts, wide) * unit_M.unsqueeze(1)
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
            made.append(summed_RB * _longer(arrays["stretch"][part], arrays["ends"]).unsqueeze(1))
        return torch.cat(made).T

    def bytes_of(self, num_rows: int, dim: int) -> int:
        parts, wide, codes = self._shape(num_rows, dim)
        coded = -(-parts * int(self.params.bits) // 8)
        return num_rows * (coded + 1) + parts * codes * wide + 4 * parts + 8

    def error_bound(self, table_ND: Tensor) -> Tensor:
        if table_ND.numel() == 0:
            return torch.zeros(1)
        longest = float(table_ND.double().norm(dim=1).max())
        return table_ND.abs() + (MOST * longest * (1 + 2 / LEVELS) + LEVELS * TINY)

    def _shape(self, num_rows: int, dim: int) -> tuple[int, int, int]:
        """Parts, floats of a part, codes of a part."""
        wide = min(self.params.width, max(dim, 1))
        return -(-dim // wide), wide, min(1 << self.params.bits, num_rows)


def _joined(book_MKW: Tensor, code_BM: Tensor, longer_B: Tensor) -> Tensor:
    """Rows decoded from books of floats, float32[B, M * W]."""
    held_BMW = torch.stack([book_MKW[m][code_BM[:, m]] for m in range(len(book_MKW))], dim=1)
    return held_BMW.flatten(1) * longer_B.unsqueeze(1)


def _along(x_RD: Tensor, plain_RD: Tensor, long_R: Tensor) -> Tensor:
    """Lengths float64[R] with which decoded rows score as before for a query along the row."""
    along_R = (x_RD * plain_RD).sum(dim=1)
    found_R = torch.where(along_R > 0, x_RD.square().sum(dim=1) / along_R, long_R)
    return torch.clamp(found_R, LEAST * long_R, MOST * long_R)


def _stretched(length_R: Tensor, ends: Tensor) -> Tensor:
    """uint8[R] of which `_longer` is nearest, by ratio."""
    least, most = ends.double().clamp(min=TINY).log()
    length_R = length_R.double()
    share_R = (length_R.clamp(min=TINY).log() - least) / (most - least).clamp(min=1e-12)
    step_R = (share_R.clamp(0, 1) * STEPS).round_() + 1
    return torch.where(length_R < ends[0] / 2, 0.0, step_R).to(torch.uint8)


def _longer(stretch_R: Tensor, ends: Tensor) -> Tensor:
    """Lengths float32[R]."""
    least, most = ends.double().clamp(min=TINY).log()
    found_R = (least + (stretch_R.double() - 1) * ((most - least) / STEPS)).exp()
    return torch.where(stretch_R > 0, found_R, 0.0).float()


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

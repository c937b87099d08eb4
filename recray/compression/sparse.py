"""Only the values of greatest magnitude: which ones they are in a bit each, and those in eight bits.

Pruning without structure (Han, Pool, Tran & Dally 2015, arXiv 1506.02626) a row at a time, so that each row
is stored alone and in as many bytes as any other. It buys bytes and no time. `sparse:share=0.25`.
Shapes: N rows of D floats, R of them asked for, k values that a row keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recray.compression.codec import Arrays, Codec, CodecParams, picked
from recray.compression.int8 import LEVELS, TINY, peak
from recray.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SparseParams(CodecParams):
    """The share of a row's values that is kept."""

    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"sparse keeps a share of {self.share}", fix="give one above 0 and up to 1")


class Sparse(Codec):
    """value = code * scale[row] where the row's bit is set, else 0; scale = the row's peak / 127.

    N * (ceil(D / 8) + k + 4) bytes, k = ceil(share * D). Error: of a value that is kept as in `int8`, peak /
    254; of one that is not, the value, which is no greater than any that is kept.
    """

    name = "sparse"
    largest = 1e38
    Params = SparseParams

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        n, dim = table_ND.shape
        kept_ND = self._kept(table_ND)
        scale_N1 = peak(table_ND) / LEVELS
        codes_ND = (table_ND / scale_N1.clamp(min=TINY)).round_().clamp_(-LEVELS, LEVELS)
        return {
            "places": _packed(kept_ND),
            "codes": codes_ND[kept_ND].view(n, self._count(dim)).to(torch.int8),
            "scale": scale_N1.squeeze(1),
        }

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        kept_RD = _unpacked(picked(arrays["places"], rows_R), dim)
        values_Rk = picked(arrays["codes"], rows_R).float()
        values_Rk *= picked(arrays["scale"], rows_R).unsqueeze(1)
        return torch.zeros(kept_RD.shape).masked_scatter_(kept_RD, values_Rk)

    def bytes_of(self, num_rows: int, dim: int) -> int:
        return num_rows * (-(-dim // 8) + self._count(dim) + 4)

    def error_bound(self, table_ND: Tensor) -> Tensor:
        rounding_N1 = peak(table_ND) * (0.5 / LEVELS + 2.0**-22) + LEVELS * TINY
        return torch.where(self._kept(table_ND), rounding_N1, table_ND.abs())

    def _count(self, dim: int) -> int:
        """k of a row of D values."""
        share: float = self.params.share
        return math.ceil(share * dim)

    def _kept(self, table_ND: Tensor) -> Tensor:
        """bool[N, D]: the k of greatest magnitude of each row; among equal ones the first."""
        order_ND = table_ND.abs().argsort(dim=1, descending=True, stable=True)
        kept_ND = torch.zeros(table_ND.shape, dtype=torch.bool)
        return kept_ND.scatter_(1, order_ND[:, : self._count(table_ND.shape[1])], True)


def _packed(kept_ND: Tensor) -> Tensor:
    """Eight places a byte, the first in the lowest bit: uint8[N, ceil(D / 8)]."""
    n, dim = kept_ND.shape
    bits_NW8 = nn.functional.pad(kept_ND.to(torch.uint8), (0, -dim % 8)).view(n, -(-dim // 8), 8)
    return (bits_NW8 << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)


def _unpacked(places_RW: Tensor, dim: int) -> Tensor:
    """bool[R, D] of what `_packed` made."""
    bits_RW8 = (places_RW.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits_RW8.flatten(1)[:, :dim].bool()

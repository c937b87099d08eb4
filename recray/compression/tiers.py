"""Bits by use: the rows that are wanted most keep more of them, and the long tail shares a small codebook.

On a trained catalogue nearly all that is lost by coding is lost in the few rows that most lists are made
of: of lightgcn_gowalla's 40,981 items, coded in 32 bytes a row, 2,000 cost twenty times what all others do.
So rows are ordered by `weights_N` (by length where nobody knows), the first share goes to one codec, the
next to a second, and the rest to a third. Where a row lies is found in two sorted lists of the few.

Shapes: N rows of D floats, R of them asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recray.compression.askers import Askers
from recray.compression.codec import Arrays, Codec, CodecParams, codec_named
from recray.errors import ConfigError

TIERS = ("head", "middle", "tail")


@dataclass(frozen=True, kw_only=True)
class TiersParams(CodecParams):
    """The codec of each tier (`+` for a comma in it), and the shares of all rows of the first two."""

    head: str = "int4"
    head_share: float = 0.05
    middle: str = "pq:width=8"
    middle_share: float = 0.15
    tail: str = "pq:width=32"

    def __post_init__(self) -> None:
        if min(self.head_share, self.middle_share) < 0 or self.head_share + self.middle_share > 1:
            raise ConfigError(
                f"tiers have shares {self.head_share} and {self.middle_share}",
                fix="give shares of at least 0 that are at most 1 together",
            )
        for tier in TIERS:
            codec_named(getattr(self, tier).replace("+", ","))


class Tiers(Codec):
    """Four bytes for each row of the first two tiers, and the bytes of each codec for its rows.

    Error: that of the row's codec, so at most the largest of the three, over tables of those rows alone.
    """

    name = "tiers"
    Params = TiersParams

    def __init__(self, params: TiersParams | None = None) -> None:
        super().__init__(params)
        self.codecs = {tier: codec_named(getattr(self.params, tier).replace("+", ",")) for tier in TIERS}
        self.largest = min(codec.largest for codec in self.codecs.values())

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for tier, rows in self._tiers(table_ND, weights_N).items():
            shares = None if weights_N is None else weights_N[rows]
            found = self.codecs[tier].encode(table_ND[rows].contiguous(), shares)
            made |= {f"{tier}_{name}": array for name, array in found.items()}
            if tier != "tail":
                made[f"{tier}_rows"] = rows.int()
        return made

    @property
    def fits(self) -> bool:
        return any(codec.fits for codec in self.codecs.values())

    def refine(self, arrays: Arrays, table_ND: Tensor, askers: Askers) -> dict[str, Tensor]:
        made, tail_N = dict(arrays), torch.ones(len(table_ND), dtype=torch.bool)
        for tier in TIERS:
            rows = tail_N.nonzero()[:, 0] if tier == "tail" else arrays[f"{tier}_rows"].long()
            tail_N[rows] = False
            if len(rows) and self.codecs[tier].fits:
                held, table_TD = _part(arrays, tier), table_ND[rows].contiguous()
                held.pop("rows", None)
                found = self.codecs[tier].refine(held, table_TD, askers.take(rows))
                made |= {f"{tier}_{name}": array for name, array in found.items()}
        return made

    def _tiers(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        """The rows of each tier, ascending."""
        wanted_N = table_ND.double().norm(dim=1) if weights_N is None else weights_N
        order_N = wanted_N.argsort(descending=True, stable=True)
        parts = order_N.split(self._counts(len(order_N)))
        return {tier: rows.sort().values for tier, rows in zip(TIERS, parts)}

    def _counts(self, num_rows: int) -> list[int]:
        head = min(num_rows, math.ceil(self.params.head_share * num_rows))
        middle = min(num_rows - head, math.ceil(self.params.middle_share * num_rows))
        return [head, middle, num_rows - head - middle]

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        held = {tier: _part(arrays, tier) for tier in TIERS}
        if rows_R is None:
            tail_TD = self.codecs["tail"].decode(held["tail"], None, dim)
            total = len(tail_TD) + sum(len(arrays[f"{tier}_rows"]) for tier in TIERS[:2])
            found_ND = torch.empty(total, dim)
            left_N = torch.ones(total, dtype=torch.bool)
            for tier in TIERS[:2]:
                rows = arrays[f"{tier}_rows"].long()
                found_ND[rows] = self.codecs[tier].decode(held[tier], None, dim)
                left_N[rows] = False
            found_ND[left_N] = tail_TD
            return found_ND
        found_RD = torch.empty(len(rows_R), dim)
        left_R, place_R = torch.ones(len(rows_R), dtype=torch.bool), rows_R.clone()
        for tier in TIERS[:2]:
            listed = arrays[f"{tier}_rows"]
            at_R = torch.searchsorted(listed, rows_R.int())
            place_R -= at_R  # how many rows of this tier lie before: in the tail's own count they are not
            is_R = torch.zeros_like(left_R)
            if len(listed):
                is_R = listed[at_R.clamp(max=len(listed) - 1)] == rows_R
            if is_R.any():
                found_RD[is_R] = self.codecs[tier].decode(held[tier], at_R[is_R], dim)
                left_R &= ~is_R
        if left_R.any():
            found_RD[left_R] = self.codecs["tail"].decode(held["tail"], place_R[left_R], dim)
        return found_RD

    def bytes_of(self, num_rows: int, dim: int) -> int:
        counts = self._counts(num_rows)
        coded = sum(self.codecs[tier].bytes_of(count, dim) for tier, count in zip(TIERS, counts))
        return coded + 4 * (counts[0] + counts[1])

    def error_bound(self, table_ND: Tensor) -> Tensor:
        bound_ND = torch.zeros(table_ND.shape, dtype=torch.float64)
        for tier, rows in self._tiers(table_ND).items():
            bound_ND[rows] = self.codecs[tier].error_bound(table_ND[rows]).double().expand(len(rows), -1)
        return bound_ND


def _part(arrays: Arrays, tier: str) -> dict[str, Tensor]:
    start = f"{tier}_"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}

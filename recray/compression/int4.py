"""Four bits a value, two values a byte, and a half-precision scale for each 32 values of a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recray.compression.codec import Arrays, Codec, picked
from recray.compression.int8 import TINY, peak

LEVELS = 7
GROUP = 32  # values that share a scale
TOP = 2.0**15  # where the largest scale of a table lies in half precision


class Int4(Codec):
    """value = code * scale[row, group] * unit, code in -7 .. 7, scale * unit = the group's peak / 7.

    `unit` is one float32 a table, so that the half-precision scales keep their precision whatever
    the table's magnitude. The first half of a row's values lies in the low nibbles and the second
    half in the high ones. N * (ceil(D / 2) + 2 ceil(D / 32)) + 4 bytes; error at most half a step,
    group peak / 14, plus the rounding of the scale, group peak / 2048 + table peak * 2^-37.
    """

    name = "int4"
    largest = 1e38

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        dim = table_ND.shape[1]
        step_NG = peak(_grouped(table_ND)).squeeze(2) / LEVELS
        top = step_NG.max() if step_NG.numel() else table_ND.new_zeros(())
        unit = (top / TOP).clamp(min=TINY)
        scale_NG = (step_NG / unit).half()
        spread_ND = _spread(scale_NG.float() * unit, dim)
        codes_ND = (table_ND / spread_ND.clamp(min=TINY)).round_().clamp_(-LEVELS, LEVELS)
        nibbles_NW = nn.functional.pad(codes_ND + 8, (0, dim % 2)).to(torch.uint8)
        half = nibbles_NW.shape[1] // 2
        packed = nibbles_NW[:, :half] | (nibbles_NW[:, half:] << 4)
        return {"codes": packed, "scale": scale_NG, "unit": unit.reshape(1)}

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        packed_RH = picked(arrays["codes"], rows_R)
        scale_RG = picked(arrays["scale"], rows_R).float() * arrays["unit"]
        nibbles_RW = torch.cat([packed_RH & 15, packed_RH >> 4], dim=1)
        return nibbles_RW[:, :dim].float().sub_(8.0).mul_(_spread(scale_RG, dim))

    def bytes_of(self, num_rows: int, dim: int) -> int:
        return num_rows * (-(-dim // 2) + 2 * -(-dim // GROUP)) + 4

    def error_bound(self, table_ND: Tensor) -> Tensor:
        dim = table_ND.shape[1]
        if table_ND.numel() == 0:
            return torch.zeros(1)
        group_NG = peak(_grouped(table_ND)).squeeze(2)
        floor = table_ND.abs().max() * 2.0**-37 + 2 * LEVELS * TINY * TOP
        return _spread(group_NG * (0.5 / LEVELS + 2.0**-11 + 2.0**-20), dim) + floor


def _grouped(table_ND: Tensor) -> Tensor:
    """[N, D] -> [N, G, 32], the last group padded with zeros."""
    n, dim = table_ND.shape
    return nn.functional.pad(table_ND, (0, -dim % GROUP)).view(n, -(-dim // GROUP), GROUP)


def _spread(value_NG: Tensor, dim: int) -> Tensor:
    """One value a group -> one a dimension, [N, D]."""
    n, groups = value_NG.shape
    return value_NG.unsqueeze(2).expand(n, groups, GROUP).reshape(n, groups * GROUP)[:, :dim]

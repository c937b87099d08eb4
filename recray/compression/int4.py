"""Four bits a value, two values a byte, and a half-precision scale for each 32 values of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recray.compression.askers import Askers, best_levels, wrong
from recray.compression.codec import Arrays, Codec, CodecParams, picked
from recray.compression.int8 import TINY, peak
from recray.errors import ConfigError

LEVELS = 7
GROUP = 32  # values that share a scale
TOP = 2.0**15  # where the largest scale of a table lies in half precision


@dataclass(frozen=True, kw_only=True)
class Int4Params(CodecParams):
    """fit: how often each value is rounded anew for those who ask, where they are known (`askers.py`)."""

    fit: int = 0

    def __post_init__(self) -> None:
        if self.fit < 0:
            raise ConfigError(f"int4 is fitted {self.fit} times", fix="give 0 or more")


class Int4(Codec):
    """value = code * scale[row, group] * unit, code in -7 .. 7, scale * unit = the group's peak / 7.

    `unit` is one float32 a table, so that the half-precision scales keep their precision whatever
    the table's magnitude. The first half of a row's values lies in the low nibbles and the second
    half in the high ones. N * (ceil(D / 2) + 2 ceil(D / 32)) + 4 bytes; error at most half a step,
    group peak / 14, plus the rounding of the scale, group peak / 2048 + table peak * 2^-37. With `fit` a
    value may go to the level on its other side, so that its error is at most twice that.
    """

    name = "int4"
    largest = 1e38
    Params = Int4Params

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        dim = table_ND.shape[1]
        step_NG = peak(_grouped(table_ND)).squeeze(2) / LEVELS
        top = step_NG.max() if step_NG.numel() else table_ND.new_zeros(())
        unit = (top / TOP).clamp(min=TINY)
        scale_NG = (step_NG / unit).half()
        spread_ND = _spread(scale_NG.float() * unit, dim)
        codes_ND = (table_ND / spread_ND.clamp(min=TINY)).round_().clamp_(-LEVELS, LEVELS)
        return {"codes": _packed(codes_ND), "scale": scale_NG, "unit": unit.reshape(1)}

    def refine(self, arrays: Arrays, table_ND: Tensor, askers: Askers) -> dict[str, Tensor]:
        """Each value up or down, by coordinate descent; a row that gains nothing stays."""
        n, dim = table_ND.shape
        codes_NH = arrays["codes"].clone()
        for start in range(0, n, askers.block):
            at = slice(start, min(start + askers.block, n))
            metric_BDD, x_BD = askers.metric(at.start, at.stop), table_ND[at]
            step_BD = _spread(arrays["scale"][at].float() * arrays["unit"], dim).clamp(min=TINY)
            level_BD = _levels(codes_NH[at], dim)
            new_BD = best_levels(x_BD, metric_BDD, level_BD, step_BD, LEVELS, self.params.fit)
            gained_B = wrong(new_BD * step_BD - x_BD, metric_BDD) < wrong(
                level_BD * step_BD - x_BD, metric_BDD
            )
            codes_NH[at][gained_B] = _packed(new_BD)[gained_B]
        return {**arrays, "codes": codes_NH}

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        scale_RG = picked(arrays["scale"], rows_R).float() * arrays["unit"]
        return _levels(picked(arrays["codes"], rows_R), dim).mul_(_spread(scale_RG, dim))

    def bytes_of(self, num_rows: int, dim: int) -> int:
        return num_rows * (-(-dim // 2) + 2 * -(-dim // GROUP)) + 4

    def error_bound(self, table_ND: Tensor) -> Tensor:
        dim = table_ND.shape[1]
        if table_ND.numel() == 0:
            return torch.zeros(1)
        group_NG = peak(_grouped(table_ND)).squeeze(2) * (2 if self.params.fit else 1)
        floor = table_ND.abs().max() * 2.0**-37 + 2 * LEVELS * TINY * TOP
        return _spread(group_NG * (0.5 / LEVELS + 2.0**-11 + 2.0**-20), dim) + floor


def _packed(levels_ND: Tensor) -> Tensor:
    """Levels -7 .. 7 as bytes, uint8[N, ceil(D / 2)]."""
    nibbles_NW = nn.functional.pad(levels_ND + 8, (0, levels_ND.shape[1] % 2)).to(torch.uint8)
    half = nibbles_NW.shape[1] // 2
    return nibbles_NW[:, :half] | (nibbles_NW[:, half:] << 4)


def _levels(packed_RH: Tensor, dim: int) -> Tensor:
    """float32[R, D] of what `_packed` made."""
    nibbles_RW = torch.cat([packed_RH & 15, packed_RH >> 4], dim=1)
    return nibbles_RW[:, :dim].float().sub_(8.0)


def _grouped(table_ND: Tensor) -> Tensor:
    """[N, D] -> [N, G, 32], the last group padded with zeros."""
    n, dim = table_ND.shape
    return nn.functional.pad(table_ND, (0, -dim % GROUP)).view(n, -(-dim // GROUP), GROUP)


def _spread(value_NG: Tensor, dim: int) -> Tensor:
    """One value a group -> one a dimension, [N, D]."""
    n, groups = value_NG.shape
    return value_NG.unsqueeze(2).expand(n, groups, GROUP).reshape(n, groups * GROUP)[:, :dim]

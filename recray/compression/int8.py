"""Eight bits a value and one float32 scale a row, symmetric about zero."""

from __future__ import annotations

import torch
from torch import Tensor

from recray.compression.codec import Arrays, Codec, picked

LEVELS = 127
TINY = 2.0**-126  # the least normal float32: smaller scales may be flushed to zero


class Int8(Codec):
    """value = code * scale[row], code in -127 .. 127, scale = the row's peak / 127.

    N * (D + 4) bytes; error at most half a step, peak / 254, and the rounding of the product.
    """

    name = "int8"
    largest = 1e38

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        scale_N1 = peak(table_ND) / LEVELS
        codes_ND = (table_ND / scale_N1.clamp(min=TINY)).round_().clamp_(-LEVELS, LEVELS)
        return {"codes": codes_ND.to(torch.int8), "scale": scale_N1.squeeze(1)}

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        scale_R1 = picked(arrays["scale"], rows_R).unsqueeze(1)
        return picked(arrays["codes"], rows_R).float().mul_(scale_R1)

    def bytes_of(self, num_rows: int, dim: int) -> int:
        return num_rows * (dim + 4)

    def error_bound(self, table_ND: Tensor) -> Tensor:
        return peak(table_ND) * (0.5 / LEVELS + 2.0**-22) + LEVELS * TINY


def peak(table_ND: Tensor) -> Tensor:
    """The greatest magnitude along the last dimension, kept; zero where that dimension is empty."""
    if table_ND.shape[-1] == 0:
        return table_ND.new_zeros(*table_ND.shape[:-1], 1)
    return table_ND.abs().amax(dim=-1, keepdim=True)

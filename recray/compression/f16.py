"""IEEE half precision: two bytes a value."""

from __future__ import annotations

import torch
from torch import Tensor

from recray.compression.codec import Arrays, Codec, picked


class F16(Codec):
    """N * D * 2 bytes; error at most 2^-11 of the value, and 2^-25 below the normal range."""

    name = "f16"
    largest = torch.finfo(torch.float16).max

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        return {"values": table_ND.half()}

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        return picked(arrays["values"], rows_R).float()

    def bytes_of(self, num_rows: int, dim: int) -> int:
        return num_rows * dim * 2

    def error_bound(self, table_ND: Tensor) -> Tensor:
        return table_ND.abs() * 2.0**-11 + 2.0**-25

"""The table as it is: four bytes a value."""

from __future__ import annotations

import torch
from torch import Tensor

from recray.compression.codec import Arrays, Codec, picked


class F32(Codec):
    """Lossless: N * D * 4 bytes."""

    name = "f32"
    largest = torch.finfo(torch.float32).max

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        return {"values": table_ND}

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        return picked(arrays["values"], rows_R)

    def bytes_of(self, num_rows: int, dim: int) -> int:
        return num_rows * dim * 4

    def error_bound(self, table_ND: Tensor) -> Tensor:
        return torch.zeros(1)

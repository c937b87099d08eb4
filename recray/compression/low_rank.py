"""Fewer dimensions: rows as combinations of a few axes, the numbers of which another codec stores.

The axes are those that keep most of the rows' squares (singular vectors, from the D x D products), each
row counted as often as it is wanted. `low-rank:share=0.5,values=int8`.
Shapes: N rows of D floats, R of them asked for, r axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from recray.compression.askers import Askers
from recray.compression.codec import Arrays, Codec, CodecParams, codec_named
from recray.errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True)
class LowRankParams(CodecParams):
    """The share of the dimensions, and the codec of what lies along the axes (`+` for a comma in it)."""

    share: float = 0.5
    values: str = "int8"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ConfigError(f"low-rank keeps a share of {self.share}", fix="give one above 0 and up to 1")
        codec_named(self.values.replace("+", ","))


class LowRank(Codec):
    """The axes in half precision, D * r * 2 bytes, and the bytes of the other codec for N rows of r.

    Error: what lies beside the axes, and the other codec's error along them.
    """

    name = "low-rank"
    largest = 1e15
    Params = LowRankParams

    def __init__(self, params: LowRankParams | None = None) -> None:
        super().__init__(params)
        self.inner = codec_named(self.params.values.replace("+", ","))

    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        axes_Dr = self._axes(table_ND, weights_N)
        along_Nr = (table_ND @ axes_Dr.float()).contiguous()
        if along_Nr.numel() and float(peak := along_Nr.abs().max()) > self.inner.largest:
            words = f"a value of {peak:.3g} along the axes is too large for {self.inner.name}"
            raise InputError(words, fix="choose another codec")
        found = self.inner.encode(along_Nr, weights_N)
        return {"axes": axes_Dr, **{f"along_{name}": array for name, array in found.items()}}

    @property
    def fits(self) -> bool:
        return self.inner.fits

    def refine(self, arrays: Arrays, table_ND: Tensor, askers: Askers) -> dict[str, Tensor]:
        axes_Dr = arrays["axes"].float()
        held = {name.removeprefix("along_"): a for name, a in arrays.items() if name != "axes"}
        found = self.inner.refine(held, (table_ND @ axes_Dr).contiguous(), askers.along(axes_Dr))
        return {"axes": arrays["axes"], **{f"along_{name}": array for name, array in found.items()}}

    def _axes(self, table_ND: Tensor, weights_N: Tensor | None = None) -> Tensor:
        """float16[D, r], orthonormal up to their rounding."""
        dim = table_ND.shape[1]
        if not len(table_ND):
            return torch.zeros(dim, self._count(dim), dtype=torch.float16)
        x_ND = table_ND.double()
        shares_N1 = torch.ones(1, 1) if weights_N is None else (weights_N.double() + 1).unsqueeze(1)
        _, axes_DD = torch.linalg.eigh((x_ND * shares_N1).T @ x_ND)
        axes_Dr: Tensor = axes_DD.flip(1)[:, : self._count(dim)].half()
        return axes_Dr.contiguous()

    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        axes_Dr = arrays["axes"].double()  # so precisely that a row is the same in every company
        held = {name.removeprefix("along_"): a for name, a in arrays.items() if name != "axes"}
        return torch.mm(self.inner.decode(held, rows_R, axes_Dr.shape[1]).double(), axes_Dr.T).float()

    def scores(self, arrays: Arrays, queries_BD: Tensor, dim: int) -> Tensor:
        """Along the axes, which is less work."""
        held = {name.removeprefix("along_"): a for name, a in arrays.items() if name != "axes"}
        axes_Dr = arrays["axes"].float()
        return self.inner.scores(held, queries_BD @ axes_Dr, axes_Dr.shape[1])

    def bytes_of(self, num_rows: int, dim: int) -> int:
        axes = self._count(dim)
        return self.inner.bytes_of(num_rows, axes) + 2 * dim * axes

    def _count(self, dim: int) -> int:
        """r of a table of D dimensions."""
        share: float = self.params.share
        return math.ceil(share * dim)

    def error_bound(self, table_ND: Tensor) -> Tensor:
        axes_Dr = self._axes(table_ND).float()
        along_Nr = table_ND @ axes_Dr
        beside_ND = (table_ND.double() - along_Nr.double() @ axes_Dr.double().T).abs()
        inner_ND = self.inner.error_bound(along_Nr).double().expand(along_Nr.shape) @ axes_Dr.double().abs().T
        slack_N1 = along_Nr.double().abs().sum(dim=1, keepdim=True) * 2.0**-20
        return beside_ND + inner_ND + slack_N1

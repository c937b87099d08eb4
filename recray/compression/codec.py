"""Tables in fewer bits: a codec turns float32[N, D] into a few arrays and any of its rows back.

A codec is written NAME or NAME:key=value,key=value, as in `pq:width=4`. Codecs store each row on its
own, so that a request decodes the rows it reads and no others.
Shapes: N rows of D floats, R of them asked for.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recray import config
from recray.compression.askers import Askers
from recray.errors import ArtefactError, InputError
from recray.models.embeddings import Table

CODECS = {  # name -> module:class, imported when asked for
    "f32": "recray.compression.f32:F32",
    "f16": "recray.compression.f16:F16",
    "int8": "recray.compression.int8:Int8",
    "int4": "recray.compression.int4:Int4",
    "pq": "recray.compression.pq:PQ",
    "low-rank": "recray.compression.low_rank:LowRank",
    "sparse": "recray.compression.sparse:Sparse",
    "tiers": "recray.compression.tiers:Tiers",
}

Arrays = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CodecParams:
    """Base of each codec's own frozen parameters (`Codec.Params`)."""


class Codec(ABC):
    """How one table is stored. Nothing but its parameters: what a table needs lies in its arrays."""

    name: ClassVar[str]
    largest: float  # the greatest magnitude that can be stored
    Params: ClassVar[type[CodecParams]] = CodecParams

    def __init__(self, params: Any = None) -> None:
        self.params: Any = self.Params() if params is None else params

    @property
    def text(self) -> str:
        """How it is written, with all its parameters: what `codec_named` reads."""
        words = [f"{key}={value}" for key, value in config.as_dict(self.params).items()]
        return f"{self.name}:{','.join(words)}" if words else self.name

    @abstractmethod
    def encode(self, table_ND: Tensor, weights_N: Tensor | None = None) -> dict[str, Tensor]:
        """The arrays of a finite float32[N, D] (see `encode_table`, which checks it).

        weights_N: how often each row is wanted, float32[N] >= 0; None where nobody knows.
        """

    @property
    def fits(self) -> bool:
        """Whether `refine` does anything."""
        return bool(getattr(self.params, "fit", 0))

    def refine(self, arrays: Arrays, table_ND: Tensor, askers: Askers) -> dict[str, Tensor]:
        """Arrays of the same sizes whose rows score better for those who ask; by default the same.

        Of a codec whose parameter `fit` is above 0: so many times each code is chosen anew (`askers.py`).
        """
        return dict(arrays)

    @abstractmethod
    def decode(self, arrays: Arrays, rows_R: Tensor | None, dim: int) -> Tensor:
        """float32[R, D] of the rows int64[R] (all of them >= 0), or of every row."""

    def scores(self, arrays: Arrays, queries_BD: Tensor, dim: int) -> Tensor:
        """Inner products with every row, float32[B, N]; some codecs have them without decoding."""
        return queries_BD @ self.decode(arrays, None, dim).T

    @abstractmethod
    def bytes_of(self, num_rows: int, dim: int) -> int:
        """Bytes of the arrays of such a table, exact."""

    @abstractmethod
    def error_bound(self, table_ND: Tensor) -> Tensor:
        """A bound on |decoded - table| for each element, broadcastable to float32[N, D]."""


def codec_named(text: str) -> Codec:
    """The codec that is written so; an unknown name or parameter raises ConfigError naming the nearest."""
    name, _, words = text.partition(":")
    if name not in CODECS:
        raise config.unknown_name("codec", name, CODECS)
    module, _, attribute = CODECS[name].partition(":")
    cls: type[Codec] = getattr(importlib.import_module(module), attribute)
    pairs = [word.partition("=") for word in words.split(",") if word]
    given = {key.strip(): value.strip() for key, _, value in pairs}
    return cls(config.build(cls.Params, given, where=name))


class CodedTable(Table):
    """A table whose rows stay encoded; `forward` decodes only what it is asked for."""

    def __init__(self, codec: Codec, arrays: Arrays, num_rows: int, dim: int) -> None:
        super().__init__()
        self.codec, self.num_rows, self.dim = codec, num_rows, dim
        self._names = tuple(arrays)
        for name, array in arrays.items():
            self.register_buffer(name, array)

    @property
    def arrays(self) -> dict[str, Tensor]:
        held = self._buffers  # read at every request: not by walking the module
        return {name: array for name in self._names if (array := held[name]) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; a saved file adds its header of a few hundred."""
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def forward(self, rows: Tensor) -> Tensor:
        flat_R = rows.reshape(-1)
        if self.num_rows == 0:
            return torch.zeros(*rows.shape, self.dim)
        lost_R = flat_R < 0
        if not bool(lost_R.any()):  # of candidates none is, and there are many
            return self.codec.decode(self.arrays, flat_R, self.dim).view(*rows.shape, self.dim)
        found_RD = self.codec.decode(self.arrays, flat_R.clamp(min=0), self.dim)
        found_RD.masked_fill_(lost_R.unsqueeze(-1), 0.0)
        return found_RD.view(*rows.shape, self.dim)

    def dense(self) -> Tensor:
        return self.codec.decode(self.arrays, None, self.dim)

    def scores(self, queries_BD: Tensor) -> Tensor:
        """Inner products of float32[B, D] with every row, float32[B, N]."""
        return self.codec.scores(self.arrays, queries_BD, self.dim)

    def save(self, path: Path) -> None:
        """One safetensors file, the codec's name and the table's shape in its header."""
        about = {"codec": self.codec.text, "rows": str(self.num_rows), "dim": str(self.dim)}
        save_file({name: a.contiguous() for name, a in self.arrays.items()}, path, metadata=about)

    @staticmethod
    def load(path: Path) -> CodedTable:
        """What `save` wrote; anything else raises ArtefactError."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            codec, num_rows, dim = codec_named(about["codec"]), int(about["rows"]), int(about["dim"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ArtefactError(f"is not an encoded table ({error})", where=path) from None
        made = CodedTable(codec, arrays, num_rows, dim)
        if made.nbytes != codec.bytes_of(num_rows, dim):
            raise ArtefactError(f"does not hold {num_rows} rows of {dim} as {codec.text}", where=path)
        return made


def encode_table(
    codec: str | Codec, table_ND: Tensor, weights_N: Tensor | None = None, askers: Askers | None = None
) -> CodedTable:
    """Encode float32[N, D]; `weights_N` float32[N] >= 0 says how often each row is wanted.

    askers: who asks for these N rows, for codecs with `fit`; without them nothing is fitted.
    A value that is not finite or too large for the codec raises InputError.
    """
    made = codec_named(codec) if isinstance(codec, str) else codec
    table_ND = table_ND.detach().float().contiguous()
    if table_ND.ndim != 2:
        raise ValueError(f"a table has two dimensions, not {tuple(table_ND.shape)}")
    if table_ND.numel():
        low, high = torch.aminmax(table_ND)
        bad = ~torch.isfinite(table_ND).all(dim=1) if not torch.isfinite(high - low) else None
        if bad is not None and bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InputError(f"row {row} of the table is not finite", fix="train with a smaller train.lr")
        peak = float(torch.maximum(high, -low))
        if peak > made.largest:
            raise InputError(
                f"a table value of {peak:.3g} is too large for {made.name}", fix="choose another codec"
            )
    arrays = made.encode(table_ND, weights_N)
    if askers is not None and made.fits and table_ND.numel():
        if (len(askers), askers.dim) != tuple(table_ND.shape):
            raise ValueError(f"{len(askers)} rows of {askers.dim} are asked for, not {tuple(table_ND.shape)}")
        arrays = made.refine(arrays, table_ND, askers)
    return CodedTable(made, arrays, *table_ND.shape)


def picked(array: Tensor, rows_R: Tensor | None) -> Tensor:
    """The asked rows of a per-row array, or all."""
    return array if rows_R is None else array.index_select(0, rows_R)

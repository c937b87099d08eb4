"""What changed in a catalogue since its index was built: new rows behind the old ones, and withdrawn ones.

The index stays as it is. New rows are searched exactly beside it and the lists made one; withdrawn rows are
kept out as a filter keeps them out, so what an index promises of filters holds. A delta never changes: the
next one is made of it, and whoever searches keeps the one they have.

Shapes: B queries, N rows of the index, M new ones, D floats, k asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from recray.errors import ArtefactError
from recray.models.embeddings import DenseTable
from recray.retrieval.index import Found, Index, ordered, scan

FILE = "delta.safetensors"


class Delta:
    """M new rows N .. N + M - 1, with vectors float32[M, D], and the rows that are withdrawn."""

    def __init__(
        self, n: int, vectors_MD: NDArray[np.float32] | None = None, withdrawn: Iterable[int] = ()
    ) -> None:
        self.n = n
        self.vectors_MD = (
            np.zeros((0, 1), np.float32) if vectors_MD is None else vectors_MD.astype(np.float32)
        )
        self.withdrawn = np.unique(np.fromiter(withdrawn, np.int64))
        self._table = DenseTable.of(torch.from_numpy(self.vectors_MD))
        self._live = np.ones(len(self), bool)
        self._live[self.withdrawn] = False

    def __len__(self) -> int:
        """N + M"""
        return self.n + len(self.vectors_MD)

    def left(self, allowed: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
        """bool[N + M]: what is allowed (bool[N + M], None for all) and not withdrawn."""
        return self._live if allowed is None else self._live & allowed

    def search(self, index: Index, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None) -> Found:
        """`Index.search` over all rows but the withdrawn."""
        left = self.left(allowed)
        old = None if left[: self.n].all() else left[: self.n]
        scores, rows = index.search(queries_BD, min(k, self.n), old)
        new = np.flatnonzero(left[self.n :])
        if len(new):
            more, at = scan(self._table, queries_BD.float().contiguous(), new, k)
            rows = np.concatenate([rows, np.where(at >= 0, at + self.n, -1)], axis=1)
            scores = np.concatenate([scores, more], axis=1)
        return ordered(scores, rows, k)

    def vectors(self, index: Index, rows_P: NDArray[np.int64]) -> Tensor:
        """The vectors of old and new rows, float32[P, D]."""
        rows = torch.from_numpy(rows_P)
        found: Tensor = index.table(rows.clamp(max=self.n - 1)).float()
        if not len(self.vectors_MD):
            return found
        new = self._table((rows - self.n).clamp(min=0))
        return torch.where((rows >= self.n).unsqueeze(1), new, found)

    def unit(self) -> Delta:
        """The same with vectors of length 1, for an index over such."""
        lengths = np.linalg.norm(self.vectors_MD, axis=1, keepdims=True)
        return Delta(self.n, self.vectors_MD / np.maximum(lengths, 1e-12), self.withdrawn.tolist())

    def save(self, folder: Path) -> None:
        """One file: vectors, withdrawn rows and N."""
        held = {"vectors": self.vectors_MD, "withdrawn": self.withdrawn, "n": np.array([self.n])}
        save_file(held, folder / FILE)

    @staticmethod
    def load(folder: Path, n: int) -> Delta:
        """What `save` wrote, for an index of n rows. Raises ArtefactError for anything else."""
        try:
            held = load_file(folder / FILE)
            made = Delta(int(held["n"][0]), held["vectors"], held["withdrawn"].tolist())
        except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
            raise ArtefactError(f"is not a delta ({error})", where=folder / FILE) from None
        if made.n != n:
            raise ArtefactError(f"is of {made.n} rows, the index has {n}", where=folder / FILE)
        return made

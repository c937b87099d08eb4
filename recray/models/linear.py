"""EASE: a linear model of items by items in closed form (Steck 2019, arXiv 1905.03375, equation 8).

With X the binary user-item matrix, the weights that minimize

    || X - X B ||^2 + reg ||B||^2      with diag(B) = 0
    P = (X^T X + reg I)^-1,   B_ij = -P_ij / P_jj,   B_jj = 0;      score(h, j) = sum over i in h of B_ij

P is made in place: one N x N float32 array, its Cholesky factor and its inverse are the same memory. Of
B the `neighbours` greatest weights of each row i (what item i says for others) are kept, which is the whole
state. Weights below zero go, since a few of them without the rest do harm: on lightgcn_gowalla (its 8,000
most popular items, a validation split cut from train, recall@20) all weights gave .3234, of each row the 200
greatest .3264 and the 100 greatest .3241, but the 200 and 100 of greatest magnitude .3220 and .3214.

N^2 is the limit: where it does not fit, `items` learns the most popular ones only, and the others neither
say anything nor are recommended.

Shapes: U users, N items, M of them learned, K weights kept of an item, B users asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from recray.errors import ConfigError
from recray.memory import free_memory
from recray.models.base import Catalogue, ModelConfig
from recray.models.neighbours import CELLS, ItemWeights, in_blocks, pairs_of, strongest_dense
from recray.models.ranks import Alone

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_TILE = 2048


class EASE(ItemWeights):
    """Item-to-item weights by one inverse, the greatest of each row."""

    name = "ease"

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        reg: float = 300.0
        neighbours: int = 200
        items: int = 0  # learn so many of the most popular; 0 = all
        memory_gib: float = 0.0  # that the fit may use; 0 = what is free

    config: EASE.Config

    def __init__(self, catalogue: Catalogue, config: EASE.Config) -> None:
        super().__init__(catalogue, config, config.neighbours)
        if config.neighbours < 1 or min(config.items, config.memory_gib) < 0 or not config.reg > 0:
            raise ConfigError(
                "neighbours must be at least 1, reg above 0, items and memory_gib at least 0", where="options"
            )

    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        """Solve for all weights, keep the strongest. Raises ConfigError where N^2 floats do not fit."""
        c, k = self.config, self.kept
        learned = min(c.items or self.n_items, self.n_items)
        free = int(c.memory_gib * 2**30) or free_memory()
        if memory_needed(learned) > free:
            raise ConfigError(
                f"ease needs {memory_needed(learned) / 2**30:.1f} GiB for {learned:,} items and "
                f"{free / 2**30:.1f} GiB are free",
                fix=f"set options.items={most_items(free)} for the most popular alone, or train item-knn, "
                "spectral or ials, whose memory grows with the log",
            )
        matrix = pairs_of(data.histories("train"), self.n_items)
        counts = np.bincount(matrix.indices, minlength=self.n_items)
        chosen = np.sort(np.argsort(-counts, kind="stable")[:learned])
        inverse = inverse_gram(matrix[:, chosen], c.reg)
        scale = torch.from_numpy(-1 / inverse.diagonal())

        def make(start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
            block = torch.from_numpy(inverse[start:stop]) * scale
            block[torch.arange(stop - start), torch.arange(start, stop)] = 0
            return strongest_dense(block, k)

        rows, weights = in_blocks(make, learned, k, Alone())
        self.keep((np.where(rows >= 0, chosen[rows], -1).astype(np.int32), weights), chosen)
        return {"items": float(learned), "weights": float((rows >= 0).sum())}


def memory_needed(items: int) -> int:
    """Bytes of a fit: the one square array, and blocks of its lines while it is filled and read."""
    return 4 * items**2 + 5 * 4 * max(CELLS, items) + (64 << 20)


def most_items(memory: int) -> int:
    """The most items whose fit needs at most so many bytes, rounded down to hundreds where there are any."""
    low, high = 0, 1 << 24
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory_needed(middle) <= memory else (low, middle)
    return low // 100 * 100 or low


def inverse_gram(matrix: Any, reg: float) -> NDArray[np.float32]:
    """(X^T X + reg I)^-1 of a csr float32[U, M], float32[M, M], in the memory of one such array."""
    from scipy.linalg import lapack

    m = matrix.shape[1]
    columns = matrix.T.tocsr()
    gram = np.empty((m, m), np.float32)
    step = max(1, CELLS // max(m, 1))
    for start in range(0, m, step):
        gram[start : start + step] = (columns[start : start + step] @ matrix).toarray()
    gram[np.arange(m), np.arange(m)] += np.float32(reg)
    # a symmetric array is its own transpose, and that is how LAPACK wants it: column after column
    factor, failed = lapack.spotrf(gram.T, lower=1, clean=0, overwrite_a=1)
    if failed:
        raise ConfigError("ease has no solution in float32", where="options.reg", fix="give a larger one")
    inverse, _ = lapack.spotri(factor, lower=1, overwrite_c=1)
    assert np.shares_memory(inverse, gram)
    for start in range(0, m, _TILE):  # LAPACK fills one triangle; the other follows tile by tile
        rows = slice(start, start + _TILE)
        tile = gram[rows, rows]
        tile[...] = np.triu(tile) + np.triu(tile, 1).T
        for other in range(start + _TILE, m, _TILE):
            gram[other : other + _TILE, rows] = gram[rows, other : other + _TILE].T
    return gram

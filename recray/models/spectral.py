"""A graph filter without a graph network: one linear map of histories (Shen et al. 2021, "How powerful is
graph convolution for recommendation?", arXiv 2108.07567; sharpening: Choi et al. 2023, arXiv 2211.09324).

With X the binary user-item matrix, d its users' and items' numbers of pairs, R = D_U^-1/2 X D_I^-1/2, and
V the right singular vectors of its `dim` greatest singular values s (the smooth signals of the graph):

    W0   = K                                              local filter: each item's nearest, as in item_knn.py
    W1   = W0 + low D_I^-1/2 V V^T D_I^1/2                ideal low-pass filter
    W    = W1 (I + V diag(exp(-sharpen s^2) - 1) V^T)     sharpening: exp(-sharpen R^T R) on what is smooth
    score(h) = x_h W

GF-CF has K = R^T R and no sharpening, BSPM the same K and a polynomial of R^T R. Here K_ij = <r_i, r_j> /
(||r_i||^2a ||r_j||^2(1-a)) with r_i the columns of D_U^-1/2 X (R^T R has a = 1/2 and degrees for lengths),
of each row the `neighbours` greatest, and scaled so that all histories get as much from K as from R^T R.

W is made a block of lines at a time and cut to the `neighbours` greatest of each, so the state is that of
item-knn and a history is answered by one sparse product. (One dot product alone is not enough: the local
part has no short factors, the best 512 lose a tenth of the recall on lightgcn_gowalla.) The work is N^2 D.

Shapes: U users, N items, K weights kept of an item, D dims of the filter, B users asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig
from recray.models.ials_solve import pool
from recray.models.item_knn import nearest, weighted
from recray.models.neighbours import Block, ItemWeights, in_blocks, pairs_of, strongest_dense, truncated_svd
from recray.models.ranks import Alone, Ranks

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class Spectral(ItemWeights):
    """Item-to-item weights, the strongest of each row."""

    name = "spectral"
    shares_fit = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 256
        neighbours: int = 500
        alpha: float = 0.7
        low: float = 0.3
        sharpen: float = 0.5

    config: Spectral.Config

    def __init__(self, catalogue: Catalogue, config: Spectral.Config) -> None:
        super().__init__(catalogue, config, config.neighbours)
        if min(config.dim, config.neighbours) < 1:
            raise ConfigError("dim and neighbours must be at least 1", where="options")
        if not (0 <= config.alpha <= 1 and min(config.low, config.sharpen) >= 0):
            raise ConfigError("alpha must be within 0 and 1, low and sharpen at least 0", where="options")

    def fit(self, data: Dataset, *, seed: int = 0, ranks: Ranks | None = None) -> Mapping[str, float]:
        """Make the filter. Of several `ranks` each makes a range of lines, all get the same model."""
        c, k, ranks = self.config, self.kept, ranks or Alone()
        pairs = pairs_of(data.histories("train"), self.n_items)
        near, left, right, dims = filter_of(pairs, c, k, seed, ranks)

        def make(start: int, stop: int) -> Block:
            lines_bN = torch.mm(left[start:stop], right.T)
            rows = torch.from_numpy(near[0][start:stop]).long()
            lines_bN.scatter_add_(1, rows.clamp(min=0), torch.from_numpy(near[1][start:stop]))
            lines_bN[torch.arange(stop - start), torch.arange(start, stop)] = 0
            return strongest_dense(lines_bN, k)

        rows, weights = in_blocks(make, self.n_items, k, ranks)
        self.keep((rows, weights))
        return {"dims": float(dims), "weights": float((rows >= 0).sum())}


def filter_of(
    pairs: Any, config: Spectral.Config, k: int, seed: int, ranks: Ranks
) -> tuple[Block, Tensor, Tensor, int]:
    """(K cut to k a row, left float32[N, 2D], right float32[N, 2D], D) with W = K + left right^T."""
    from scipy import sparse

    n_items, matrix = pairs.shape[1], weighted(pairs, "unit")
    lengths = np.sqrt(np.bincount(matrix.indices, matrix.data**2, minlength=n_items))
    degrees = np.maximum(np.bincount(pairs.indices, minlength=n_items), 1).astype(np.float32)
    columns = matrix.T.tocsr()
    with pool() as each:
        rows, values = in_blocks(
            lambda start, stop: nearest(columns, matrix, start, stop, k, 0.0, lengths, config.alpha),
            n_items,
            k,
            ranks,
            each,
        )
    normal = (matrix @ sparse.diags(degrees**-0.5)).tocsr().astype(np.float32)
    s_D, v_ND = truncated_svd(normal, config.dim, seed)
    real = s_D > 1e-4  # the greatest is 1; what lies below is rounding
    s_D, v_ND = s_D[real], v_ND[:, real]
    mass_N = normal.T @ (normal @ np.ones(n_items)) - np.bincount(normal.indices, normal.data**2, n_items)
    values = values * np.float32(mass_N @ degrees / max(float(values.sum(axis=1) @ degrees), 1e-12))
    root_N1 = torch.from_numpy(degrees).sqrt().unsqueeze(1)
    low_ND, high_ND = config.low * v_ND / root_N1, v_ND * root_N1
    sharp_D = torch.exp(-config.sharpen * s_D**2) - 1
    local = sparse.csr_matrix(
        (values.ravel(), np.maximum(rows, 0).ravel(), np.arange(n_items + 1) * k), (n_items, n_items)
    )
    through_ND = torch.from_numpy(local @ v_ND.numpy()) + low_ND @ (high_ND.T @ v_ND)
    left, right = torch.cat([through_ND * sharp_D, low_ND], 1), torch.cat([v_ND, high_ND], 1)
    return (rows, values), left, right, len(s_D)

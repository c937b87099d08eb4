"""Item-to-item weights, the strongest of each row: what neighbour, linear and spectral models keep.

An N x N matrix W is held as two arrays of fixed shape, neighbours int32[N, K] and weights float32[N, K],
strongest first, -1 and 0 where a row has fewer than K; score(x) = x W adds up a history's rows. All
functions are pure, and a block of rows depends on no other, so blocks may be made anywhere.

Shapes: B users, U users of the log, N items, K kept of a row, b rows of a block, D dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.data.sequences import Histories
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.ials_solve import Map, groups
from recray.models.ranks import Ranks
from recray.models.why import Reasons

Block = tuple[NDArray[np.int32], NDArray[np.float32]]  # neighbours [b, k], weights [b, k]

SWEEPS = 4  # of the subspace iteration
CELLS = 1 << 24  # entries of a dense block, or of additions, at a time
_LOW = np.int64(0xFFFFFFFF)


class ItemWeights(Retriever):
    """A model that is such a matrix: one sparse product answers a history, and its terms explain it."""

    gradient = False

    def __init__(self, catalogue: Catalogue, config: ModelConfig, kept: int) -> None:
        super().__init__(catalogue, config)
        n, k = catalogue.n_items, max(1, min(kept, catalogue.n_items - 1))
        self.neighbours: Tensor
        self.weights: Tensor
        self.register_buffer("neighbours", torch.full((n, k), -1, dtype=torch.int32))
        self.register_buffer("weights", torch.zeros(n, k))

    @property
    def has_vectors(self) -> bool:
        return False

    @property
    def kept(self) -> int:
        """K, the weights kept of an item."""
        return self.neighbours.shape[1]

    def keep(self, block: Block, lines: NDArray[np.int64] | slice = slice(None)) -> None:
        """Take these lines for the state; others say nothing."""
        self.neighbours.fill_(-1)[lines] = torch.from_numpy(block[0])
        self.weights.zero_()[lines] = torch.from_numpy(block[1])

    def pairs(self, histories: Histories) -> Any:
        """csr float32[B, N]: what of the histories is multiplied, by default their distinct items."""
        return pairs_of(histories, self.n_items)

    @torch.inference_mode()
    def score(self, histories: Histories) -> Tensor:
        return add_up(self.pairs(histories), self.neighbours, self.weights)

    @torch.inference_mode()
    def reasons(self, history: Histories, row: int) -> Reasons:
        """The weights that were added up, each of the history's item that it is a line of."""
        return reasons_of(self.pairs(history), self.neighbours, self.weights, row)

    def item_vectors(self) -> Tensor:
        raise NotImplementedError(f"{self.name} scores by a sparse product; it has no item vectors")


def pairs_of(histories: Histories, n_items: int) -> Any:
    """csr float32[B, N] of ones: the distinct items of each history, unknown ones left out."""
    made = histories.known().to_csr(n_items)
    made.data[:] = 1
    return made


def with_values(matrix: Any, values: NDArray[Any]) -> Any:
    """The csr matrix of the same pattern with other values."""
    return type(matrix)((values, matrix.indices, matrix.indptr), shape=matrix.shape)


def strongest(matrix: Any, k: int) -> Block:
    """The k largest of each row of a csr float32[b, N]; entries at or below zero are never taken.

    Among equal values the lower column comes first.
    """
    found = np.full((matrix.shape[0], k), -1, np.int32), np.zeros((matrix.shape[0], k), np.float32)
    # bits of a positive float are in the order of the floats: value and column make one sortable number
    bits = np.maximum(matrix.data, 0).astype(np.float32).view(np.int32).astype(np.int64)
    key = (bits << 32) | (_LOW - matrix.indices)
    for rows, at, real in groups(matrix.indptr, 1):
        width = min(k, at.shape[1])
        best = torch.from_numpy(np.where(real, key[at], 0)).topk(width, dim=1).values.numpy()
        value = (best >> 32).astype(np.int32).view(np.float32)
        found[0][rows, :width] = np.where(value > 0, _LOW - (best & _LOW), -1)
        found[1][rows, :width] = value
    return found


def strongest_dense(block_bN: Tensor, k: int) -> Block:
    """The same of a dense float32[b, N]; among equal values any column may come first."""
    best, at = block_bN.topk(min(k, block_bN.shape[1]), dim=1)
    rows, weights = np.full((len(best), k), -1, np.int32), np.zeros((len(best), k), np.float32)
    rows[:, : best.shape[1]] = np.where(best.numpy() > 0, at.numpy(), -1)
    weights[:, : best.shape[1]] = np.maximum(best.numpy(), 0)
    return rows, weights


def in_blocks(make: Callable[[int, int], Block], n: int, k: int, ranks: Ranks, each: Map = map) -> Block:
    """`make(start, stop)` for all rows [0, n), by `each`: this rank makes its share, all get the whole."""
    first, last = n * ranks.rank // ranks.size, n * (ranks.rank + 1) // ranks.size
    size = max(1, min(CELLS // n, 4096))
    starts = range(first, last, size)
    parts = list(each(lambda start: make(start, min(start + size, last)), starts))
    empty: Block = np.empty((0, k), np.int32), np.empty((0, k), np.float32)
    mine = [np.concatenate([empty[i], *(part[i] for part in parts)]) for i in (0, 1)]
    rows, weights = (ranks.gather(torch.from_numpy(part))[0].cpu().numpy() for part in mine)
    return rows, weights


def add_up(pairs: Any, neighbours_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """x W for each row x of a csr float32[B, N]: float32[B, N]."""
    n, k = neighbours_NK.shape
    device = weights_NK.device
    scores_BN = torch.zeros(pairs.shape[0], n, device=device)
    line = np.repeat(np.arange(pairs.shape[0], dtype=np.int64) * n, np.diff(pairs.indptr))
    columns = (line, pairs.indices.astype(np.int64), pairs.data)
    at, rows, counts = (torch.from_numpy(column).to(device) for column in columns)
    for start in range(0, len(rows), max(1, CELLS // k)):
        part = slice(start, start + max(1, CELLS // k))
        near = neighbours_NK[rows[part]].long().clamp(min=0)  # padding adds a weight of 0
        added = weights_NK[rows[part]] * counts[part].unsqueeze(1)
        scores_BN.view(-1).index_add_(0, (at[part].unsqueeze(1) + near).reshape(-1), added.reshape(-1))
    return scores_BN


def reasons_of(pairs: Any, neighbours_NK: Tensor, weights_NK: Tensor, row: int) -> Reasons:
    """What each item of one line x of a csr float32[1, N] adds to (x W)[row]."""
    items = torch.from_numpy(pairs.indices.astype(np.int64)).to(weights_NK.device)
    said = torch.where(neighbours_NK[items] == row, weights_NK[items], 0).sum(dim=1)
    added = said.double().cpu().numpy() * pairs.data
    return Reasons.of(added.sum(), 0.0, pairs.indices, added)


def truncated_svd(matrix: Any, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """(singular values float32[d], right vectors float32[N, d]) of a csr float32[U, N], d <= dim.

    By subspace iteration from a random start (Halko, Martinsson & Tropp 2011, algorithm 4.4). The sign of
    a vector is such that its entry of greatest magnitude is positive.
    """
    turned = matrix.T.tocsr()
    width = min(dim + 32, *matrix.shape)
    start = np.random.default_rng(seed).standard_normal((matrix.shape[1], width), dtype=np.float32)
    basis = torch.from_numpy(start)
    for _ in range(SWEEPS):
        left = torch.linalg.qr(torch.from_numpy(matrix @ basis.numpy()))[0]
        basis = torch.linalg.qr(torch.from_numpy(turned @ left.numpy()))[0]
    small = torch.from_numpy(matrix @ basis.numpy()).double()
    squares, turn = torch.linalg.eigh(small.T @ small)
    kept = min(dim, width)
    vectors_ND = basis @ turn.flip(1)[:, :kept].float()
    peak = vectors_ND.gather(0, vectors_ND.abs().argmax(0, keepdim=True))
    return squares.flip(0)[:kept].clamp(min=0).sqrt().float(), vectors_ND * torch.where(peak < 0, -1.0, 1.0)

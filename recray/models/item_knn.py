"""Item neighbours (Deshpande & Karypis 2004, "Item-based top-N recommendation algorithms").

With x_i the column of item i in the (weighted) user-item matrix X, float32[U, N]:

    sim(i, j) = <x_i, x_j> / (||x_i||^2a ||x_j||^2(1-a) + shrink),      i != j
    score(h, j) = sum over i in h with j among the K nearest of i of sim(i, j)

a = 1/2 is the cosine, for sets of users |U_i and U_j| / sqrt(|U_i| |U_j|): both roots hold *both* items,
and a write-up that puts intersections under the root, or offers a distance for a similarity, is in error.
Above 1/2 (Aiolli 2013) a history's popular items say less and popular items are told more readily.

`similarity=adjusted` learns from ratings (Sarwar et al. 2001, with the baseline b_uj of ratings.py for the
user's mean, and Koren's shrinkage by the number n_ij of users who rated both): d_uj = r_uj - b_uj,

    sim(i, j) = n_ij / (n_ij + shrink)  sum_u d_ui d_uj / sqrt(sum_u d_ui^2  sum_u d_uj^2),   u rated both
    rating(u, j) = b_uj + sum_i sim(i, j) d_ui / sum_i sim(i, j),   i the `most` nearest of those u rated

Only similarities above zero are kept. Shapes: U users, N items, K neighbours an item, B users asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig
from recray.models.ials_solve import pool
from recray.models.neighbours import (
    CELLS,
    Block,
    ItemWeights,
    in_blocks,
    strongest,
    strongest_dense,
    with_values,
)
from recray.models.ranks import Alone, Ranks
from recray.models.ratings import check_differ, deviations, item_biases, ratings_of

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class ItemKNN(ItemWeights):
    """Truncated neighbours. All state is arrays of fixed shape: rows, similarities, rating biases."""

    name = "item-knn"
    shares_fit = True

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        neighbours: int = 100
        shrink: float = 10.0
        weighting: Literal["none", "unit", "tfidf", "bm25"] = "none"
        alpha: float = 0.5  # a of the formula; 0.5 is the cosine
        similarity: Literal["cosine", "adjusted"] = "cosine"
        most: int = 40  # neighbours that a predicted rating is made of

    config: ItemKNN.Config

    def __init__(self, catalogue: Catalogue, config: ItemKNN.Config) -> None:
        super().__init__(catalogue, config, config.neighbours)
        if min(config.neighbours, config.most) < 1 or config.shrink < 0:
            raise ConfigError("neighbours and most must be at least 1, shrink at least 0", where="options")
        if not 0 <= config.alpha <= 1:
            raise ConfigError(f"options.alpha is {config.alpha}", fix="it must be within 0 and 1")
        self.scale: Tensor  # mean, lowest and highest rating
        self.biases: Tensor  # b_j
        self.register_buffer("scale", torch.zeros(3))
        self.register_buffer("biases", torch.zeros(catalogue.n_items))

    def fit(self, data: Dataset, *, seed: int = 0, ranks: Ranks | None = None) -> Mapping[str, float]:
        """Find each item's neighbours. Of several `ranks` each makes a range of items, all get the same.

        Raises InputError where it is to learn from ratings, and all are equal.
        """
        c, k = self.config, self.kept
        histories = data.histories("train")
        if self.predicts:
            ratings = ratings_of(histories, self.n_items)
            check_differ(ratings)
            scale, biases = item_biases(ratings)
            self.scale.copy_(torch.from_numpy(scale))
            self.biases.copy_(torch.from_numpy(biases))
            matrix, _ = deviations(ratings, self.scale, self.biases)
        else:
            matrix = weighted(histories.to_csr(self.n_items), c.weighting)
        columns = matrix.T.tocsr()  # one line an item
        norms = np.sqrt(np.bincount(matrix.indices, matrix.data**2, minlength=self.n_items))

        def make(start: int, stop: int) -> Block:
            if self.predicts:
                return nearest_adjusted(columns, matrix, start, stop, k, c.shrink)
            return nearest(columns, matrix, start, stop, k, c.shrink, norms, c.alpha)

        with pool() as each:
            rows, weights = in_blocks(make, self.n_items, k, ranks or Alone(), each)
        self.keep((rows, weights))
        return {"neighbours": float((rows >= 0).sum())}

    def pairs(self, histories: Histories) -> Any:
        """csr float32[B, N]: how often each item was taken."""
        return histories.known().to_csr(self.n_items)

    @property
    def predicts(self) -> bool:
        """Whether it was made from ratings."""
        return self.config.similarity == "adjusted"

    @torch.inference_mode()
    def predict(self, histories: Histories, items: Histories) -> NDArray[np.float64]:
        """A rating for each of `items`, float64[n]. Raises ConfigError unless similarity is adjusted."""
        if not self.predicts:
            raise ConfigError("item-knn predicts ratings with similarity=adjusted", where="options")
        away, b_B = deviations(ratings_of(histories, self.n_items), self.scale, self.biases)
        owner = np.repeat(np.arange(len(items)), items.lengths)
        mean, low, high = self.scale.double().tolist()
        base_n = mean + b_B[owner] + np.where(items.items >= 0, self.biases.cpu().numpy()[items.items], 0)
        near, similar = self.neighbours.cpu().numpy(), self.weights.cpu().double().numpy()
        made = base_n.copy()
        step = max(1, CELLS // (self.n_items + self.kept * int(items.lengths.max(initial=0))))
        for start in range(0, len(items), step):
            at = np.flatnonzero((owner >= start) & (owner < start + step) & (items.items >= 0))
            part, line = away[start : start + step], (owner[at] - start)[:, None]
            d_BN = part.toarray()
            rated_BN = np.zeros_like(d_BN, dtype=bool)
            rated_BN[np.repeat(np.arange(part.shape[0]), np.diff(part.indptr)), part.indices] = True
            rows_nK = near[items.items[at]]
            used_nK = rated_BN[line, rows_nK] & (rows_nK >= 0)
            used_nK &= used_nK.cumsum(axis=1) <= self.config.most
            sim_nK = np.where(used_nK, similar[items.items[at]], 0)
            total_n = sim_nK.sum(axis=1)
            made[at] += (sim_nK * d_BN[line, rows_nK]).sum(axis=1) / np.where(total_n > 0, total_n, 1)
        return np.asarray(made.clip(low, high))


def weighted(matrix: Any, how: str) -> Any:
    """The user-item matrix (csr float32[U, N]) with weights in place of its counts.

    unit: each user's row at length 1, so that a user who took everything says little about any item.
    tfidf, bm25 (k1 = 1.2, b = 0.75): users are the terms of documents, which are the items.
    """
    if how == "none":
        return matrix
    made = matrix.astype(np.float32).tocsr(copy=True)
    per_user = np.diff(made.indptr)
    user = np.repeat(np.arange(made.shape[0]), per_user)
    if how == "unit":
        lengths = np.sqrt(np.bincount(user, made.data**2, minlength=made.shape[0]))
        made.data = (made.data / lengths[user]).astype(np.float32)
        return made
    idf = np.log((1 + made.shape[1]) / (1 + per_user)).astype(np.float32)
    if how == "tfidf":
        made.data = np.sqrt(made.data) * idf[user]
        return made
    length = np.asarray(made.sum(axis=0)).ravel()
    norm = 0.25 + 0.75 * length / max(length.mean(), 1e-12)
    made.data = (made.data * 2.2 / (made.data + 1.2 * norm[made.indices]) * idf[user]).astype(np.float32)
    return made


def nearest(
    columns: Any,
    matrix: Any,
    start: int,
    stop: int,
    k: int,
    shrink: float,
    norms_N: NDArray[np.float64],
    alpha: float = 0.5,
) -> Block:
    """The k nearest of items [start, stop): (rows int32[b, k], similarities float32[b, k]).

    `matrix` is csr float32[U, N], `columns` its transpose as csr, `norms_N` the lengths of those.
    """
    block = columns[start:stop] @ matrix
    row = np.repeat(np.arange(start, start + block.shape[0]), np.diff(block.indptr))
    left, right = norms_N ** (2 * alpha), norms_N ** (2 - 2 * alpha)
    block.data = (block.data / (left[row] * right[block.indices] + shrink)).astype(np.float32)
    block.data[row == block.indices] = 0  # not its own neighbour
    return strongest(block, k)


def nearest_adjusted(columns: Any, matrix: Any, start: int, stop: int, k: int, shrink: float) -> Block:
    """The same by the adjusted cosine; `matrix` holds deviations of ratings, zeros among them."""
    some, gave, took = columns[start:stop], _ones(columns[start:stop]), _ones(matrix)
    spread_bN = (_squared(some) @ took).toarray() * (gave @ _squared(matrix)).toarray()
    both_bN = (gave @ took).toarray()
    similar = (some @ matrix).toarray() / np.sqrt(np.maximum(spread_bN, 1e-12))
    similar *= both_bN / np.maximum(both_bN + shrink, 1e-12)
    similar[np.arange(len(similar)), start + np.arange(len(similar))] = 0
    return strongest_dense(torch.from_numpy(similar.astype(np.float32)), k)


def _ones(matrix: Any) -> Any:
    return with_values(matrix, np.ones_like(matrix.data))


def _squared(matrix: Any) -> Any:
    return with_values(matrix, matrix.data**2)

"""Item neighbours (Deshpande & Karypis 2004, "Item-based top-N recommendation algorithms").

With x_i the column of item i in the (weighted) user-item matrix X, float32[U, N]:

    sim(i, j) = <x_i, x_j> / (||x_i|| ||x_j|| + shrink),      i != j
    score(h, j) = sum over i in h with j among the K nearest of i of sim(i, j)

Shapes: U users, N items, K neighbours an item, B users asked.
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
from recray.models.base import Catalogue, ModelConfig, Retriever

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_BLOCK = 1 << 24  # entries of a dense block of similarities, or of additions, at a time


class ItemKNN(Retriever):
    """Truncated cosine neighbours. All state is two arrays of fixed shape: rows and similarities."""

    name = "item-knn"
    gradient = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        neighbours: int = 100
        shrink: float = 10.0
        weighting: Literal["none", "tfidf", "bm25"] = "none"

    config: ItemKNN.Config

    def __init__(self, catalogue: Catalogue, config: ItemKNN.Config) -> None:
        super().__init__(catalogue, config)
        if config.neighbours < 1 or config.shrink < 0:
            raise ConfigError("neighbours must be at least 1 and shrink at least 0", where="options")
        k = max(1, min(config.neighbours, catalogue.n_items - 1))
        self.neighbours: Tensor
        self.similarities: Tensor
        self.register_buffer("neighbours", torch.full((catalogue.n_items, k), -1, dtype=torch.int32))
        self.register_buffer("similarities", torch.zeros(catalogue.n_items, k))

    @property
    def has_vectors(self) -> bool:
        return False

    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        matrix = weighted(data.histories("train").to_csr(self.n_items), self.config.weighting)
        k = self.neighbours.shape[1]
        size = max(1, _BLOCK // self.n_items)
        for start in range(0, self.n_items, size):
            rows, values = nearest(matrix, start, start + size, k, self.config.shrink)
            self.neighbours[start : start + size] = torch.from_numpy(rows)
            self.similarities[start : start + size] = torch.from_numpy(values)
        return {"neighbours": float((self.neighbours >= 0).sum())}

    @torch.inference_mode()
    def score(self, histories: Histories) -> Tensor:
        k = self.neighbours.shape[1]
        histories = histories.known()
        scores_BN = torch.zeros(len(histories), self.n_items, device=self.similarities.device)
        user = torch.from_numpy(np.repeat(np.arange(len(histories)), histories.lengths))
        rows = torch.from_numpy(histories.items.astype(np.int64))
        user, rows = user.to(scores_BN.device), rows.to(scores_BN.device)
        for start in range(0, len(rows), max(1, _BLOCK // k)):
            part = slice(start, start + max(1, _BLOCK // k))
            near = self.neighbours[rows[part]].long().clamp(min=0)  # padding adds a similarity of 0
            at = (user[part, None] * self.n_items + near).reshape(-1)
            scores_BN.view(-1).index_add_(0, at, self.similarities[rows[part]].reshape(-1))
        return scores_BN

    def item_vectors(self) -> Tensor:
        raise NotImplementedError("item-knn scores by a sparse product; it has no item vectors")


def weighted(matrix: Any, how: str) -> Any:
    """The user-item matrix (csr float32[U, N]) with TF-IDF or BM25 weights of its counts.

    Users are the documents' terms here: an item is a document, so that a user who took everything
    says little about any item. BM25 with k1 = 1.2 and b = 0.75.
    """
    if how == "none":
        return matrix
    made = matrix.astype(np.float32).tocsr(copy=True)
    per_user = np.diff(made.indptr)
    user = np.repeat(np.arange(made.shape[0]), per_user)
    idf = np.log((1 + made.shape[1]) / (1 + per_user)).astype(np.float32)
    if how == "tfidf":
        made.data = np.sqrt(made.data) * idf[user]
        return made
    length = np.asarray(made.sum(axis=0)).ravel()
    norm = 0.25 + 0.75 * length / max(length.mean(), 1e-12)
    made.data = (made.data * 2.2 / (made.data + 1.2 * norm[made.indices]) * idf[user]).astype(np.float32)
    return made


def nearest(
    matrix: Any, start: int, stop: int, k: int, shrink: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The k nearest of items [start, stop): (rows int32[b, k], similarities float32[b, k]).

    Best first; -1 and 0 where an item has fewer than k neighbours of similarity above zero.
    `matrix` is csr float32[U, N].
    """
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=0)).ravel()).astype(np.float32)
    block = (matrix[:, start:stop].T @ matrix).toarray().astype(np.float32)
    block /= np.maximum(norms[start:stop, None] * norms + np.float32(shrink), 1e-12)
    block[np.arange(len(block)), start + np.arange(len(block))] = 0  # not its own neighbour
    rows = np.full((len(block), k), -1, dtype=np.int32)
    values = np.zeros((len(block), k), dtype=np.float32)
    found, at = torch.from_numpy(block).topk(min(k, block.shape[1]), dim=1)
    best, order = found.numpy(), at.numpy()
    width = best.shape[1]
    rows[:, :width] = np.where(best > 0, order, -1)
    values[:, :width] = np.maximum(best, 0)
    return rows, values

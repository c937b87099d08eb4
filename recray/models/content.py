"""Content-based retrieval (Lops, de Gemmis & Semeraro 2011): items like those of the history, by features.

An item is up to three vectors of length 1, and two items are as like as the weighted mean of the cosines:

    text        (1 + log tf) log((1 + N) / (1 + df)) of each word that two items or more share
    categories  log((1 + N) / (1 + df)) of each value it has, so that a rare one in common says more
    numbers     (1, z) / sqrt(1 + z^2) of each standardized number z: the cosine is that of the angle between
                arctan z and arctan z', 1 for equal numbers and above that of distant ones everywhere

Cosine is a similarity in [-1, 1]. Note that ||a - b|| / (||a|| + ||b||), which some write-ups offer as one,
is a distance: likeness is 1 minus it; and of sets it is |a and b| / sqrt(|a| |b|), both sizes under the root.

The vectors are turned into `dim` floats by a truncated SVD, which keeps inner products best (latent semantic
indexing, Deerwester et al. 1990), and put at length 1 again. A profile is the mean of the history's vectors,
an interaction counting `decay` to the power of how many came after it, at length 1: score = cosine.

Shapes: N items, W columns of words and values, D dims, B users asked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.data.item_features import ItemFeatures, item_features, vocabulary_of
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.embeddings import DenseTable
from recray.models.neighbours import truncated_svd
from recray.models.why import Reasons

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_WORD = re.compile(r"\w+")


class ContentBased(Retriever):
    """Item vectors from features; nothing is learned from who took what, so a new item needs nobody."""

    name = "content"
    gradient = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        dim: int = 256
        text: float = 1.0  # how much each part of an item counts
        categories: float = 1.0
        numbers: float = 0.3
        decay: float = 0.7  # 1 = the whole history alike
        weighted: bool = False  # interactions count by their (positive) weights

    config: ContentBased.Config

    def __init__(self, catalogue: Catalogue, config: ContentBased.Config) -> None:
        super().__init__(catalogue, config)
        if config.dim < 1 or not 0 < config.decay <= 1:
            raise ConfigError("dim must be at least 1 and decay within 0 and 1", where="options")
        if min(config.text, config.categories, config.numbers) < 0:
            raise ConfigError("text, categories and numbers must be at least 0", where="options")
        self.tables["item"] = DenseTable(catalogue.n_items, config.dim)

    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        """Read the items' features. Raises ConfigError where there are none to compare."""
        c = self.config
        features = item_features(data)
        matrix = described(features, c.text, c.categories, c.numbers)
        if not matrix.nnz:
            raise ConfigError(
                "content has no item features to compare",
                where=getattr(getattr(data, "artefact", None), "place", None),
                fix="prepare the dataset with --items FILE, or train another recipe",
            )
        _, right = truncated_svd(matrix, c.dim, seed)
        vectors = torch.zeros(self.n_items, c.dim)
        vectors[:, : right.shape[1]] = torch.from_numpy(matrix @ right.numpy())
        self.tables["item"].weight.data.copy_(unit(vectors))  # type: ignore[operator]
        bare = int((np.diff(matrix.indptr) == 0).sum())
        return {"columns": float(matrix.shape[1]), "items_without_features": float(bare)}

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        """Profiles, float32[B, 1, D]; zeros for a user of no known item."""
        known = histories.known()
        counts = self._counts(known)
        used, at = np.unique(known.items, return_inverse=True)
        vectors = self.tables["item"](torch.from_numpy(used.astype(np.int64)).to(self.device))
        from scipy import sparse

        sums = sparse.csr_matrix((counts.astype(np.float32), at, known.offsets), (len(known), len(used)))
        return unit(torch.from_numpy(sums @ vectors.cpu().numpy())).unsqueeze(1).to(self.device)

    @torch.inference_mode()
    def reasons(self, history: Histories, row: int) -> Reasons:
        """Each item of the history by its part of the profile times its likeness to the item."""
        known = history.known()
        rows = torch.from_numpy(np.append(known.items, row).astype(np.int64)).to(self.device)
        vectors = self.tables["item"](rows).double().cpu()
        parts = torch.from_numpy(self._counts(known)).unsqueeze(1) * vectors[:-1]
        length = float(parts.sum(0).norm())
        added = (parts @ vectors[-1]).numpy() / max(length, 1e-6)
        return Reasons.of(added.sum(), 0.0, known.items, added)

    def _counts(self, known: Histories) -> NDArray[np.float64]:
        """How much each interaction counts in its profile, float64[n]."""
        age = np.repeat(known.offsets[1:], known.lengths) - 1 - np.arange(len(known.items))
        counts = np.asarray(self.config.decay**age, np.float64)
        if self.config.weighted and known.weights is not None:
            counts = counts * np.maximum(known.weights, 0)
        return counts


def described(features: ItemFeatures, text: float, categories: float, numbers: float) -> Any:
    """The items as lines of a csr float32[N, W], whose inner products are the sums of weighted cosines."""
    from scipy import sparse

    parts = [
        (text, words_of(features.texts)),
        (categories, values_of(features)),
        (numbers, angles_of(features.numbers)),
    ]
    held = [(weight**0.5) * part for weight, part in parts if weight > 0]
    empty = sparse.csr_matrix((len(features.texts), 1), dtype=np.float32)
    return sparse.hstack([empty, *held], format="csr", dtype=np.float32)


def words_of(texts: Sequence[str]) -> Any:
    """TF-IDF of the words that two texts or more share, csr float32[N, words], lines of length 1 or 0."""
    columns: dict[str, int] = {}
    indices: list[int] = []
    values: list[int] = []
    offsets = [0]
    for line in texts:
        counted = Counter(_WORD.findall(line.lower()))
        indices += [columns.setdefault(word, len(columns)) for word in counted]
        values += counted.values()
        offsets.append(len(indices))
    return _tf_idf(np.array(values, np.float32), indices, offsets, len(columns))


def values_of(features: ItemFeatures) -> Any:
    """The categories' values, rare ones heavy, csr float32[N, values], lines of length 1 or 0.

    `genres` and `genres#2` are one list of values; an unknown value is none.
    """
    first: dict[str, int] = {}
    width = 0
    for name, size in zip(features.names, features.sizes, strict=True):
        if vocabulary_of(name) not in first:
            first[vocabulary_of(name)] = width
            width += size
    starts = np.array([first[vocabulary_of(name)] for name in features.names], np.int64)
    there = features.categories > 0
    offsets = np.concatenate([[0], there.sum(axis=1).cumsum()])
    columns = (features.categories + starts)[there]
    return _tf_idf(np.ones(len(columns), np.float32), columns, offsets, width)


def angles_of(numbers: Any) -> Any:
    """Each number z as (1, z) / sqrt(1 + z^2), float32[N, 2 G], lines of length 1 or 0 (no numbers)."""
    from scipy import sparse

    cosine = 1 / np.sqrt(1 + np.asarray(numbers, np.float64) ** 2)
    made = np.concatenate([cosine, cosine * numbers], axis=1) / max(1, numbers.shape[1]) ** 0.5
    return sparse.csr_matrix(made.astype(np.float32))


def unit(vectors: Tensor) -> Tensor:
    """Lines at length 1; those of (nearly) no length at 0."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    return torch.where(lengths > 1e-6, vectors / lengths.clamp(min=1e-6), 0.0)


def _tf_idf(counts: Any, columns: Any, offsets: Any, width: int) -> Any:
    """csr float32[N, width] of (1 + log tf) log((1 + N) / (1 + df)), lines of length 1 or 0.

    A column that a single line has is left out: it can only make that line less like the others.
    """
    from scipy import sparse

    n = len(offsets) - 1
    columns = np.asarray(columns, np.int64)
    df = np.bincount(columns, minlength=width)
    idf = np.where(df > 1, np.log((1 + n) / (1 + df)), 0)
    values = ((1 + np.log(counts)) * idf[columns]).astype(np.float32)
    made = sparse.csr_matrix((values, columns, np.asarray(offsets, np.int64)), shape=(n, width))
    made.eliminate_zeros()
    lengths = np.sqrt(np.asarray(made.multiply(made).sum(axis=1)).ravel())
    lines = np.repeat(np.where(lengths > 0, lengths, 1), np.diff(made.indptr))
    made.data = (made.data / lines).astype(np.float32)
    return made

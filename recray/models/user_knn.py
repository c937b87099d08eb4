"""User neighbours (Resnick et al. 1994, "GroupLens"): what people like her took, and how they rated it.

The state is what users took, and nothing is worked out in advance: a history is compared with the kept
users when it asks, so new users and new interactions count at once. With V(h) the K nearest of the kept
users, binary rows x, ratings r and, of users who both rated, deviations d from a centre:

    cosine   sim(h, v) = <x_h, x_v> / (||x_h|| ||x_v|| + shrink),   of sets or, with `weighted`, of ratings
    pearson  sim(h, v) = n / (n + shrink) corr(h, v),   of sets (over all N items) or of both's n ratings
    score(h, j)  = sum of sim(h, v) over v in V(h) who took j
    rating(h, j) = c_hj + sum_v sim(h, v) d_vj / sum_v sim(h, v),   v the K nearest of those who rated j

`centre` mean: c_hj is the mean of h's ratings (Resnick's prediction); baseline: c_hj = mean + b_h + b_j as
in ratings.py, which also stands in where nobody near rated j. Pearson's deviations are from it, too. Only
similarities above zero count.

Shapes: B users asked, V users kept, N items, P pairs kept.
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
from recray.models.neighbours import CELLS, pairs_of, with_values
from recray.models.ratings import check_differ, deviations, item_biases, ratings_of
from recray.models.why import Reasons

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class _Kept:
    """The kept users in the forms that products want: a line a user [V, N], and a line an item [N, V]."""

    def __init__(self, matrix: Any, away: Any) -> None:
        self.n_users = matrix.shape[0]
        self.counts = np.diff(matrix.indptr)
        self.lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        self.took = with_values(matrix, np.ones_like(matrix.data))
        self.values_by_item, self.away_by_item = matrix.T.tocsr(), away.T.tocsr()
        self.by_item = with_values(self.values_by_item, np.ones_like(matrix.data))
        self.squares_by_item = with_values(self.away_by_item, self.away_by_item.data**2)


class UserKNN(Retriever):
    """The kept users' pairs, sorted by user: users and items int32[P] (-1 where there is none), values."""

    name = "user-knn"
    gradient = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        neighbours: int = 100
        similarity: Literal["cosine", "pearson"] = "cosine"
        shrink: float = 10.0
        weighted: bool = False  # weights are ratings: compare by them, and predict them
        centre: Literal["mean", "baseline"] = "mean"
        pairs: int = 1 << 20  # 12 bytes each; of a larger log as many users as fit, drawn by the seed

    config: UserKNN.Config

    def __init__(self, catalogue: Catalogue, config: UserKNN.Config) -> None:
        super().__init__(catalogue, config)
        if min(config.neighbours, config.pairs) < 1 or config.shrink < 0:
            raise ConfigError("neighbours and pairs must be at least 1, shrink at least 0", where="options")
        self.users: Tensor
        self.items: Tensor
        self.values: Tensor
        self.scale: Tensor  # mean, lowest and highest rating
        self.biases: Tensor  # b_j of the baseline
        self.register_buffer("users", torch.full((config.pairs,), -1, dtype=torch.int32))
        self.register_buffer("items", torch.full((config.pairs,), -1, dtype=torch.int32))
        self.register_buffer("values", torch.zeros(config.pairs))
        self.register_buffer("scale", torch.zeros(3))
        self.register_buffer("biases", torch.zeros(catalogue.n_items))
        self._kept: _Kept | None = None

    @property
    def has_vectors(self) -> bool:
        return False

    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        """Keep the users. Raises InputError where weights are ratings, and all are equal."""
        histories = data.histories("train")
        if self.predicts:
            check_differ(ratings_of(histories, self.n_items))
        matrix, rated = self._matrix(histories)
        if rated:
            scale, biases = item_biases(matrix)
            self.scale.copy_(torch.from_numpy(scale))
            self.biases.copy_(torch.from_numpy(biases))
        lengths = np.diff(matrix.indptr)
        some = np.flatnonzero(lengths)
        if matrix.nnz > self.config.pairs:
            drawn = np.random.default_rng(seed).permutation(some)
            some = np.sort(drawn[: np.searchsorted(lengths[drawn].cumsum(), self.config.pairs, side="right")])
        kept = matrix[some]
        n = kept.nnz
        for buffer, values in (
            (self.users, np.repeat(np.arange(len(some), dtype=np.int32), lengths[some])),
            (self.items, kept.indices.astype(np.int32)),
            (self.values, kept.data),
        ):
            buffer[:n] = torch.from_numpy(values)
            buffer[n:] = 0 if buffer is self.values else -1
        self._kept = None
        return {"users": float(len(some)), "pairs": float(n), "left_out": float(matrix.nnz - n)}

    @torch.inference_mode()
    def score(self, histories: Histories) -> Tensor:
        kept, (asked, rated) = self._known(), self._matrix(histories)
        found = np.zeros((len(histories), self.n_items), np.float32)
        step = max(1, CELLS // max(self.n_items, kept.n_users, 1))
        for start in range(0, len(histories), step):
            part = slice(start, start + step)
            found[part] = (self._near(asked[part], kept, rated) @ kept.took).toarray()
        return torch.from_numpy(found).to(self.values.device)

    def reasons(self, history: Histories, row: int) -> Reasons:
        """The similarities of those neighbours who took the item."""
        kept = self._known()
        asked, rated = self._matrix(history)
        near = self._near(asked, kept, rated)
        took = np.isin(near.indices, kept.by_item.indices[slice(*kept.by_item.indptr[row : row + 2])])
        added = near.data[took].astype(np.float64)
        return Reasons.of(added.sum(), 0.0, near.indices[took], added, kind="neighbour")

    @property
    def predicts(self) -> bool:
        """Whether weights are ratings."""
        return self.config.weighted

    def predict(self, histories: Histories, items: Histories) -> NDArray[np.float64]:
        """A rating for each of `items`, float64[n]. Raises ConfigError unless the model is `weighted`."""
        if not self.predicts:
            raise ConfigError("user-knn predicts ratings with weighted=true", where="options")
        kept, asked = self._known(), ratings_of(histories, self.n_items)
        mean, low, high = self.scale.double().tolist()
        _, b_B = deviations(asked, self.scale, self.biases)
        owner = np.repeat(np.arange(len(items)), items.lengths)
        base_n = mean + b_B[owner] + np.where(items.items >= 0, self.biases.cpu().numpy()[items.items], 0)
        counts = np.diff(asked.indptr)
        if self.config.centre == "mean":
            own_B = np.asarray(asked.sum(axis=1)).ravel() / np.maximum(counts, 1)
            centre_n = np.where(counts[owner] > 0, own_B[owner], base_n)
        else:
            centre_n = base_n
        made = base_n.copy()
        step = max(1, CELLS // max(self.n_items, kept.n_users, 1))
        for start in range(0, len(items), step):
            similar_BV = self._similar(asked[start : start + step], kept, rated=True)
            first, last = items.offsets[[start, min(start + step, len(items))]]
            here = items.items[first:last]
            for item in np.unique(here[here >= 0]):
                at = first + np.flatnonzero(here == item)
                moved_n, total_n = self._moved(similar_BV[owner[at] - start], kept, item)
                made[at] = np.where(total_n > 0, centre_n[at] + moved_n, base_n[at])
        return np.asarray(made.clip(low, high))

    def _moved(
        self, similar_BV: NDArray[np.float32], kept: _Kept, item: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(how far the nearest who rated an item move it from the centre, how near they are), float64[B]."""
        part = slice(*kept.away_by_item.indptr[item : item + 2])
        raters, away = kept.away_by_item.indices[part], kept.away_by_item.data[part]
        if not len(raters):
            return np.zeros(len(similar_BV)), np.zeros(len(similar_BV))
        k = min(self.config.neighbours, len(raters))
        best, order = torch.from_numpy(similar_BV[:, raters]).double().topk(k, dim=1)
        total = best.sum(1).numpy()
        return (best.numpy() * away[order.numpy()]).sum(1) / np.where(total > 0, total, 1), total

    def _matrix(self, histories: Histories) -> tuple[Any, bool]:
        """(csr float32[B, N], whether it holds ratings): a history that comes without any is a set."""
        rated = self.config.weighted and histories.weights is not None
        return (ratings_of if rated else pairs_of)(histories, self.n_items), rated

    def _away(self, matrix: Any) -> Any:
        """The given ratings less their centre, in the same pattern."""
        if self.config.centre == "baseline":
            return deviations(matrix, self.scale, self.biases)[0]
        counts = np.diff(matrix.indptr)
        means = np.asarray(matrix.sum(axis=1)).ravel() / np.maximum(counts, 1)
        return with_values(matrix, (matrix.data - np.repeat(means, counts)).astype(np.float32))

    def _similar(self, asked: Any, kept: _Kept, rated: bool) -> NDArray[np.float32]:
        """float32[B, V], zero where it is not above zero."""
        shrink = self.config.shrink
        both = (with_values(asked, np.ones_like(asked.data)) @ kept.by_item).toarray()
        if self.config.similarity == "cosine":
            mine = np.sqrt(np.asarray(asked.multiply(asked).sum(axis=1))).reshape(-1, 1)
            theirs = kept.lengths if rated else np.sqrt(kept.counts)
            cross = (asked @ kept.values_by_item).toarray() if rated else both
            made = cross / np.maximum(mine * theirs + shrink, 1e-12)
        elif rated:
            away = self._away(asked)
            squares = (with_values(away, away.data**2) @ kept.by_item).toarray()
            squares *= (with_values(away, np.ones_like(away.data)) @ kept.squares_by_item).toarray()
            made = (away @ kept.away_by_item).toarray() / np.sqrt(np.maximum(squares, 1e-12))
            made *= both / np.maximum(both + shrink, 1e-12)
        else:
            n = self.n_items
            mine, theirs = np.diff(asked.indptr)[:, None] / n, kept.counts / n
            spread = np.sqrt(mine * (1 - mine) * theirs * (1 - theirs))
            spread[spread < 1e-9] = np.inf  # nothing, or everything, is like nobody
            made = (both / n - mine * theirs) / spread
            made *= both / np.maximum(both + shrink, 1e-12)
        return np.asarray(np.maximum(made, 0), np.float32)

    def _near(self, asked: Any, kept: _Kept, rated: bool) -> Any:
        """csr float32[B, V] of the similarities to the K nearest."""
        similar_BV = self._similar(asked, kept, rated)
        best, at = torch.from_numpy(similar_BV).topk(min(self.config.neighbours, kept.n_users), dim=1)
        ends = np.arange(len(best) + 1) * best.shape[1]
        return type(kept.took)((best.numpy().ravel(), at.numpy().ravel(), ends), similar_BV.shape)

    def _known(self) -> _Kept:
        """The kept users as matrices, made of the buffers when first asked for."""
        if self._kept is None:
            there = self.users >= 0
            users, items, values = (b[there].cpu().numpy() for b in (self.users, self.items, self.values))
            offsets = np.concatenate([[0], np.bincount(users).cumsum()]).astype(np.int64)
            matrix = Histories(items, offsets, values).to_csr(self.n_items, weighted=True)
            self._kept = _Kept(matrix, self._away(matrix))
        return self._kept

    def _load_from_state_dict(self, *given: Any, **named: Any) -> None:
        super()._load_from_state_dict(*given, **named)
        self._kept = None

    def item_vectors(self) -> Tensor:
        raise NotImplementedError("user-knn scores by a sparse product; it has no item vectors")

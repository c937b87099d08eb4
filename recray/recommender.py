"""From histories to ranked items: retrieve, leave out, rank. Rows only, no ids, no Ray.

`retrieve` and `rank` are pure functions of their arguments, since the serve graph calls them in
different replicas; `recommend` is nothing but one after the other. A user's answer does not depend
on who else is in the batch. Shapes: B users, N items, C candidates, k places, K queries, D dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.compression.graph import OnnxNetwork
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Context, Model, Ranker, Retriever
from recray.models.why import Reasons, why
from recray.retrieval.index import Found, Index, build_index, ordered

Source = Literal["retriever", "ranker", "popular"]
CELLS = 1 << 24  # scores of a model without vectors that are held at a time: 64 MB


@dataclass(frozen=True, eq=False)
class Candidates:
    """What retrieval proposes: rows int64[B, C] and scores float32[B, C], best first.

    Where fewer than C are left: row -1, score -inf.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, eq=False)
class Ranked:
    """The answer: rows int64[B, k] and scores float32[B, k], best first, and each user's source.

    Where fewer than k are left: row -1, score -inf.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    sources: Sequence[Source]


class Recommender:
    """A retriever (with an index if it has vectors), maybe a ranker, and popularity for the unknown.

    popularity: float32[N], what a user without a history is shown, most popular first.
    candidates: how many the ranker is given. blend: the retriever's share in the final score, see
    `rank`. Models are put in eval mode; nothing here changes after it is made.
    """

    def __init__(
        self,
        retriever: Retriever,
        index: Index | None = None,
        ranker: Ranker | None = None,
        candidates: int = 200,
        *,
        popularity: NDArray[np.float32] | None = None,
        blend: float = 0.8,
    ) -> None:
        if retriever.has_vectors and index is None:
            index = build_index("exact", retriever.item_vectors())
        self.n_items = retriever.n_items
        if ranker is not None and ranker.n_items != self.n_items:
            raise ConfigError(
                f"the ranker knows {ranker.n_items} items and the retriever {self.n_items}",
                fix="train both on the same dataset",
            )
        self.retriever = retriever.eval()
        self.index = index if retriever.has_vectors else None
        self.ranker = None if ranker is None else ranker.eval()
        self.candidates, self.blend = candidates, blend
        if popularity is None:
            popularity = np.zeros(self.n_items, np.float32)
        self.popularity = np.asarray(popularity, np.float32)
        self._popular_rows = np.lexsort((np.arange(self.n_items), -self.popularity)).astype(np.int64)

    def depth(self, k: int) -> int:
        """How many candidates `recommend` asks retrieval for when k are wanted."""
        return max(k, self.candidates) if self.ranker is not None else k

    @torch.inference_mode()
    def retrieve(
        self,
        histories: Histories,
        count: int,
        exclude: Histories | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> Candidates:
        """The `count` best items a user by the retriever alone, equal scores by row.

        exclude: B ragged sets of rows that are not to be shown (rows < 0 mean nothing);
        allowed: bool[N], the items that a filter leaves. Users without a known item in their
        history get the most popular.
        """
        b = len(histories)
        scores = np.full((b, count), -np.inf, np.float32)
        rows = np.full((b, count), -1, np.int64)
        known_B = _known(histories)
        for at, find in ((known_B, self._found), (~known_B, self._popular)):
            users = np.flatnonzero(at)
            if len(users):
                barred = None if exclude is None else exclude.take(users)
                scores[users], rows[users] = find(histories.take(users), count, barred, allowed)
        return Candidates(rows, scores)

    @torch.inference_mode()
    def rank(
        self, histories: Histories, candidates: Candidates, context: Context | None = None
    ) -> NDArray[np.float32]:
        """Final scores float32[B, C] of the candidates, -inf where there is none.

        With a ranker: (1 - blend) z(ranker) + blend z(retriever), where z takes each user's scores
        over the candidates to mean 0 and deviation 1; blend 0 is the ranker's own scores. Without a
        ranker, and for users without a known item in their history: the candidates' own scores.
        """
        known_B = _known(histories)
        if self.ranker is None or self.blend == 1.0 or not known_B.any() or not candidates.rows.shape[1]:
            return candidates.scores
        users = np.flatnonzero(known_B)
        rows = candidates.rows[users]
        asked = {name: values[users] for name, values in (context or {}).items()}
        scores_BC = self._score(histories.take(users), rows, asked)
        if self.blend > 0:
            given = rows >= 0
            share = np.float32(self.blend)
            mixed = (1 - share) * _z(scores_BC, given) + share * _z(candidates.scores[users], given)
            scores_BC = np.where(given, mixed, -np.inf).astype(np.float32)
        final = candidates.scores.copy()
        final[users] = scores_BC
        return final

    def top(
        self, histories: Histories, candidates: Candidates, scores: NDArray[np.float32], k: int
    ) -> Ranked:
        """Put the candidates in the order of their final scores, equal scores by row, and keep k."""
        best, rows = ordered(scores, candidates.rows, k)
        usual: Source = "retriever" if self.ranker is None else "ranker"
        return Ranked(rows, best, [usual if known else "popular" for known in _known(histories)])

    def recommend(
        self,
        histories: Histories,
        k: int,
        exclude: Histories | None = None,
        allowed: NDArray[np.bool_] | None = None,
        context: Context | None = None,
    ) -> Ranked:
        """`top(rank(retrieve(depth(k))), k)` for B users."""
        candidates = self.retrieve(histories, self.depth(k), exclude, allowed)
        return self.top(histories, candidates, self.rank(histories, candidates, context), k)

    @torch.inference_mode()
    def why(
        self, history: Histories, row: int, exclude: Histories | None = None, context: Context | None = None
    ) -> Reasons:
        """What the final score of item `row` is made of, for one history; see `models.why`.

        Behind a ranker: its reasons and the retriever's, each as large as `rank` makes its part among
        the candidates. Of a user without a known item: popularity alone.
        """
        if not _known(history).any():
            popular = float(self.popularity[row])
            return Reasons.of(popular, popular, np.empty(0), np.empty(0))
        if self.ranker is None or self.blend == 1.0:
            return why(self.retriever, history, row)
        ranked = why(self.ranker, history, row, context)
        if self.blend == 0:
            return ranked
        found = self.retrieve(history, self.candidates, exclude)
        parts = (
            (1 - self.blend, ranked, self._score(history, found.rows, context or {})),
            (self.blend, why(self.retriever, history, row), found.scores),
        )
        return _together([(share, part, *_spread(scores[found.rows >= 0])) for share, part, scores in parts])

    @torch.inference_mode()
    def similar(self, row: int, k: int, allowed: NDArray[np.bool_] | None = None) -> Ranked:
        """The k items nearest to one item, itself left out: by cosine of item vectors.

        A retriever without vectors is asked what it recommends to a history of that one item.
        """
        itself = Histories.of([[row]])
        if self.index is None:
            scores, rows = self._found(itself, k, itself, allowed)
        else:
            query_1D = torch.nn.functional.normalize(self.index.table(torch.tensor([row])), dim=1)
            found = self._cosine.search(query_1D, min(k + 1, self.n_items), allowed)
            scores, rows = _without(found, itself, k)
        return Ranked(rows, scores, ["retriever"])

    @cached_property
    def _cosine(self) -> Index:
        """An exact index over the item vectors at length 1; made when first asked for."""
        assert self.index is not None
        return build_index("exact", torch.nn.functional.normalize(self.index.table.dense(), dim=1))

    def _found(
        self, histories: Histories, count: int, barred: Histories | None, allowed: NDArray[np.bool_] | None
    ) -> Found:
        if self.index is None:
            return self._scanned(histories, count, barred, allowed)
        reach = min(self.n_items, count + _longest(barred))
        query_BKD = self._encode(histories)
        b, kinds, dim = query_BKD.shape
        scores, rows = self.index.search(query_BKD.reshape(b * kinds, dim), reach, allowed)
        if kinds > 1:
            scores, rows = _merged(scores.reshape(b, -1), rows.reshape(b, -1))
        return _without((scores, rows), barred, count)

    def _encode(self, histories: Histories) -> Tensor:
        if not _alone(self.retriever):
            return self.retriever.encode(histories)
        return torch.cat([self.retriever.encode(histories.take([b])) for b in range(len(histories))])

    def _score(self, histories: Histories, rows: NDArray[np.int64], context: Context) -> NDArray[np.float32]:
        assert self.ranker is not None
        if not _alone(self.ranker):
            return self.ranker.score(histories, rows, context).float().numpy()
        parts = []
        for b in range(len(histories)):
            asked = {name: values[b : b + 1] for name, values in context.items()}
            parts.append(self.ranker.score(histories.take([b]), rows[b : b + 1], asked).float().numpy())
        return np.concatenate(parts)

    def _scanned(
        self, histories: Histories, count: int, barred: Histories | None, allowed: NDArray[np.bool_] | None
    ) -> Found:
        """Retrieval by a model that scores the whole catalogue."""
        step = max(1, CELLS // max(self.n_items, 1))
        reach = min(self.n_items, count + _longest(barred))
        shut = None if allowed is None else torch.from_numpy(~allowed)
        parts: list[Found] = []
        for start in range(0, len(histories), step):
            some = slice(start, start + step)
            scores_BN = self.retriever.score(histories.take(some)).float()
            if shut is not None:
                scores_BN = scores_BN.masked_fill(shut, -torch.inf)
            found = _top_rows(scores_BN, reach)
            parts.append(_without(found, None if barred is None else barred.take(some), count))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _popular(
        self, histories: Histories, count: int, barred: Histories | None, allowed: NDArray[np.bool_] | None
    ) -> Found:
        rows = self._popular_rows if allowed is None else self._popular_rows[allowed[self._popular_rows]]
        rows_BC = np.tile(rows[: count + _longest(barred)], (len(histories), 1))
        return _without((self.popularity[rows_BC], rows_BC), barred, count)


def _alone(model: Model) -> bool:
    """Whether the model's network must see one user at a time, see `OnnxNetwork`."""
    return isinstance(model.network, OnnxNetwork) and model.network.alone


def _known(histories: Histories) -> NDArray[np.bool_]:
    """bool[B]: whether a user's history names any item of the catalogue."""
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    return np.bincount(owner, histories.items >= 0, minlength=len(histories)) > 0


def _longest(barred: Histories | None) -> int:
    return 0 if barred is None else int(barred.lengths.max(initial=0))


def _without(found: Found, barred: Histories | None, count: int) -> Found:
    """Drop each user's barred rows and keep `count`, the order as it was."""
    scores, rows = found
    if barred is not None and len(barred.items):
        shut_BX, _ = barred.padded()
        width = int(max(rows.max(initial=0), shut_BX.max(initial=0))) + 2
        line = np.arange(len(rows), dtype=np.int64)[:, None] * width
        hit = np.isin(rows + line, np.where(shut_BX >= 0, shut_BX, -2 - line) + line) & (rows >= 0)
        rows = np.where(hit, -1, rows)
        scores = np.where(hit, np.float32(-np.inf), scores)
    return ordered(scores, rows, count)


def _merged(scores: NDArray[np.float32], rows: NDArray[np.int64]) -> Found:
    """One list from K lists a user: the best score of a row that several lists hold."""
    scores, rows = ordered(scores, rows, rows.shape[1])
    by_row = np.argsort(rows, axis=1, kind="stable")  # equal rows: best score first
    in_turn = np.take_along_axis(rows, by_row, 1)
    again = np.zeros_like(in_turn, dtype=bool)
    again[:, 1:] = in_turn[:, 1:] == in_turn[:, :-1]
    np.put_along_axis(scores, by_row, np.where(again, -np.inf, np.take_along_axis(scores, by_row, 1)), 1)
    return ordered(scores, rows, rows.shape[1])


def _top_rows(scores_BN: Tensor, reach: int) -> Found:
    """The best `reach` of whole lines of scores; among equal ones the lower rows."""
    best = scores_BN.topk(reach, dim=1)
    scores, rows = best.values, best.indices
    torn = (scores_BN >= scores[:, -1:]).sum(dim=1) > reach  # equal scores on both sides of the edge
    if bool(torn.any()):
        again = scores_BN[torn].sort(dim=1, descending=True, stable=True)
        scores[torn], rows[torn] = again.values[:, :reach], again.indices[:, :reach]
    return scores.numpy(), rows.numpy()


def _spread(scores: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and deviation, as `_z` takes them."""
    held = scores.astype(np.float64)
    return (float(held.mean()), float(held.std())) if len(held) else (0.0, 0.0)


def _together(parts: Sequence[tuple[float, Reasons, float, float]]) -> Reasons:
    """Reasons of a mix: of each part its share, its reasons, and the mean and deviation it is scaled by.

    Neighbours stand for items of a history in no way: only the reasons of the first kind are kept.
    """
    score, base = 0.0, 0.0
    rows, weights = [], []
    kind = parts[0][1].kind
    for share, part, mean, spread in parts:
        scale = share / spread if spread > 1e-12 else 0.0
        score += scale * (part.score - mean)
        base += scale * (part.base - mean)
        if part.kind == kind:
            rows.append(part.rows)
            weights.append(part.weights * scale)
        else:
            base += scale * float(part.weights.sum())
    additive = all(part.additive for _, part, _, _ in parts)
    return Reasons.of(
        score, base, np.concatenate(rows), np.concatenate(weights), kind=kind, additive=additive
    )


def _z(scores_BC: NDArray[np.float32], given: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Each line to mean 0 and deviation 1 over its given places; a constant line to zeros."""
    held = np.where(given, scores_BC, 0).astype(np.float64)
    n = np.maximum(given.sum(axis=1, keepdims=True), 1)
    away = np.where(given, held - held.sum(axis=1, keepdims=True) / n, 0)
    spread = np.sqrt((away**2).sum(axis=1, keepdims=True) / n)
    made = np.divide(away, spread, out=np.zeros_like(away), where=spread > 1e-12)
    return np.asarray(made, np.float32)

"""From histories to ranked items: retrieve, leave out, rank. Rows only, no ids, no Ray.

`retrieve` and `rank` are pure functions of their arguments, since the serve graph calls them in
different replicas; `recommend` is nothing but one after the other. A user's answer does not depend
on who else is in the batch. Shapes: B users, N items, C candidates, k places, K queries, D dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recray.compression.graph import OnnxNetwork
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models.base import Context, Model, Ranker, Retriever
from recray.models.why import Reasons, spread, together, why
from recray.retrieval.arrange import Groups, Rules, arranged, fill, reaching
from recray.retrieval.delta import Delta
from recray.retrieval.index import Found, Index, build_index, longest, ordered, top_rows, without
from recray.retrieval.lists import Candidates as Candidates
from recray.retrieval.lists import Ranked as Ranked
from recray.retrieval.lists import Source as Source
from recray.retrieval.lists import merged, standard

CELLS = 1 << 24  # scores of a model without vectors that are held at a time: 64 MB


_NOTHING = Candidates(np.full((1, 1), -1), np.full((1, 1), -np.inf, np.float32))


class Recommender:
    """A retriever (with an index if it has vectors), maybe a ranker, and popularity for the unknown.

    popularity: float32[N], what a user without a history is shown, most popular first.
    candidates: how many the ranker is given. blend: the retriever's share in the final score, see
    `rank`. Models are put in eval mode; nothing here changes after it is made.

    After `with_delta` rows are those of the models and behind them the new items', masks are as long, and
    histories hold only what the models know.
    """

    delta: Delta | None = None

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

    def with_delta(self, delta: Delta) -> Recommender:
        """The same with new and withdrawn items. Raises ConfigError where they do not fit."""
        if delta.n != self.retriever.n_items or (len(delta) > delta.n and self.index is None):
            words = "has no item vectors" if self.index is None else f"knows {self.retriever.n_items} items"
            raise ConfigError(f"the retriever {words}: it takes no such new items", fix="train it again")
        made = copy(self)  # with `_cosine` where it was made: that is of the table alone
        made.delta, made.n_items = delta, len(delta)
        made.popularity = np.zeros(len(delta), np.float32)
        made.popularity[: delta.n] = self.popularity[: delta.n]
        made._popular_rows = np.lexsort((np.arange(len(delta)), -made.popularity)).astype(np.int64)
        return made

    def depth(self, k: int, rules: Rules | None = None) -> int:
        """How many candidates `recommend` asks retrieval for when k are wanted."""
        depth = max(k, self.candidates) if self.ranker is not None else k
        return depth if rules is None else rules.pool(depth)

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
        allowed = allowed if self.delta is None else self.delta.left(allowed)
        known_B = _known(histories)
        if known_B.all() and len(known_B):
            scores, rows = self._found(histories, count, exclude, allowed)
            return Candidates(rows, scores)
        scores = np.full((len(histories), count), -np.inf, np.float32)
        rows = np.full((len(histories), count), -1, np.int64)
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
        over the candidates (extra ones do not count) to mean 0 and deviation 1; blend 0 is the ranker's own
        scores. A new item, which the ranker does not know, has the mean of its scores. Without a ranker,
        and for users without a known item in their history: the candidates' own.
        """
        known_B = _known(histories)
        if self.ranker is None or self.blend == 1.0 or not known_B.any() or not candidates.rows.shape[1]:
            return candidates.scores
        users = slice(None) if known_B.all() else np.flatnonzero(known_B)
        rows = candidates.rows[users]
        asked = {name: values[users] for name, values in (context or {}).items()}
        given, counted = rows >= 0, self._told(rows)
        scores_BC = self._score(histories if known_B.all() else histories.take(users), rows, asked)
        if self.delta is not None:
            mean = np.where(counted, scores_BC, 0).sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
            scores_BC = np.where(given & ~counted, mean[:, None], scores_BC).astype(np.float32)
        if self.blend > 0:
            if candidates.extra:
                counted = counted & (np.arange(rows.shape[1]) < rows.shape[1] - candidates.extra)
            share = np.float32(self.blend)
            ranked, found = standard(np.stack([scores_BC, candidates.scores[users]]), given, counted)
            mixed = (1 - share) * ranked + share * found
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
        rules: Rules | None = None,
        groups: Groups | None = None,
    ) -> Ranked:
        """`top(rank(retrieve(depth(k))), k)` for B users; under rules `arrange(rank(propose()))`.

        groups: the values that items have in the columns which the rules' caps name.
        """
        if rules is None:
            candidates = self.retrieve(histories, self.depth(k), exclude, allowed)
            return self.top(histories, candidates, self.rank(histories, candidates, context), k)
        candidates = self.propose(histories, rules, exclude, allowed, groups)
        return self.arrange(histories, candidates, self.rank(histories, candidates, context), rules, groups)

    def propose(
        self,
        histories: Histories,
        rules: Rules,
        exclude: Histories | None = None,
        allowed: NDArray[np.bool_] | None = None,
        groups: Groups | None = None,
    ) -> Candidates:
        """`retrieve` for lists under rules: `rules.pool(depth)` columns, then `rules.extra` for what is
        pinned (neither barred nor forbidden) and for items without which the caps would not leave k."""
        found = self.retrieve(histories, self.depth(rules.k, rules), exclude, allowed)
        if not rules.extra:
            return found
        wide = found.rows.shape[1]
        rows = np.pad(found.rows, ((0, 0), (0, rules.extra)), constant_values=-1)
        scores = np.pad(found.scores, ((0, 0), (0, rules.extra)), constant_values=-np.inf)
        for user in range(len(histories)):
            one, barred = histories.take([user]), None if exclude is None else exclude.take([user])
            more = self._brought(one, barred, allowed, found.rows[user], rules, groups)
            rows[user, wide:], scores[user, wide:] = more.rows[0], more.scores[0]
        return Candidates(rows, scores, rules.extra)

    def _brought(
        self,
        history: Histories,
        barred: Histories | None,
        allowed: NDArray[np.bool_] | None,
        pool_P: NDArray[np.int64],
        rules: Rules,
        groups: Groups | None,
    ) -> Candidates:
        """What rules add to one user's pool, `rules.extra` wide."""

        def best(some_N: NDArray[np.bool_], count: int) -> Candidates:
            return self.retrieve(history, count, barred, some_N if allowed is None else some_N & allowed)

        def only(rows: Sequence[int]) -> NDArray[np.bool_]:
            return np.isin(np.arange(self.n_items), np.asarray(rows, np.int64))

        made = best(only([row for _, row in rules.pins]), rules.extra) if rules.pins else None
        pinned = [] if made is None else made.rows[0][made.rows[0] >= 0].tolist()
        if rules.caps and groups is not None:
            more = fill(pool_P, pinned, rules, groups, lambda some_N, c: best(some_N, c).rows[0])
            made = best(only([*pinned, *more]), rules.extra) if more else made
        if made is None:
            return _NOTHING
        scores, rows = without((made.scores, made.rows), Histories.of([pool_P]), rules.extra)
        return Candidates(rows, scores)

    def arrange(
        self,
        histories: Histories,
        candidates: Candidates,
        scores: NDArray[np.float32],
        rules: Rules,
        groups: Groups | None = None,
    ) -> Ranked:
        """Give the k places to candidates by their final scores and the rules, see `retrieval.arrange`.

        Behind a pin or for diversity's sake a score may be lower than the next.
        """
        ranked = self.top(histories, candidates, scores, candidates.rows.shape[1])
        best = np.full((len(histories), rules.k), -np.inf, np.float32)
        rows = np.full((len(histories), rules.k), -1, np.int64)
        for user, (line, given) in enumerate(zip(ranked.scores, ranked.rows)):
            vectors = self.vectors(given).numpy() if rules.diversity else None
            places = arranged(line, given, rules, groups, vectors)
            places = reaching(places, candidates.rows[user], line, given, rules, groups, vectors)
            best[user, : len(places)], rows[user, : len(places)] = line[places], given[places]
        return Ranked(rows, best, ranked.sources)

    @torch.inference_mode()
    def vectors(self, rows_P: NDArray[np.int64]) -> Tensor:
        """What diversity compares of items, float32[P, D]: their vectors; of a model without vectors how
        much each speaks for the others."""
        rows_P = np.maximum(rows_P, 0)
        if self.index is not None:
            if self.delta is not None:
                return self.delta.vectors(self.index, rows_P)
            found: Tensor = self.index.table(torch.from_numpy(rows_P)).float()
            return found
        each = Histories.of(rows_P[:, None])
        step = max(1, CELLS // max(self.n_items, 1))
        parts = [
            self.retriever.score(each.take(slice(start, start + step)))[:, torch.from_numpy(rows_P)]
            for start in range(0, len(each), step)
        ]
        return torch.cat(parts).float()

    @torch.inference_mode()
    def why(
        self, history: Histories, row: int, context: Context | None = None, among: Candidates | None = None
    ) -> Reasons:
        """What the final score of item `row` is made of, for one history; see `models.why`.

        Behind a ranker: its reasons and the retriever's, each as large as `rank` makes its part `among`
        the candidates of the answer. Of a user without a known item: popularity alone.
        """
        if not _known(history).any():
            popular = float(self.popularity[row])
            return Reasons.of(popular, popular, np.empty(0), np.empty(0))
        if self.ranker is None or self.blend == 1.0:
            return why(self.retriever, history, row)
        ranked = why(self.ranker, history, row, context)
        if self.blend == 0:
            return ranked
        found = self.retrieve(history, self.candidates) if among is None else among
        parts = (
            (1 - self.blend, ranked, self._score(history, found.rows, context or {})),
            (self.blend, why(self.retriever, history, row), found.scores),
        )
        told = self._told(found.rows)
        return together([(share, part, *spread(scores[told])) for share, part, scores in parts])

    @torch.inference_mode()
    def similar(self, row: int, k: int, allowed: NDArray[np.bool_] | None = None) -> Ranked:
        """The k items nearest to one item, itself left out: by cosine of item vectors.

        A retriever without vectors is asked what it recommends to a history of that one item.
        """
        itself = Histories.of([[row]])
        allowed = allowed if self.delta is None else self.delta.left(allowed)
        if self.index is None:
            scores, rows = self._found(itself, k, itself, allowed)
        else:
            query_1D = torch.nn.functional.normalize(self.vectors(np.array([row])), dim=1)
            delta = None if self.delta is None else self.delta.unit()
            found = _searched(delta, self._cosine, query_1D, min(k + 1, self.n_items), allowed)
            scores, rows = without(found, itself, k)
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
        query_BKD = self._encode(histories)
        b, kinds, dim = query_BKD.shape
        query_BD = query_BKD.reshape(b * kinds, dim)
        if kinds == 1 and self.delta is None:
            return self.index.search_without(query_BD, count, barred, allowed)
        reach = min(self.n_items, count + longest(barred))
        scores, rows = _searched(self.delta, self.index, query_BD, reach, allowed)
        if kinds > 1:
            scores, rows = merged(scores.reshape(b, -1), rows.reshape(b, -1))
        return without((scores, rows), barred, count)

    def _encode(self, histories: Histories) -> Tensor:
        if not _alone(self.retriever):
            return self.retriever.encode(histories)
        return torch.cat([self.retriever.encode(histories.take([b])) for b in range(len(histories))])

    def _told(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows are items that the models know."""
        return rows >= 0 if self.delta is None else (rows >= 0) & (rows < self.delta.n)

    def _score(self, histories: Histories, rows: NDArray[np.int64], context: Context) -> NDArray[np.float32]:
        assert self.ranker is not None
        rows = rows if self.delta is None else np.where(self._told(rows), rows, -1)
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
        reach = min(self.n_items, count + longest(barred))
        shut = None if allowed is None else torch.from_numpy(~allowed)
        parts: list[Found] = []
        for start in range(0, len(histories), step):
            some = slice(start, start + step)
            scores_BN = self.retriever.score(histories.take(some)).float()
            if shut is not None:
                scores_BN = scores_BN.masked_fill(shut, -torch.inf)
            found = top_rows(scores_BN, reach)
            parts.append(without(found, None if barred is None else barred.take(some), count))
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def _popular(
        self, histories: Histories, count: int, barred: Histories | None, allowed: NDArray[np.bool_] | None
    ) -> Found:
        rows = self._popular_rows if allowed is None else self._popular_rows[allowed[self._popular_rows]]
        rows_BC = np.tile(rows[: count + longest(barred)], (len(histories), 1))
        return without((self.popularity[rows_BC], rows_BC), barred, count)


def _searched(
    delta: Delta | None, index: Index, queries_BD: Tensor, k: int, allowed: NDArray[np.bool_] | None
) -> Found:
    if delta is None:
        return index.search(queries_BD, k, allowed)
    return delta.search(index, queries_BD, k, allowed)


def _alone(model: Model) -> bool:
    """Whether the model's network must see one user at a time, see `OnnxNetwork`."""
    return isinstance(model.network, OnnxNetwork) and model.network.alone


def _known(histories: Histories) -> NDArray[np.bool_]:
    """bool[B]: whether a user's history names any item of the catalogue."""
    known: NDArray[np.bool_] = histories.known().lengths > 0
    return known

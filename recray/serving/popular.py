"""What is popular, without a model: the answer that can always be made, in microseconds, wherever ids are.

It is what a user without a history is answered by `Recommender.recommend`, to the same filter, exclusions,
pins and caps; only diversity, which needs item vectors, is left out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from recray.bundles.bundle import Front, Request
from recray.data.sequences import Histories
from recray.models.base import Catalogue
from recray.models.popularity import Popularity
from recray.recommender import Recommender
from recray.retrieval.arrange import Rules

WIDER = 8  # times as many rows are looked at where a filter leaves too few


class Popular:
    """The items of a front, most popular first, new ones last, withdrawn ones not at all."""

    def __init__(self, front: Front) -> None:
        n = len(front.items)
        self._front, self._counts = front, np.zeros(n, np.float32)
        self._counts[: len(front.popularity)] = front.popularity
        gone = front.items.rows_of(front.changes.withdrawn) if front.changes is not None else np.empty(0, int)
        self._live = np.ones(n, bool)
        self._live[gone[gone >= 0]] = False
        order = np.lexsort((np.arange(n), -self._counts))
        self._rows = order[self._live[order]].astype(np.int32)
        self._ruled: Recommender | None = None

    def rows(self, request: Request) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The best k for a request as (rows int32[k], scores float32[k]); fewer where no more are left."""
        if request.rules is not None and (request.rules.pins or request.rules.caps):
            return self._by_rules(request, replace(request.rules, diversity=0.0))
        mask, barred = self._front.allowed(request), {*request.exclude.tolist()}
        reach = request.k + len(barred)
        while True:  # mostly the first rows will do, however long the catalogue is
            some = self._rows[:reach]
            if mask is not None:
                some = some[mask[some]]
            found = [row for row in some.tolist() if row not in barred]
            if len(found) >= request.k or reach >= len(self._rows):
                rows = np.array(found[: request.k], np.int32)
                return rows, self._counts[rows]
            reach *= WIDER

    def _by_rules(self, request: Request, rules: Rules) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        if self._ruled is None:
            model = Popularity(Catalogue(len(self._counts), {}), Popularity.Config())
            self._ruled = Recommender(model, popularity=self._counts)
        mask = self._front.allowed(request)
        ranked = self._ruled.recommend(
            Histories.of([[]]),
            request.k,
            Histories.of([request.exclude]),
            self._live if mask is None else self._live & mask,
            rules=rules,
            groups=self._front.groups(rules),
        )
        kept = ranked.rows[0] >= 0
        return ranked.rows[0][kept].astype(np.int32), ranked.scores[0][kept]

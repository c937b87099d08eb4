"""What the stages compute, on batches of requests, without Ray and without asyncio.

A batch is what travels: rows in a few flat arrays, whoever is in it, and the filters' own words; never a
mask or a matrix over the catalogue. Every batch names its generation, and a stage that holds another
bundle answers None, so that rows of one are never read as rows of the other.

Shapes: B requests, C candidates, k places of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from recray.bundles.answer import histories_of
from recray.bundles.bundle import Bundle, Request
from recray.bundles.filters import Filter
from recray.data.sequences import Histories
from recray.models.base import Context
from recray.recommender import Candidates, Ranked
from recray.retrieval.arrange import Rules


class RetrieveBatch(NamedTuple):
    """B requests: what was done, what is barred, what columns must hold, how many are wanted, and whether
    their lists are under rules."""

    histories: Histories
    exclude: Histories
    filters: Sequence[Filter]
    wants: Sequence[int]
    rules: Sequence[Rules | None]


class RankBatch(NamedTuple):
    """rows int32[B, C] (-1 for none) and scores float32[B, C] of candidates; context: value rows int32[B]."""

    histories: Histories
    rows: NDArray[np.int32]
    scores: NDArray[np.float32]
    wants: Sequence[int]  # how many candidates there are
    context: Mapping[str, NDArray[np.int32]]
    k: int
    rules: Sequence[Rules | None]


class Found(NamedTuple):
    """rows int32[B, C], scores float32[B, C], best first; -1 and -inf where fewer are left."""

    rows: NDArray[np.int32]
    scores: NDArray[np.float32]

    def take(self, places: NDArray[np.int64] | Sequence[int]) -> Found:
        """The lines of some requests."""
        return Found(self.rows[places], self.scores[places])


def retrieve(bundle: Bundle, batch: RetrieveBatch) -> Found:
    """The best items of each request by the retriever; asks that want as many under the same filter
    go through the model together."""

    def found(places: list[int]) -> Candidates:
        want, mask = batch.wants[places[0]], bundle.filters.mask(batch.filters[places[0]])
        histories, barred = _some(batch.histories, places), _some(batch.exclude, places)
        rules = batch.rules[places[0]]
        if rules is None:
            return bundle.recommender.retrieve(histories, want, barred, mask)
        return _ruled(bundle, rules, histories, barred, mask)

    keys = [(w, repr(f), r) for w, f, r in zip(batch.wants, batch.filters, batch.rules)]
    return _by_group(keys, max(batch.wants), found)


def _ruled(
    bundle: Bundle, rules: Rules, histories: Histories, barred: Histories, mask: NDArray[np.bool_] | None
) -> Candidates:
    """Candidates for lists under rules; for those that nothing ranks afterwards, the lists."""
    recommender, groups = bundle.recommender, bundle.groups(rules)
    found = recommender.propose(histories, rules, barred, mask, groups)
    last = np.flatnonzero(
        histories.lengths == 0 if recommender.ranker is not None else histories.lengths >= 0
    )
    if len(last):
        alone = Candidates(found.rows[last], found.scores[last], found.extra)
        ranked = recommender.arrange(histories.take(last), alone, alone.scores, rules, groups)
        found.rows[last], found.scores[last] = -1, -np.inf
        found.rows[last, : rules.k], found.scores[last, : rules.k] = ranked.rows, ranked.scores
    return found


def rank(bundle: Bundle, batch: RankBatch) -> Found:
    """The best k of each request's candidates; asks with as many candidates go together."""

    def best(places: list[int]) -> Ranked:
        want, rules = batch.wants[places[0]], batch.rules[places[0]]
        histories = _some(batch.histories, places)
        lines = batch.rows[places, :want].astype(np.int64)
        candidates = Candidates(lines, batch.scores[places, :want], 0 if rules is None else rules.extra)
        context: Context = {name: rows[places] for name, rows in batch.context.items()}
        scores = bundle.recommender.rank(histories, candidates, context)
        if rules is None:
            return bundle.recommender.top(histories, candidates, scores, batch.k)
        return bundle.recommender.arrange(histories, candidates, scores, rules, bundle.groups(rules))

    return _by_group(list(zip(batch.wants, batch.rules)), batch.k, best)


def similar(bundle: Bundle, row: int, k: int) -> Found:
    """The k items nearest to one, a batch of one."""
    allowed = bundle.filters.mask(bundle.wanted(None))
    ranked = bundle.recommender.similar(row, k, allowed)
    return Found(ranked.rows.astype(np.int32), ranked.scores)


def to_retrieve(requests: Sequence[Request], candidates: int) -> RetrieveBatch:
    """What to ask the retriever for `requests`; candidates: how many the ranker wants, 0 without one."""
    return RetrieveBatch(
        histories_of(requests),
        Histories.of([request.exclude for request in requests]),
        [request.filter for request in requests],
        [_want(request, candidates) for request in requests],
        [request.rules for request in requests],
    )


def _want(request: Request, candidates: int) -> int:
    depth = max(request.k, candidates)
    return depth if request.rules is None else request.rules.pool(depth) + request.rules.extra


def ranks(requests: Sequence[Request]) -> list[int]:
    """The places of those whom a ranker knows something of: those with a history."""
    return [place for place, request in enumerate(requests) if len(request.history)]


def to_rank(
    requests: Sequence[Request],
    asked: RetrieveBatch,
    found: Found,
    among: Sequence[int] | None = None,
    part: int = 1,
) -> tuple[Sequence[int], RankBatch]:
    """(who is to be ranked: `among`, by default those with a history; what to ask the ranker for them: of
    all their candidates, or of the best one in `part`)."""
    places = ranks(requests) if among is None else among
    some = [requests[place] for place in places]
    lines = found if len(places) == len(requests) else found.take(places)
    wants = [asked.wants[place] for place in places]
    if part > 1:
        wants = [max(request.k, want // part) for request, want in zip(some, wants)]
        lines = Found(lines.rows[:, : max(wants)], lines.scores[:, : max(wants)])
    names = some[0].context if some else ()
    context = {name: np.array([request.context[name] for request in some], np.int32) for name in names}
    return places, RankBatch(
        _some(asked.histories, places),
        lines.rows,
        lines.scores,
        wants,
        context,
        max((request.k for request in some), default=0),
        [request.rules for request in some],
    )


def _by_group(
    keys: Sequence[Hashable], width: int, work: Callable[[list[int]], Candidates | Ranked]
) -> Found:
    """What `work` finds for the places of equal keys, as lines of one `width`."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    made = Found(np.full((len(keys), width), -1, np.int32), np.full((len(keys), width), -np.inf, np.float32))
    for places in groups.values():
        found = work(places)
        if found.rows.shape == made.rows.shape:  # of them all
            return Found(found.rows.astype(np.int32), found.scores)
        wide = found.rows.shape[1]
        made.rows[places, :wide], made.scores[places, :wide] = found.rows, found.scores
    return made


def _some(histories: Histories, places: Sequence[int]) -> Histories:
    return histories if len(places) == len(histories) else histories.take(np.asarray(places, np.int64))

"""Ask a model, ranker or whole recommender for lists, and measure them user by user.

Full ranking over the catalogue is the default; given negatives only where a protocol asks for them.
Ties go to the lower item row everywhere, so that a model which scores all items alike earns nothing
by luck, and the same model gives the same numbers on every machine.

Shapes: B users, k places of a list, N items, C candidates a user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from recray.errors import InputError
from recray.metrics import beyond, interval, rating
from recray.metrics.interval import Difference
from recray.metrics.ranking import ranking
from recray.models.base import Ranker, Retriever
from recray.models.ratings import PredictsRatings
from recray.progress import warn

if TYPE_CHECKING:
    from recray.data.dataset import Cases, Dataset
    from recray.recommender import Recommender

TopK = Callable[["Cases", int], NDArray[np.int64]]
"""(cases of B users, k) -> item rows int64[B, k], best first, -1 where there is none."""
Predict = Callable[["Cases"], NDArray[np.float64]]
"""cases of B users with n targets together -> a predicted rating for each target, float[n]."""

CELLS = 1 << 24  # scores held at a time: 64 MiB of float32
PAIRS = 1 << 18  # (user, candidate) pairs a ranker sees at a time; each has activations of its own


@dataclass(frozen=True, eq=False)
class Report:
    """What was measured: per-user values, their means, and numbers that only the whole has.

    values: metric -> float64[B], for the users `user_rows` int[B] in the same order; a user is there
    once for each of its interactions where those are what is measured.
    whole: numbers of all lists together, such as "coverage@10". skipped: users without a target.
    differences: metric -> ours minus a baseline's, where one was measured beside it.
    """

    values: Mapping[str, NDArray[np.float64]]
    user_rows: NDArray[np.int32]
    whole: Mapping[str, float] = field(default_factory=dict)
    skipped: int = 0
    differences: Mapping[str, Difference] = field(default_factory=dict)

    @cached_property
    def means(self) -> dict[str, float]:
        """Every metric as one number."""
        return {**{name: float(v.mean()) for name, v in self.values.items()}, **self.whole}

    @cached_property
    def users(self) -> int:
        """How many users were asked, each counted once."""
        return len(np.unique(self.user_rows))

    def interval(self, metric: str) -> Difference:
        """The mean of one per-user metric with its 95 % interval."""
        return interval.mean_interval(self._of(metric))

    def against(self, other: Report, metric: str = "ndcg@10") -> Difference:
        """Mean of ours - other's over the same users, with its 95 % interval (paired).

        Raises InputError for a metric that has no per-user values or for reports of other users.
        """
        if not np.array_equal(self.user_rows, other.user_rows):
            raise InputError("two reports of different users cannot be compared", where=metric)
        return interval.paired(self._of(metric), other._of(metric))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON: users, skipped, means, the 95 % interval of each per-user metric, differences."""
        bounds = {name: self.interval(name).as_dict() for name in self.values}
        return {
            "users": self.users,
            "skipped": self.skipped,
            "means": self.means,
            "intervals": {name: [b["low"], b["high"]] for name, b in bounds.items()},
            "differences": {name: d.as_dict() for name, d in self.differences.items()},
        }

    def table(self) -> str:
        """Text for people: one line a metric, one column a cut."""
        grid: dict[str, dict[str, float]] = {}
        for full, value in self.means.items():
            name, _, cut = full.partition("@")
            grid.setdefault(name, {})[cut and f"@{cut}"] = value
        cuts = list(dict.fromkeys(cut for row in grid.values() for cut in row))
        wide = max(map(len, grid), default=0)
        lines = [" " * wide + "".join(f"{cut:>10}" for cut in cuts)]
        for name, row in grid.items():
            cells = (f"{row[cut]:10.4f}" if cut in row else " " * 10 for cut in cuts)
            lines.append(f"{name:<{wide}}" + "".join(cells))
        told = [f"{name} minus the baseline's: {d}" for name, d in self.differences.items()]
        return "\n".join([*lines, f"{self.users:,} users", *told])

    def _of(self, metric: str) -> NDArray[np.float64]:
        if metric not in self.values:
            raise InputError(
                f"no per-user values of {metric!r}", fix=f"measured were {', '.join(self.values)}"
            )
        values = self.values[metric]
        return values if self.users == len(values) else interval.by_user(values, self.user_rows)


@dataclass(frozen=True, eq=False)
class Beyond:
    """What the metrics beyond accuracy must know of the catalogue; see `beyond_of`.

    information: float64[N] bits of surprise an item carries; categories: int64[N] or None, what diversity
    compares, negative where an item has none.
    """

    information: NDArray[np.float64]
    categories: NDArray[np.int64] | None = None


def beyond_of(data: Dataset) -> Beyond:
    """From a dataset: popularity over its training split, and diversity by its category column if any."""
    train = data.histories("train")
    users = np.asarray(train.to_csr(data.n_items).getnnz(axis=0), dtype=np.int64)
    features = data.item_features
    categories = None
    if features is not None and "category" in features.column_names:
        categories = _categories(features.column("category").combine_chunks())
    # users of features or links alone have taken nothing, and would make every item look rarer
    active = max(1, int(np.count_nonzero(train.lengths)))
    return Beyond(beyond.self_information(users, active), categories)


def evaluate(
    top_k: TopK,
    cases: Cases,
    *,
    ks: Sequence[int] = (10, 20),
    batch: int = 512,
    catalogue: Beyond | None = None,
) -> Report:
    """Ask `top_k` for every user's list, `batch` users at a time, and measure it.

    Gives all of `metrics.ranking` at each cut of `ks`; with `catalogue` also "coverage@k" (whole),
    "novelty@k" and, if it has categories, "diversity@k", and a warning where targets are in their users' own
    histories. Users without a target are skipped and counted. Raises InputError when no user is left.
    """
    asked = np.flatnonzero(cases.targets.lengths > 0)
    if not len(asked):
        raise InputError("no user has a held-out item to be found", fix="prepare with another --split")
    parts: list[dict[str, NDArray[np.float64]]] = []
    shown = {k: np.zeros(len(catalogue.information), dtype=bool) for k in ks} if catalogue else {}
    repeated = 0
    for part in _batches(cases, asked, batch):
        rows = top_k(part, max(ks))
        values = ranking(rows, part.targets, ks)
        if catalogue is not None:  # what a person reads; an epoch of training would say it each time
            repeated += _with_known_target(part)
        for k in ks if catalogue is not None else ():
            assert catalogue is not None
            top = rows[:, :k]
            shown[k][top[top >= 0]] = True
            values[f"novelty@{k}"] = beyond.novelty(top, catalogue.information)
            if catalogue.categories is not None:
                values[f"diversity@{k}"] = beyond.diversity(top, catalogue.categories)
        parts.append(values)
    if repeated:
        warn(
            f"{repeated:,} of {len(asked):,} users have held-out items that are in their own histories, "
            "which lists leave out: these count as missed; where they are duplicates, prepare with --dedupe"
        )
    return Report(
        {name: np.concatenate([p[name] for p in parts]) for name in parts[0]},
        cases.user_rows[asked],
        {f"coverage@{k}": float(mask.mean()) for k, mask in shown.items()},
        len(cases.user_rows) - len(asked),
    )


def evaluate_ratings(predict: Predict, cases: Cases, *, batch: int = 512) -> Report:
    """Compare predicted ratings with the weights of the held-out interactions.

    Values "mse" and "mae" are one a *rating* (`user_rows` repeats its user); whole has "rmse".
    Raises InputError when the held-out interactions carry no weight.
    """
    if cases.targets.weights is None:
        raise InputError("the held-out interactions have no rating", fix="prepare with a weight column")
    asked = np.flatnonzero(cases.targets.lengths > 0)
    if not len(asked):
        raise InputError("no user has a held-out rating", fix="prepare with another --split")
    missed = np.concatenate(
        [
            rating.errors(predict(part), np.asarray(part.targets.weights))
            for part in _batches(cases, asked, batch)
        ]
    )
    squared = missed**2
    return Report(
        {"mse": squared, "mae": np.abs(missed)},
        np.repeat(cases.user_rows[asked], cases.targets.lengths[asked]),
        {"rmse": float(np.sqrt(squared.mean()))},
        len(cases.user_rows) - len(asked),
    )


def with_ratings(report: Report, model: object, cases: Cases) -> Report:
    """The report with "rmse" and "mae" of the same cases in `whole`, where the model predicts ratings.

    Left as it is where the model does not, or where the held-out weights are all the same: no ratings.
    """
    if not isinstance(model, PredictsRatings) or not model.predicts:
        return report
    given = cases.targets.weights
    if given is None or not len(given) or (given == given[0]).all():
        return report
    found = evaluate_ratings(model_predict(model), cases).means
    return replace(report, whole={**report.whole, "rmse": found["rmse"], "mae": found["mae"]})


def model_predict(model: PredictsRatings) -> Predict:
    """What a model says of each target, from the history with its weights."""
    return lambda cases: model.predict(cases.histories, cases.targets)


def model_top_k(model: Retriever | Ranker) -> TopK:
    """Full ranking: every item of the catalogue is scored, the items of the history are left out.

    Users go in chunks so that at most CELLS scores are held, whatever the batch.
    """

    def top_k(cases: Cases, k: int) -> NDArray[np.int64]:
        made = np.full((len(cases.user_rows), k), -1, dtype=np.int64)
        step = max(1, (CELLS if isinstance(model, Retriever) else PAIRS) // model.n_items)
        for start in range(0, len(made), step):
            part = cases.take(slice(start, start + step))
            scores_BN = _all_scores(model, part)
            owner = np.repeat(np.arange(len(part.user_rows)), part.histories.lengths)
            known = part.histories.items >= 0
            scores_BN[owner[known], part.histories.items[known]] = -np.inf
            made[start : start + step] = best(scores_BN, k)
        return made

    return top_k


def sampled_top_k(model: Retriever | Ranker, negatives: NDArray[np.int64]) -> TopK:
    """Rank each user's targets among given negatives only, for protocols that ask for it (NCF: 1 + 99).

    negatives: int64[U, n], row u being those of the user row u, -1 for none. A negative that equals a
    target, or comes twice, is one candidate, as in the protocol's own code.
    """

    def top_k(cases: Cases, k: int) -> NDArray[np.int64]:
        targets, _ = cases.targets.padded()
        candidates = np.concatenate([targets, negatives[cases.user_rows]], axis=1)
        candidates = np.sort(candidates, axis=1)
        candidates[:, 1:][candidates[:, 1:] == candidates[:, :-1]] = -1
        return _top_of(model, cases, candidates, k)

    return top_k


def ranker_top_k(ranker: Ranker, candidates: TopK, count: int = 200) -> TopK:
    """The ranker's order of the `count` candidates that another TopK proposes."""

    def top_k(cases: Cases, k: int) -> NDArray[np.int64]:
        return _top_of(ranker, cases, candidates(cases, max(count, k)), k)

    return top_k


def recommender_top_k(recommender: Recommender, allowed: NDArray[np.bool_] | None = None) -> TopK:
    """The whole pipeline, as it is served: retrieve, leave the history out, rank.

    allowed: bool[N], the items that a filter leaves.
    """

    def top_k(cases: Cases, k: int) -> NDArray[np.int64]:
        ranked = recommender.recommend(
            cases.histories, k, exclude=cases.histories, allowed=allowed, context=cases.context
        )
        return np.asarray(ranked.rows, dtype=np.int64)

    return top_k


def best(
    scores_BC: NDArray[np.float32], k: int, rows_BC: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The k best rows of each user, int64[B, k], best first, ties to the lower row.

    rows_BC: which item each column is (ascending along C, or -1); by default column i is item i. Scores of
    minus infinity or NaN are never taken: their places are -1.
    """
    scores = torch.from_numpy(np.where(np.isnan(scores_BC), -np.inf, scores_BC))
    b, c = scores.shape
    k_in = min(k, c)
    made = np.full((b, k), -1, dtype=np.int64)
    if not k_in or not b:
        return made
    top, at = torch.topk(scores, k_in, dim=1)
    edge = top[:, -1:]
    torn = torch.nonzero((scores >= edge).sum(dim=1) > k_in).squeeze(1)  # ties across the edge
    if len(torn):
        mine, limit = scores[torn], edge[torn]
        above, level = mine > limit, mine == limit
        room = k_in - above.sum(dim=1, keepdim=True)
        chosen = above | (level & (level.cumsum(dim=1) <= room))
        at[torn] = torch.nonzero(chosen)[:, 1].view(len(torn), k_in)
    at = at.sort(dim=1).values
    values = scores.gather(1, at)
    values, order = values.sort(dim=1, descending=True, stable=True)
    columns = at.gather(1, order).numpy()
    rows = columns if rows_BC is None else np.take_along_axis(rows_BC, columns, axis=1)
    made[:, :k_in] = np.where(torch.isneginf(values).numpy(), -1, rows)
    return made


def _categories(column: Any) -> NDArray[np.int64] | None:
    """Codes int64[N] of an Arrow array of N categories, of lists the first; None of what has none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    codes, owner = np.full(len(column), -1, dtype=np.int64), np.arange(len(column))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
        owner, first = np.unique(parents, return_index=True)
        column = column.flatten().take(pa.array(first))
    if pa.types.is_nested(column.type):
        return None
    found = column.dictionary_encode().indices.fill_null(-1)
    codes[owner] = found.to_numpy(zero_copy_only=False)
    return codes


def _with_known_target(cases: Cases) -> int:
    """How many users have a target that is in their own history."""
    span = 1 + max(int(some.items.max(initial=0)) for some in (cases.histories, cases.targets))
    known, wanted = (
        np.repeat(np.arange(len(cases)), some.lengths) * span + some.items
        for some in (cases.histories.known(), cases.targets.known())
    )
    return len(np.unique(wanted[np.isin(wanted, known)] // span))


def _batches(cases: Cases, asked: NDArray[np.int64], batch: int) -> Iterator[Cases]:
    for start in range(0, len(asked), batch):
        yield cases.take(asked[start : start + batch])


def _all_scores(model: Retriever | Ranker, cases: Cases) -> NDArray[np.float32]:
    if isinstance(model, Retriever):
        return model.score(cases.histories).float().cpu().numpy().copy()
    everything = np.tile(np.arange(model.n_items, dtype=np.int64), (len(cases.user_rows), 1))
    return model.score(cases.histories, everything, cases.context).cpu().numpy().copy()


def _top_of(
    model: Retriever | Ranker, cases: Cases, candidates: NDArray[np.int64], k: int
) -> NDArray[np.int64]:
    """The k best of given candidates int64[B, C] (-1 where there is none), chunked like a full ranking."""
    made = np.full((len(candidates), k), -1, dtype=np.int64)
    wide = model.n_items if isinstance(model, Retriever) else candidates.shape[1]
    step = max(1, (CELLS if isinstance(model, Retriever) else PAIRS) // max(wide, 1))
    for start in range(0, len(made), step):
        part = cases.take(slice(start, start + step))
        rows = np.sort(candidates[start : start + step], axis=1)  # ties then go to the lower row
        if isinstance(model, Retriever):
            scores = np.take_along_axis(_all_scores(model, part), np.maximum(rows, 0), axis=1)
            scores[rows < 0] = -np.inf
        else:
            scores = model.score(part.histories, rows, part.context).cpu().numpy()
        made[start : start + step] = best(scores, k, rows)
    return made

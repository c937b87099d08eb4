"""`recray compress`: the best recommender that fits a budget, out of plans that were measured."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from recray.bundles.build import models_of
from recray.bundles.plan import Plan
from recray.data.dataset import Dataset
from recray.errors import BudgetError, ConfigError, RecrayError
from recray.manifest import Artefact, versions
from recray.models.base import Model, Ranker, Retriever
from recray.money import Price
from recray.progress import say, warn
from recray.storage import Place, scratch
from recray.tuning import front_page, packing
from recray.tuning.forecast import Forecast, part_points, smallest
from recray.tuning.judge import Judge
from recray.tuning.latency import Effort
from recray.tuning.pareto import Budget, megabytes, milliseconds
from recray.tuning.results import open_cache, write_search
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Space
from recray.tuning.sweep import Objective, Sweep, run
from recray.tuning.trial import Trial, TrialCache

PARTS_FROM = 12  # trials from which single choices are measured beforehand: they take as long as a few trials


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is asked for: seconds of p99 and bytes; money per 1,000 recommendations, if it is limited; the
    load in requests a second (0: one client), spread over a replica a core; and where a core is rented."""

    p99: float
    size: float
    cost: float = math.inf
    rps: float = 0.0
    price: Price = field(default_factory=Price)

    @property
    def budget(self) -> Budget:
        """Raises ConfigError for limits that nothing fits."""
        if not 0 <= self.rps < math.inf:
            raise ConfigError(f"a load of {self.rps:g} requests/s", fix="give --rps of 1 or more")
        return Budget(self.p99, self.size, self.cost)

    def effort(self, effort: Effort, http: float) -> Effort:
        """A measurement under the load that one replica has."""
        if not self.rps:
            return effort
        return replace(effort, rate=self.rps / cores(), beside=http)


def search_compress(
    retriever: Artefact,
    ranker: Artefact | None,
    dataset: Dataset,
    *,
    limits: Limits,
    trials: int = 20,
    out: str | os.PathLike[str] | Place,
    base: Plan | None = None,
    http_overhead_s: float = 0.0,
    http_mean_s: float | None = None,
    kept: Mapping[str, TrialCache] = MappingProxyType({}),
    workers: int = 1,
    metric: str = "ndcg@10",
    users: int = 2000,
    effort: Effort | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
    address: str | None = None,
    objective: Objective | None = None,
    parts: bool | None = None,
) -> Artefact:
    """Search plans for the best `metric` within the limits; leave a search.

    Quality is measured on at most `users` validation cases, never on the test split; p99 is one user at
    a time on a pinned core (or the load's share of one) plus `http_overhead_s`, the measured share of the
    way to it (`http_mean_s`, None: the same, is its share as a rule); size is the bytes of the files of
    tables, graphs and index. The first trial is the uncompressed plan, `base`.

    Of the trials that fit, those whose quality cannot be told from the best one's - the 95 % interval
    of the paired difference holds zero, and the difference is at most `tolerance` of it - compete by
    p99 x bytes; the winner is chosen. Raises ConfigError for a budget that can fit nothing, BudgetError
    when no table is small enough, or (after writing the search) when no trial fits, RecrayError when every
    trial failed.

    workers: trials at once on Ray Tune; 0 runs them here. `objective` replaces building and measuring.
    parts: whether single choices are measured first (see `forecast.py`); None: from PARTS_FROM trials on.
    kept: what else was measured for this search, by the folder of the artefact that it is kept in.
    """
    budget = limits.budget
    _check_http(http_overhead_s, limits.p99)
    models = models_of(retriever, ranker, dataset)
    space = _space(*models)
    _check_size(space, models, limits.size)
    second = {} if ranker is None else {"ranker": ranker}
    parents = {"dataset": dataset.artefact, "checkpoint": retriever, **second}
    tried = packing.PlanTrial(
        retriever=retriever.place.uri,
        ranker=None if ranker is None else ranker.place.uri,
        dataset=dataset.artefact.place.uri,
        metric=metric,
        users=users,
        seed=seed,
        effort=limits.effort(effort or Effort(), http_overhead_s if http_mean_s is None else http_mean_s),
    )
    http = (http_overhead_s, http_mean_s)
    work = Work(space, models, tried, budget, limits, http, tolerance, out, parents, base)
    with scratch() as pieces:
        asked = objective or replace(tried, pieces=pieces)
        if objective is None and (trials >= PARTS_FROM if parts is None else parts):
            work.measure_parts(replace(tried, pieces=pieces), workers, address)
        found = run(work.sweep(trials, race=objective is None), asked, workers=workers, address=address)
    front, chosen = work.judge.verdict(found, work.usual, work.searcher.rejected)
    recipe = {
        "search": "compress",
        "budget": work.judge.terms(),
        "given": {**tried.settings(), "trials": trials, "tolerance": tolerance},
    }
    made = write_search(
        out, work.cache, found, front=front, chosen=chosen, parents=parents, recipe=recipe,
        kept={"parts": work.parts, **kept},
        pages={front_page.PAGE: front_page.page(front), front_page.PICTURE: front_page.picture(front)},
    )  # fmt: skip
    _tell(made, front, chosen)
    return made


class Work:
    """What a search is made of: caches beside `out`, forecast, judge and searcher."""

    def __init__(
        self,
        space: Space,
        models: tuple[Retriever, Ranker | None],
        tried: packing.PlanTrial,
        budget: Budget,
        limits: Limits,
        http: tuple[float, float | None],
        tolerance: float,
        out: str | os.PathLike[str] | Place,
        parents: Mapping[str, Artefact],
        base: Plan | None = None,
    ) -> None:
        """http: its share of p99, and of an answer as a rule (None: the same)."""
        self.space, self.tried = space, tried
        first = packing.first_points(space, base)
        self.usual = first[0]
        hashes = {role: parent.hash for role, parent in parents.items()}
        context = {"inputs": hashes, "given": tried.settings(), **_here()}
        self.cache = open_cache(out, context)
        self.parts = open_cache(out, {**context, "given": tried.as_part().settings()}, "parts")
        self.forecast = Forecast(
            space,
            *models,
            budget,
            tried.metric,
            overhead=http[0],
            seed=tried.seed,
            cost=lambda seconds, size: self.judge.cost(seconds, size).total,
            usual=self.usual,
        )
        self.judge = Judge(
            budget,
            tried.metric,
            http[0],
            tolerance,
            self.cache.hash(packing.canonical(self.usual)),
            mean=http[1],
            price=limits.price,
            rps=limits.rps,
            replicas=cores() if limits.rps else 1,
            forecast=self.forecast,
        )
        terms = {"p99": limits.p99 - http[0], "bytes": limits.size}
        self.searcher = ConstrainedSearcher(
            space,
            {tried.metric: "max"},
            limits=terms if math.isinf(limits.cost) else {**terms, "cost": limits.cost},
            seed=tried.seed,
            first=first,
            canonical=packing.canonical,
            tidy=lambda point: packing.tidy(point, self.usual),
            bound=self.forecast.bound,
            propose=self.forecast.propose,
            derive=self.judge.derived,
        )

    def sweep(self, trials: int, until: float = math.inf, *, race: bool = False) -> Sweep:
        """The search's trials; each is told to the forecast, too. until: see `Sweep`. race: see `race.py`."""

        def heard(trial: Trial) -> None:
            self.forecast.learn(trial)
            self.judge.hear(trial)

        return Sweep(
            self.searcher,
            self.cache,
            trials,
            describe=self.judge.line,
            usual=self.usual,
            heard=heard,
            until=until,
            beside=self.forecast.rival if race else None,
        )

    def measure_parts(
        self, tried: packing.PlanTrial, workers: int, address: str | None, until: float = math.inf
    ) -> None:
        """Measure every single choice once; what fails, fails alone. Parts measured before are kept.

        until: see `Sweep`.
        """
        points = part_points(self.space, self.usual)
        fixed = ConstrainedSearcher(
            self.space, {tried.metric: "max"}, first=points, canonical=packing.canonical
        )
        sweep = Sweep(
            fixed,
            self.parts,
            len(points),
            describe=lambda part: _part_line(part, tried.metric),
            usual=self.usual,
            heard=lambda part: self.forecast.learn(part, part=True),
            noun="part",
            until=until,
        )
        try:
            run(sweep, tried.as_part(), workers=workers, address=address)
        except RecrayError as error:  # the trials will say what is wrong
            warn(f"no part could be measured: {error}")


def _part_line(part: Trial, metric: str) -> str:
    stages = part.detail["latency"]["stages"]
    told = "  ".join(f"{name} {milliseconds(stage['p50'])}" for name, stage in stages.items())
    return f"{metric} {part.metrics[metric]:.4f}  {told}  {megabytes(part.metrics['bytes'])}"


def _tell(made: Artefact, front: dict[str, Any], chosen: dict[str, Any]) -> None:
    """The table, how far the forecast is to be trusted, the choice; BudgetError where there is none."""
    say(front_page.table(front))
    say(f"latency as predicted: {front['predictor']['words']}")
    if front["rejected_unmeasured"]:
        say(f"{front['rejected_unmeasured']} plans were left out unbuilt: they cannot fit")
    say(f"quality against p99 and bytes: {made.place / front_page.PAGE}")
    if chosen["trial"] is None:
        raise BudgetError(
            chosen["why"], fix=f"give a larger budget or more --trials; {made.place} keeps what was tried"
        )
    say(f"chosen: {chosen['why']}")


def _check_http(share: float, p99: float) -> None:
    """Raise ConfigError where HTTP alone takes as long as is allowed."""
    if not 0 <= share < p99:
        raise ConfigError(
            f"{milliseconds(p99)} of p99 leave nothing beside the {milliseconds(share)} of HTTP",
            fix="give a larger --p99",
        )


def _check_size(space: Space, models: tuple[Model, Model | None], size: float) -> None:
    """Raise BudgetError where the tables alone are over the budget, whatever their codec."""
    least, words = smallest(space, *models)
    if least > size:
        raise BudgetError(
            f"no plan fits {megabytes(size)}: the smallest tables ({words}) alone take {megabytes(least)}, "
            f"size is {least / size - 1:.0%} over",
            fix="give a larger --size, or train fewer dimensions",
        )


def _space(retriever: Retriever, ranker: Ranker | None) -> Space:
    space = packing.plan_space(retriever, ranker)
    if space is None:
        raise ConfigError(f"there is nothing to compress in {retriever.name}", fix="bundle it as it is")
    return space


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here() -> dict[str, Any]:
    """What of this machine and its software decides a measurement."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if "model name" in line), model)
    return {"versions": versions(), "machine": [platform.machine(), model, os.cpu_count()]}

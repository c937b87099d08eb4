"""`recray compress`: the best recommender that fits a budget, out of plans that were measured."""

from __future__ import annotations

import os
import platform
import tempfile
from dataclasses import replace
from typing import Any

from recray.data.dataset import Dataset
from recray.errors import BudgetError, ConfigError
from recray.manifest import Artefact, versions
from recray.models.base import Model, Ranker, Retriever
from recray.models.saved import load_model
from recray.progress import say
from recray.storage import Place
from recray.tuning import packing
from recray.tuning.judge import Judge
from recray.tuning.latency import Effort
from recray.tuning.pareto import Budget, milliseconds
from recray.tuning.results import open_cache, write_search
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point, Space
from recray.tuning.sweep import Objective, Sweep, run


def search_compress(
    retriever: Artefact,
    ranker: Artefact | None,
    dataset: Dataset,
    *,
    p99_s: float,
    size_bytes: float,
    trials: int = 20,
    out: str | os.PathLike[str] | Place,
    http_overhead_s: float = 0.0,
    workers: int = 1,
    metric: str = "ndcg@10",
    users: int = 2000,
    effort: Effort | None = None,
    tolerance: float = 0.01,
    seed: int = 0,
    address: str | None = None,
    objective: Objective | None = None,
) -> Artefact:
    """Search plans for the best `metric` with p99 <= p99_s and size <= size_bytes; leave a search.

    Quality is measured on at most `users` validation cases, never on the test split; p99 is one user at
    a time on a pinned core plus `http_overhead_s`, the measured share of the way to it; size is the
    bytes of tables, graphs and index. The first trial is always the uncompressed plan.

    Of the trials that fit, those whose quality cannot be told from the best one's - the 95 % interval
    of the paired difference holds zero, and the difference is at most `tolerance` of it - compete by
    p99 x bytes; the winner is chosen. Raises ConfigError for a budget that can fit nothing, BudgetError
    (after writing the search) when no trial fits, RecrayError when every trial failed.

    workers: trials at once on Ray Tune; 0 runs them here. `objective` replaces building and measuring.
    """
    budget = Budget(p99_s, size_bytes)
    if not 0 <= http_overhead_s < p99_s:
        raise ConfigError(
            f"{milliseconds(p99_s)} of p99 leave nothing beside the {milliseconds(http_overhead_s)} of HTTP",
            fix="give a larger --p99",
        )
    parents = {"dataset": dataset.artefact, "checkpoint": retriever}
    if ranker is not None:
        parents["ranker"] = ranker
    tried = packing.PlanTrial(
        retriever=retriever.place.uri,
        ranker=None if ranker is None else ranker.place.uri,
        dataset=dataset.artefact.place.uri,
        metric=metric,
        users=users,
        seed=seed,
        effort=effort or Effort(),
    )
    searcher, usual = _searcher(retriever, ranker, tried, p99_s - http_overhead_s, size_bytes)
    hashes = {role: parent.hash for role, parent in parents.items()}
    cache = open_cache(out, {"inputs": hashes, "given": tried.settings(), **_here()})
    reference = cache.hash(packing.canonical(usual))
    judge = Judge(budget, metric, http_overhead_s, tolerance, reference)
    sweep = Sweep(searcher, cache, trials, describe=judge.line, usual=usual)
    with tempfile.TemporaryDirectory(prefix="recray-pieces-", ignore_cleanup_errors=True) as pieces:
        asked = objective or replace(tried, pieces=pieces)
        found = run(sweep, asked, workers=workers, address=address)
    front, chosen = judge.verdict(found, usual, searcher.rejected)
    recipe = {
        "search": "compress",
        "budget": {"p99": p99_s, "size": size_bytes, "http": http_overhead_s},
        "given": {**tried.settings(), "trials": trials, "tolerance": tolerance},
    }
    made = write_search(out, cache, found, front=front, chosen=chosen, parents=parents, recipe=recipe)
    if chosen["trial"] is None:
        raise BudgetError(
            chosen["why"], fix=f"give a larger budget or more --trials; {made.place} keeps what was tried"
        )
    say(f"chosen: {chosen['why']}")
    return made


def _searcher(
    retriever: Artefact, ranker: Artefact | None, tried: packing.PlanTrial, p99: float, size: float
) -> tuple[ConstrainedSearcher, Point]:
    """The searcher over these models' plans, and the uncompressed point that it tries first."""
    models = load_model(retriever), None if ranker is None else load_model(ranker)
    space = _space(*models)
    first = packing.first_points(space)
    made = ConstrainedSearcher(
        space,
        {tried.metric: "max"},
        limits={"p99": p99, "bytes": size},
        seed=tried.seed,
        first=first,
        canonical=packing.canonical,
        tidy=lambda point: packing.tidy(point, first[0]),
        bound=lambda point: {"bytes": packing.table_bytes(point, *models)},
    )
    return made, first[0]


def _space(retriever: Model, ranker: Model | None) -> Space:
    if not isinstance(retriever, Retriever):
        raise ConfigError(f"{retriever.name} is not a retriever", fix="give it as --ranker")
    if ranker is not None and not isinstance(ranker, Ranker):
        raise ConfigError(f"{ranker.name} is not a ranker", fix="give it as the checkpoint")
    space = packing.plan_space(retriever, ranker)
    if space is None:
        raise ConfigError(f"there is nothing to compress in {retriever.name}", fix="bundle it as it is")
    return space


def _here() -> dict[str, Any]:
    """What of this machine and its software decides a measurement."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if "model name" in line), model)
    return {"versions": versions(), "machine": [platform.machine(), model, os.cpu_count()]}

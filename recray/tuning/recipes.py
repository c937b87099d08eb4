"""`recray tune`: search a recipe's settings by training with them and asking the validation split."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from recray.errors import ConfigError, RecrayError
from recray.manifest import Artefact, open_artefact, versions
from recray.progress import say
from recray.storage import Place, place
from recray.tuning.results import copied, discard, open_cache, waiting, write_search
from recray.tuning.searcher import ConstrainedSearcher, Direction
from recray.tuning.space import Point, Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, Trial, TrialCache, words

Fit = Callable[[Point, Place], Mapping[str, float]]

LOWER_IS_BETTER = ("loss", "rmse", "mse", "mae")


def search_recipe(
    fit: Fit,
    space: Space | Iterable[str],
    *,
    dataset: Artefact,
    given: Mapping[str, Any],
    metric: str = "ndcg@10",
    trials: int = 10,
    out: str | os.PathLike[str] | Place,
    seed: int = 0,
    workers: int = 0,
    address: str | None = None,
) -> Artefact:
    """Try settings of a recipe and leave a search whose `best/` is the best trial's checkpoint.

    fit(point, place): trains with the point's settings over the recipe, leaves a checkpoint artefact at
    `place` and returns its validation metrics. given: the recipe that the points change, as JSON; with
    the dataset's hash it names the trials. metric: highest is best, but lowest of losses and errors.
    workers: trials at once on Ray Tune (`out` must then be storage they all see); 0 runs them here.

    Only checkpoints that are the best so far are kept. Raises ConfigError for a metric that `fit` does
    not return, and RecrayError when every trial failed.
    """
    space = space if isinstance(space, Space) else Space.parse(space)
    goal: Direction = "min" if metric.split("@")[0] in LOWER_IS_BETTER else "max"
    target = place(out)
    context = {"dataset": dataset.hash, "given": dict(given), "versions": versions()}
    cache = open_cache(target, context)
    keeper = _Keeper(target, cache, metric, goal)
    searcher = ConstrainedSearcher(space, {metric: goal}, seed=seed)
    sweep = Sweep(searcher, cache, trials, describe=keeper.line)
    found = run(sweep, _Fitting(fit, keeper.folder, metric, cache), workers=workers, address=address)
    best = keeper.best(found)
    source = keeper.checkpoint(best)
    if source is None:  # what it left was lost, its point is known
        source = keeper.at(best)
        fit(dict(best.point), source)
    why = f"{words(best.point)}: the best {metric} ({best.metrics[metric]:.4f}) of {len(found)} trials"
    front = {"search": "tune", "metric": metric, "goal": goal, "chosen": best.hash}
    rows = [
        {
            "trial": t.hash,
            "number": t.number,
            "words": words(t.point),
            "point": dict(t.point),
            "metrics": dict(t.metrics),
            "error": t.error,
            "seconds": t.seconds,
        }
        for t in found
    ]
    made = write_search(
        target,
        cache,
        found,
        front={**front, "trials": rows},
        chosen={
            "trial": best.hash,
            "point": dict(best.point),
            "metrics": dict(best.metrics),
            "why": why,
            "bounded_by": [],
        },
        parents={"dataset": dataset},
        recipe={"search": "tune", "given": dict(given), "metric": metric, "trials": trials, "seed": seed},
        best=lambda folder: copied(source, folder),
    )
    say(f"best: {why}")
    return made


class _Fitting:
    """The objective: train into the trial's own folder."""

    def __init__(self, fit: Fit, folder: Place, metric: str, cache: TrialCache) -> None:
        self.fit, self.folder, self.metric, self.cache = fit, folder, metric, cache

    def __call__(self, point: Point) -> Outcome:
        metrics = dict(self.fit(point, self.folder / self.cache.hash(point)))
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"training measures no {self.metric!r}", fix=f"choose of {known}")
        return Outcome(metrics)


class _Keeper:
    """Keeps the checkpoint of the best trial so far, and lets the others go."""

    def __init__(self, out: Place, cache: TrialCache, metric: str, goal: Direction) -> None:
        self.out, self.cache, self.metric = out, cache, metric
        self.sign = 1 if goal == "max" else -1
        self.folder = waiting(out) / "checkpoints"
        kept = cache.load()
        self.top = self.best(kept) if kept else None

    def at(self, trial: Trial) -> Place:
        return self.folder / trial.hash

    def best(self, trials: Iterable[Trial]) -> Trial:
        """The best of those that did not fail; of equal ones the first."""
        good = [trial for trial in trials if trial.error is None]
        return max(good, key=lambda trial: (self.sign * trial.metrics[self.metric], -trial.number))

    def checkpoint(self, trial: Trial) -> Place | None:
        """Where the trial's checkpoint lies: beside the search, or in the one finished before."""
        if self.at(trial).exists():
            return self.at(trial)
        return self.out / "best" if _chosen_of(self.out) == trial.hash else None

    def line(self, trial: Trial) -> str:
        """Of the progress table; called once a trial that ended well."""
        mark = ""
        if self.top is None or self.best([self.top, trial]) is trial:
            if self.top is not None:
                discard(self.at(self.top))
            self.top, mark = trial, "  best so far"
        else:
            discard(self.at(trial))
        return f"{self.metric} {trial.metrics[self.metric]:.4f}{mark}"


def _chosen_of(out: Place) -> str | None:
    try:
        chosen = open_artefact(out, "search", verify=False).manifest.report["chosen"]["trial"]
    except (RecrayError, KeyError, TypeError):
        return None
    return str(chosen)

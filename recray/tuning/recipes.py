"""`recray tune`: search a recipe's settings by training with them and asking the validation split."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from recray.errors import ConfigError, RecrayError
from recray.manifest import Artefact, open_artefact, versions
from recray.progress import say
from recray.storage import Place, place
from recray.tuning.halving import Halving, Rungs
from recray.tuning.picture import page, table
from recray.tuning.results import copied, discard, open_cache, waiting, write_search
from recray.tuning.searcher import ConstrainedSearcher, Direction
from recray.tuning.space import Point, Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, Trial, TrialCache, words

Fit = Callable[[Point, Place, Callable[[int, float], None]], Mapping[str, float]]

LOWER_IS_BETTER = ("loss", "logloss", "rmse", "mse", "mae")
PICTURE = "trials.html"
MODEL = "model"  # a trial's checkpoint in the trial's folder; the states of its training lie beside it


def search_recipe(
    fit: Fit,
    space: Space | Iterable[str],
    *,
    dataset: Artefact,
    given: Mapping[str, Any],
    metric: str = "ndcg@10",
    trials: int = 10,
    halving: Halving | None = None,
    out: str | os.PathLike[str] | Place,
    seed: int = 0,
    workers: int = 0,
    address: str | None = None,
) -> Artefact:
    """Try settings of a recipe and leave a search whose `best/` is the best trial's checkpoint.

    fit(point, place, told): trains with the point's settings over the recipe, leaves a checkpoint artefact
    at `place` and returns its validation metrics; after each epoch it calls told(epochs done, the metric),
    and what that raises ends it for now. Called again with the same, it goes on from there, telling of the
    epochs done again, or starts anew.

    given: the recipe that the points change, as JSON; with the dataset's hash, `metric` and `halving` it
    names the trials. metric: highest is best, but lowest of losses and errors. halving: which trials get
    more epochs; None runs every trial out. workers: trials at once on Ray Tune (`out` must then be storage
    they all see); 0 runs them here.

    Only checkpoints that are the best so far are kept. Raises ConfigError for a metric that `fit` does
    not return, and RecrayError when every trial failed.
    """
    space = space if isinstance(space, Space) else Space.parse(space)
    goal: Direction = "min" if metric.split("@")[0] in LOWER_IS_BETTER else "max"
    target = place(out)
    rule = None if halving is None else dataclasses.asdict(halving)
    context = {"dataset": dataset.hash, "given": dict(given), "metric": metric, "halving": rule,
               "versions": versions()}  # fmt: skip
    cache = open_cache(target, context, holds=space.holds)
    started = TrialCache(cache.place / "started", context, space.holds)
    keeper = _Keeper(target, cache, metric, goal)
    sweep = Sweep(
        ConstrainedSearcher(space, {metric: goal}, seed=seed),
        cache,
        trials,
        describe=keeper.line,
        rungs=None if halving is None else Rungs(halving, trials, goal),
        started=started,
    )
    fitting = _Fitting(fit, keeper.folder, metric, goal, cache, given)
    found = run(sweep, fitting, workers=workers, address=address)
    best = keeper.best(found)
    source = keeper.checkpoint(best)
    if source is None:  # what it left was lost, its point is known
        source = keeper.at(best) / MODEL
        fit(dict(best.point), source, lambda epoch, value: None)
    front = _front(space, found, best, metric, goal, rule, given)
    made = write_search(
        target,
        cache,
        found,
        front=front,
        chosen=_chosen(best, metric, len(found)),
        parents={"dataset": dataset},
        recipe={
            "search": "tune", "given": dict(given), "metric": metric,
            "trials": trials, "seed": seed, "halving": rule,
        },
        best=lambda folder: copied(source, folder),
        pages={PICTURE: page(front)},
        report={"epochs": front["epochs"], "picture": PICTURE},
    )  # fmt: skip
    say(table(front))
    say(f"best: {_why(best, metric, len(found))}; a picture of all: {made.place / PICTURE}")
    return made


class _RungError(Exception):
    """A trial has come to the rung where it is to wait."""


class _Fitting:
    """The objective: train in the trial's own folder, at most to an epoch, and note each epoch's metric."""

    def __init__(
        self,
        fit: Fit,
        folder: Place,
        metric: str,
        goal: Direction,
        cache: TrialCache,
        given: Mapping[str, Any],
    ) -> None:
        self.fit, self.folder, self.metric, self.cache, self.given = fit, folder, metric, cache, given
        self.best = max if goal == "max" else min

    def __call__(self, point: Point, until: int | None = None) -> Outcome:
        values: dict[int, float] = {}
        every = _all_epochs(point, self.given)
        standing = "ended"

        def told(epoch: int, value: float) -> None:
            values[epoch] = value
            if until is not None and until <= epoch and (every is None or epoch < every):
                raise _RungError

        try:
            metrics = dict(self.fit(point, self.folder / self.cache.hash(point) / MODEL, told))
        except _RungError:
            metrics, standing = {self.metric: self.best(values.values())}, "waits"
        if self.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"training measures no {self.metric!r}", fix=f"choose of {known}")
        if not values:
            return Outcome(metrics)
        curve = [values[epoch] for epoch in sorted(values)]
        return Outcome(metrics, {"epochs": len(curve), "values": curve, "standing": standing})


class _Keeper:
    """Keeps the checkpoint of the best trial so far, and lets the others go."""

    def __init__(self, out: Place, cache: TrialCache, metric: str, goal: Direction) -> None:
        self.out, self.cache, self.metric = out, cache, metric
        self.sign = 1 if goal == "max" else -1
        self.folder = waiting(out) / "checkpoints"
        kept = cache.load()
        self.top = self.best(kept) if kept else None

    def at(self, trial: Trial) -> Place:
        """The trial's own folder."""
        return self.folder / trial.hash

    def best(self, trials: Iterable[Trial]) -> Trial:
        """The best of those that ran out, or else of those that did not fail; of equal ones the first."""
        good = [trial for trial in trials if trial.error is None]
        good = [trial for trial in good if not _stopped(trial)] or good
        return max(good, key=lambda trial: (self.sign * trial.metrics[self.metric], -trial.number))

    def checkpoint(self, trial: Trial) -> Place | None:
        """Where the trial's checkpoint lies: beside the search, or in the one finished before."""
        if (self.at(trial) / MODEL).exists():
            return self.at(trial) / MODEL
        return self.out / "best" if _chosen_of(self.out) == trial.hash else None

    def line(self, trial: Trial) -> str:
        """Of the progress table; called once a trial that ended well."""
        mark = ""
        if _stopped(trial):
            mark = f"  stopped after epoch {trial.detail['epochs']}"
            discard(self.at(trial))
        elif self.top is None or self.best([self.top, trial]) is trial:
            if self.top is not None:
                discard(self.at(self.top))
            self.top, mark = trial, "  best so far"
        else:
            discard(self.at(trial))
        return f"{self.metric} {trial.metrics[self.metric]:.4f}{mark}"


def _front(
    space: Space,
    found: Sequence[Trial],
    best: Trial,
    metric: str,
    goal: Direction,
    rule: Mapping[str, int] | None,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """front.json: every trial with its epochs, the axes it lies on, and epochs spent of all run out."""
    rows = []
    for trial in found:
        epochs = trial.detail.get("epochs")
        rows.append(
            {
                "trial": trial.hash,
                "number": trial.number,
                "words": words(trial.point),
                "point": dict(trial.point),
                "metrics": dict(trial.metrics),
                "epochs": epochs,
                "of": epochs and (_all_epochs(trial.point, given) or epochs),
                "stopped": _stopped(trial),
                "error": trial.error,
                "seconds": trial.seconds,
            }
        )
    return {
        "search": "tune",
        "metric": metric,
        "goal": goal,
        "halving": rule,
        "chosen": best.hash,
        "epochs": {
            name: sum(row[key] or 0 for row in rows) for name, key in (("spent", "epochs"), ("all", "of"))
        },
        "axes": [dataclasses.asdict(dimension) for dimension in space.dimensions.values()],
        "trials": rows,
    }


def _all_epochs(point: Mapping[str, Any], given: Mapping[str, Any]) -> int | None:
    """How many epochs a point's trial has if nothing stops it; None for a recipe that does not say."""
    found: int | None = point.get("train.epochs", given.get("train", {}).get("epochs"))
    return found


def _stopped(trial: Trial) -> bool:
    return trial.detail.get("standing") == "stopped"


def _why(best: Trial, metric: str, count: int) -> str:
    return f"{words(best.point)}: the best {metric} ({best.metrics[metric]:.4f}) of {count} trials"


def _chosen(best: Trial, metric: str, count: int) -> dict[str, Any]:
    return {
        "trial": best.hash,
        "point": dict(best.point),
        "metrics": dict(best.metrics),
        "why": _why(best, metric, count),
        "bounded_by": [],
    }


def _chosen_of(out: Place) -> str | None:
    try:
        chosen = open_artefact(out, "search", verify=False).manifest.report["chosen"]["trial"]
    except (RecrayError, KeyError, TypeError):
        return None
    return str(chosen)

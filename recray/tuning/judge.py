"""Judge the trials of a compression search: their lines, their front, the chosen one and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recray.metrics.interval import paired
from recray.money import Bill, Price, bill
from recray.progress import warn
from recray.tuning.forecast import Forecast
from recray.tuning.pareto import (
    Budget,
    Choice,
    Value,
    choose,
    dominated,
    hypervolume,
    megabytes,
    milliseconds,
    money,
    shortage,
)
from recray.tuning.space import Point
from recray.tuning.trial import Trial, words

BUSY = 0.95  # a measured process that had less of its core than this was disturbed


class Judge:
    """What trials are worth under one budget."""

    def __init__(
        self,
        budget: Budget,
        metric: str,
        overhead: float,
        tolerance: float,
        reference: str,
        *,
        mean: float | None = None,
        price: Price | None = None,
        rps: float = 0.0,
        replicas: int = 1,
        forecast: Forecast | None = None,
    ) -> None:
        """overhead, mean: HTTP's share of p99, and of an answer as a rule (None: the same).

        rps: the load that p99 is told for, 0 = one client, shared by `replicas`. forecast: whose error is
        told.
        """
        self.budget, self.metric, self.overhead = budget, metric, overhead
        self.mean = overhead if mean is None else mean
        self.replicas = replicas
        self.tolerance, self.reference = tolerance, reference
        self.price, self.rps, self.forecast = price or Price(), rps, forecast
        self.plain: float | None = None  # the reference's quality, once known

    def bill(self, metrics: Mapping[str, float]) -> Bill:
        """What 1,000 recommendations of a trial cost: its core, HTTP's share of it, and its bytes."""
        return self.cost(metrics.get("mean", metrics["p50"]), metrics["bytes"])

    def cost(self, seconds: float, size: float) -> Bill:
        """The same of seconds in process and bytes."""
        return bill(seconds + self.mean, size, self.price, self.rps, self.replicas)

    def derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics, and what limits name beside them."""
        return {**metrics, "cost": self.bill(metrics).total}

    def value(self, trial: Trial) -> Value:
        metrics = trial.metrics
        cost = self.bill(metrics).total
        return Value(metrics[self.metric], metrics["p99"] + self.overhead, metrics["bytes"], cost)

    def hear(self, trial: Trial) -> None:
        """Of every trial once, before its line; also of those that were finished before."""
        if trial.hash == self.reference and trial.error is None:
            self.plain = self.value(trial).quality

    def line(self, trial: Trial) -> str:
        """Of the progress table: quality, its loss, latency with interval, bytes, what is exceeded."""
        value, timed = self.value(trial), trial.detail.get("latency", {})
        loss = f" ({value.quality / self.plain - 1:+.1%})" if self.plain else ""
        over = self.budget.over(value)
        said = "fits" if not over else "over " + " and ".join(over)
        notes = "" if timed.get("narrow", True) else "  wide interval"
        notes += f"  beaten after {trial.detail['raced']} users" if "raced" in trial.detail else ""
        notes += "" if timed.get("cpu", 1.0) >= BUSY else "  busy machine"
        cost = "" if math.isinf(self.budget.cost) else f"  {money(value.cost)} per 1,000"
        ends = [milliseconds(timed[end] + self.overhead) for end in ("low", "high") if end in timed]
        interval = f" [{', '.join(ends)}]" if ends else ""
        return (
            f"{self.metric} {value.quality:.4f}{loss}  "
            f"p50 {milliseconds(trial.metrics['p50'] + self.mean)}  "
            f"p99 {milliseconds(value.p99)}{interval}  {megabytes(value.bytes)}{cost}  {said}{notes}"
        )

    def verdict(
        self, found: Sequence[Trial], usual: Point, rejected: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(front.json, chosen.json) of all trials."""
        good = [trial for trial in found if trial.error is None]
        values = [self.value(trial) for trial in good]
        self.plain = next((v.quality for t, v in zip(good, values) if t.hash == self.reference), None)
        choice = choose(values, self.budget, lambda i, best: self._tied(good[i], good[best]))
        costs = np.array([value.costs for value in values])
        beaten = dict(zip((trial.hash for trial in good), dominated(costs).tolist()))
        corner = (0.0, self.budget.p99, self.budget.size)
        reference = next((trial for trial in good if trial.hash == self.reference), None)
        whole = None if reference is None else self.bill(reference.metrics)
        front = {
            "search": "compress",
            "metric": self.metric,
            "budget": self.terms(),
            "price": {**vars(self.price), "per": "hour"},
            "predictor": self._predictor(),
            "reference": self.reference,
            "chosen": good[choice.index].hash if choice.fits else None,
            "rejected_unmeasured": rejected,
            "hypervolume": hypervolume(costs, corner) / (self.budget.p99 * self.budget.size),
            "trials": [self._row(trial, beaten.get(trial.hash), usual, whole) for trial in found],
        }
        chosen = self._chosen(good, values, choice, usual)
        told = {name: chosen.get(name) for name in ("why", "bounded_by", "nearest")}
        return {**front, **told}, chosen

    def terms(self) -> dict[str, float | None]:
        """The budget as JSON: its limits, the load they are for, and HTTP's share."""
        cost = None if math.isinf(self.budget.cost) else self.budget.cost
        limits = {"p99": self.budget.p99, "size": self.budget.size, "cost": cost}
        return {**limits, "rps": self.rps, "http": self.overhead, "http_mean": self.mean}

    def _predictor(self) -> dict[str, Any] | None:
        if self.forecast is None:
            return None
        error = self.forecast.model.error
        told = {name: value if math.isfinite(value) else None for name, value in vars(error).items()}
        return {**told, "words": error.words()}

    def _row(self, trial: Trial, beaten: bool | None, usual: Point, whole: Bill | None) -> dict[str, Any]:
        row: dict[str, Any] = {
            "trial": trial.hash,
            "number": trial.number,
            "words": words(trial.point, usual),
            "point": dict(trial.point),
            "error": trial.error,
            "seconds": trial.seconds,
        }
        if trial.error is not None:
            return row
        value = self.value(trial)
        return row | {
            "metrics": {**trial.metrics, "p50": trial.metrics["p50"] + self.overhead, "p99": value.p99},
            "latency": trial.detail.get("latency"),
            "relative_loss": None if not self.plain else 1 - value.quality / self.plain,
            "cost": self._costs(trial, whole),
            "dominated": beaten,
            "raced": trial.detail.get("raced"),
            "fits": self.budget.fits(value),
            "over": self.budget.over(value),
        }

    def _costs(self, trial: Trial, whole: Bill | None) -> dict[str, Any]:
        """C = requests x compute + storage of 1,000, and Delta C: what packing changed of it."""
        mine = self.bill(trial.metrics)
        told: dict[str, Any] = {
            **mine.as_dict(),
            "delta": None if whole is None else (mine - whole).as_dict(),
        }
        return (
            told if self.forecast is None else {**told, "operations": self.forecast.operations(trial.point)}
        )

    def _chosen(
        self, good: Sequence[Trial], values: Sequence[Value], choice: Choice, usual: Point
    ) -> dict[str, Any]:
        trial, value = good[choice.index], values[choice.index]
        what = words(trial.point, usual)
        if not choice.fits:
            why = (
                f"nothing of {len(good)} trials fits {self.budget.words()}: "
                f"the nearest ({what}) is short: {shortage(value, self.budget)}"
            )
            return {
                "trial": None,
                "nearest": trial.hash,
                "why": why,
                "bounded_by": [*self.budget.over(value)],
            }
        better = [v for v in values if v.quality > values[choice.best].quality]
        bounds = sorted({term for v in better for term in self.budget.over(v)})
        lost = 1 - value.quality / self.plain if self.plain else 0.0
        loss = f", {abs(lost):.2%} {'below' if lost >= 0 else 'above'} uncompressed" if self.plain else ""
        tie = f"ties with the best of {self.metric} and has the least p99 x bytes of {len(choice.tied)}"
        best = f"the best {self.metric} that fits" if len(choice.tied) == 1 else tie
        limit = f"; more quality would break {' and '.join(bounds)}" if bounds else ""
        why = (
            f"{what}: {best} ({value.quality:.4f}{loss}) at p99 {milliseconds(value.p99)} "
            f"and {megabytes(value.bytes)}{limit}; {_tightest(self.budget.uses(value))}"
        )
        high = trial.detail.get("latency", {}).get("high")
        if high is not None and high + self.overhead > self.budget.p99:
            warn("the chosen trial's p99 is within the budget, the upper end of its interval is not")
        return {
            "trial": trial.hash,
            "plan": trial.detail.get("plan"),
            "point": dict(trial.point),
            "metrics": {**trial.metrics, "p99": value.p99, "cost": value.cost},
            "uses": self.budget.uses(value),
            "why": why,
            "bounded_by": bounds,
        }

    def _tied(self, one: Trial, best: Trial) -> bool:
        """Whether no measurement tells their quality apart, and the difference is within tolerance."""
        lower = best.metrics[self.metric] - one.metrics[self.metric]
        if lower > self.tolerance * best.metrics[self.metric]:
            return False
        mine, theirs = one.detail.get("values"), best.detail.get("values")
        if mine is None or theirs is None or len(mine) < 2:
            return lower == 0
        return paired(mine, theirs).high >= 0


def _tightest(uses: Mapping[str, float]) -> str:
    """'the tightest limit is p99, 93% of it used'"""
    name = max(uses, key=lambda term: uses[term])
    return f"the tightest limit is {name}, {uses[name]:.0%} of it used"

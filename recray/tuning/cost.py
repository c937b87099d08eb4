"""A cost model of plans: latency from the parts of a request, quality from what each choice costs.

    p50(plan) ~ c * sum over stages of t_stage(plan's choices for this stage)

The stages of a request (encode, search, rank, and the rest) are timed wherever a plan is measured, so a part
that was measured once counts for every plan that has it. What a stage takes is log-linear in its choices: a
codec and a graph each multiply it, and so does every doubling of candidates or of an index's effort. The sum
is then corrected by whole measurements, whose p99 holds what stages do not tell: noise, a load's queue.

The model is held against what it was not fitted to (each whole measurement left out in turn), and a plan with
something that was never measured has no prediction, but the reason. Pure: numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recray.tuning.ridge import Features, Ridge

LEAST = 4  # whole measurements before anything is predicted
SURE = 90  # percentile of its own errors by which a prediction is trusted
FLOOR = 0.1  # error that is always reckoned with: few plans left out may all be lucky
FOLDS = 20  # at the most: with more whole measurements several are left out at a time
Stages = Mapping[str, Mapping[str, float]]  # stage -> "p50" and "p99" in seconds
QUANTILES = ("p50", "p99")


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was measured of one plan.

    key: names the plan. features: stage -> its choices, see `packing.features`. stages: seconds of each.
    p50, p99: of the whole request, where it was measured alone in a process; None for a part alone.
    choices: all that may change its quality. quality: as a share of the uncompressed plan's, if known.
    """

    key: str
    features: Mapping[str, Features]
    choices: Features = field(default_factory=dict)
    stages: Stages
    p50: float | None = None
    p99: float | None = None
    quality: float | None = None

    def whole(self, name: str) -> float | None:
        """p50 or p99 by its name."""
        return self.p50 if name == "p50" else self.p99


@dataclass(frozen=True)
class Predicted:
    """Seconds; None, and in `out` why, for a plan beyond what was measured."""

    p50: float | None
    p99: float | None
    out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Error:
    """How far off the model is on plans left out: mean absolute percentage errors as shares, and the share
    within which nine of ten predictions of p99 lie. `n` plans were predicted, `out` were out of range."""

    p50: float
    p99: float
    reach: float
    n: int
    out: int

    def words(self) -> str:
        """'p50 within 6 %, p99 within 11 % (mean of 14 plans left out in turn; 2 out of range)'"""
        if not self.n:
            return "out of range: too few plans were measured to predict any other"
        beside = f"; {self.out} out of range" if self.out else ""
        return (
            f"p50 within {self.p50:.0%}, p99 within {self.p99:.0%} "
            f"(mean of {self.n} plans left out in turn{beside})"
        )


@dataclass(frozen=True)
class LatencyModel:
    """A fitted model; `fit` makes it, `predict` asks it."""

    stages: Mapping[str, Mapping[str, Ridge]] = field(
        default_factory=dict
    )  # stage -> quantile -> log seconds
    scale: Mapping[str, float] = field(default_factory=dict)  # quantile -> log of whole / sum of stages
    measured: int = 0

    @staticmethod
    def fit(seen: Sequence[Seen]) -> LatencyModel:
        """Learn from parts and wholes; with fewer than LEAST wholes every prediction is out of range."""
        stages: dict[str, dict[str, Ridge]] = {}
        for stage in sorted({name for one in seen for name in one.stages}):
            told = [one for one in seen if stage in one.stages]
            rows = [one.features.get(stage, {}) for one in told]
            stages[stage] = {
                name: Ridge.fit(rows, [math.log(max(one.stages[stage][name], 1e-7)) for one in told])
                for name in QUANTILES
            }
        made = LatencyModel(stages)
        wholes = [one for one in seen if one.p50 is not None and one.stages]
        scale = {}
        for name in QUANTILES:
            ratios = [
                math.log(whole / made.total(one.features, name))
                for one in wholes
                if (whole := one.whole(name)) is not None
            ]
            scale[name] = float(np.median(ratios)) if ratios else 0.0
        return LatencyModel(stages, scale, len(wholes))

    def total(self, features: Mapping[str, Features], name: str) -> float:
        """The stages' sum, seconds, not yet corrected."""
        return sum(
            math.exp(models[name].predict(features[stage]))
            for stage, models in self.stages.items()
            if stage in features
        )

    def predict(self, features: Mapping[str, Features]) -> Predicted:
        """Of a plan by its choices, stage by stage."""
        out = [] if self.measured >= LEAST else [f"only {self.measured} plans were measured"]
        for stage, chosen in features.items():
            out += self.stages[stage]["p50"].beyond(chosen) if stage in self.stages else [f"{stage} is new"]
        if out:
            return Predicted(None, None, tuple(out))
        p50, p99 = (self.total(features, name) * math.exp(self.scale[name]) for name in QUANTILES)
        return Predicted(p50, max(p50, p99))


def held_out(seen: Sequence[Seen]) -> Error:
    """Leave each whole measurement out in turn and predict it from the parts and the others."""
    off: list[tuple[float, float]] = []
    out = 0
    wholes = [one for one in seen if one.p50 is not None and one.p99 is not None and one.stages]
    for turn in range(min(FOLDS, len(wholes))):
        apart = wholes[turn::FOLDS]
        keys = {one.key for one in apart}
        model = LatencyModel.fit([one for one in seen if one.p50 is None or one.key not in keys])
        for one in apart:
            found = model.predict(one.features)
            if found.p50 is None or found.p99 is None or one.p50 is None or one.p99 is None:
                out += 1
            else:
                off.append((abs(found.p50 / one.p50 - 1), abs(found.p99 / one.p99 - 1)))
    if not off:
        return Error(math.nan, math.nan, math.inf, 0, out)
    p50, p99 = np.array(off).T
    reach = max(float(np.percentile(p99, SURE)), FLOOR)
    return Error(float(p50.mean()), float(p99.mean()), reach, len(off), out)


class CostModel:
    """What has been measured so far, and what it says of plans that were not."""

    def __init__(self) -> None:
        self._seen: list[Seen] = []
        self._latency: LatencyModel | None = None
        self._quality: Ridge | None = None
        self._error: Error | None = None

    def learn(self, seen: Seen) -> None:
        """One more measurement; models are fitted again when they are next asked."""
        self._seen.append(seen)
        self._latency = self._quality = self._error = None

    @property
    def error(self) -> Error:
        """On plans left out."""
        if self._error is None:
            self._error = held_out(self._seen)
        return self._error

    def latency(self, features: Mapping[str, Features]) -> Predicted:
        """p50 and p99 of a plan."""
        if self._latency is None:
            self._latency = LatencyModel.fit(self._seen)
        return self._latency.predict(features)

    def surely_above(self, features: Mapping[str, Features]) -> float:
        """A p99 that a plan will hardly go below: what is predicted less the model's error; 0 if unknown."""
        found = self.latency(features).p99
        return 0.0 if found is None or not self.error.n else found / (1 + self.error.reach)

    def quality(self, choices: Features) -> float | None:
        """As a share of the uncompressed plan's: every choice takes its own share; None if out of range."""
        if self._quality is None:
            told = [one for one in self._seen if one.quality is not None]
            if len(told) < LEAST:
                return None
            self._quality = Ridge.fit([one.choices for one in told], [one.quality or 0.0 for one in told])
        return None if self._quality.beyond(choices) else self._quality.predict(choices)

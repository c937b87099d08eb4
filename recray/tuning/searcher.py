"""What to try next: a constrained search over Optuna's samplers, asked and told; no Ray here.

The first trials are modelled by a Gaussian process whose expected improvement is weighed by the
probability that every limit holds (Gardner et al. 2014): on a planted problem of six dimensions it
needs half the trials of TPE, for about a second of thought a trial. Past GP_TRIALS, where that
second grows with the cube of the trials, TPE goes on (Bergstra et al. 2011; its constraints after
Watanabe & Hutter 2023: a point over a limit ranks behind every point that fits, by how far over).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from recray.errors import ConfigError
from recray.manifest import digest
from recray.tuning.space import Dimension, Point, Scalar, Space

Direction = Literal["max", "min"]

TRIES = {"gp": 2, "tpe": 12}  # suggestions heard before a neighbour of the last one is taken instead
GP_TRIALS = 64
SEARCHED = 4096  # points looked at to find that neighbour


class ConstrainedSearcher:
    """Suggests points that are new and may fit; learns from what they measured.

    goals: metric -> 'max' or 'min'. limits: metric -> the most that is allowed.
    first: points to try before anything is suggested, in order; they may lie outside the space.
    canonical: maps a point to what decides its outcome, so that two names of one thing are tried once.
    bound: point -> for some limited metrics a value it will surely not go below, known without trying.
    propose: points that something else than the sampler expects much of, best first; every second turn is
        theirs. derive: a trial's metrics -> those with what follows from them, which limits may name.
    startup: so many points are drawn at random before the sampler models anything.
    """

    def __init__(
        self,
        space: Space,
        goals: Mapping[str, Direction],
        *,
        limits: Mapping[str, float] | None = None,
        seed: int = 0,
        first: Sequence[Point] = (),
        canonical: Callable[[Point], Mapping[str, Any]] | None = None,
        tidy: Callable[[Point], Point] | None = None,
        bound: Callable[[Point], Mapping[str, float]] | None = None,
        propose: Callable[[], Iterable[Point]] | None = None,
        derive: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
        sampler: Literal["gp", "tpe"] = "gp",
        startup: int = 6,
    ) -> None:
        if not 0 <= seed < 1 << 32:
            raise ConfigError(f"seed is {seed}", fix="give a whole number from 0 to below 2**32")
        self.space, self.goals, self.limits = space, dict(goals), dict(limits or {})
        self.rejected = 0  # suggestions left out because their bound is over a limit
        self.canonical = canonical or dict
        self._tidy = tidy or dict  # the same point, with what does not count in it written as usual
        self._bound = bound
        self._propose, self._proposed = propose or (lambda: ()), False
        self._derive = derive or dict
        self._first = list(first)
        self._seen: set[str] = set()
        self._asked: dict[str, Any] = {}  # key -> the sampler's own trial
        self._rng = np.random.default_rng(seed)
        self._sampler: Literal["gp", "tpe"] = sampler
        self._seed, self._startup, self._told = seed, startup, 0
        self._distributions = {name: _distribution(d) for name, d in space.dimensions.items()}
        self._study = _study(self.goals, _sampler(sampler, seed, startup))

    def ask(self) -> Point | None:
        """A point never asked or told before; None when the space is used up."""
        while self._first:
            point = self._first.pop(0)
            if self.key(point) not in self._seen:
                self._seen.add(self.key(point))
                return point
        self._proposed = not self._proposed
        if self._proposed and (found := next(filter(self._open, self._propose()), None)) is not None:
            self._seen.add(self.key(found))
            return self._tidy(found)
        import optuna

        if self._sampler == "gp" and self._told >= GP_TRIALS:
            self._sampler = "tpe"
            self._study.sampler = _sampler("tpe", self._seed, self._startup)
        for _ in range(TRIES[self._sampler]):
            asked = self._suggested()
            point = self._point(asked.params)
            if self._open(point):
                break
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            near = self._neighbour(point)
            if near is None:
                return None
            self._study.enqueue_trial(self._params(near))
            asked, point = self._study.ask(self._distributions), near
        self._asked[self.key(point)] = asked
        self._seen.add(self.key(point))
        return self._tidy(point)

    def tell(self, point: Mapping[str, Scalar], metrics: Mapping[str, float] | None) -> None:
        """What a point measured, asked for or not; None when it failed."""
        import optuna

        key = self.key(dict(point))
        self._seen.add(key)
        asked = self._asked.pop(key, None)
        if metrics is None:
            if asked is not None:
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
            return
        self._told += 1
        metrics = self._derive(metrics)
        values = [float(metrics[name]) for name in self.goals]
        over = {name: float(metrics[name]) / limit - 1 for name, limit in self.limits.items()}
        if asked is not None:
            for name, share in over.items():
                asked.set_constraint(name, share)
            self._study.tell(asked, values)
        elif self.space.holds(point):
            self._study.add_trial(
                optuna.trial.create_trial(
                    params=self._params(point),
                    distributions=self._distributions,
                    values=values,
                    constraints=over,
                )
            )

    def key(self, point: Point) -> str:
        """Equal for points that mean the same."""
        return digest(dict(self.canonical(point)))

    def _suggested(self) -> Any:
        """What the sampler suggests; a random point where its model has no numbers to go by.

        A Gaussian process over points that are all alike, or all hopeless, divides by nothing.
        """
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                return self._study.ask(self._distributions)
            except (ValueError, ArithmeticError, RuntimeError):
                self._study.enqueue_trial(self._params(self.space.sample(self._rng)))
                return self._study.ask(self._distributions)

    def _open(self, point: Point) -> bool:
        if self.key(point) in self._seen:
            return False
        low = {} if self._bound is None else self._bound(point)
        if any(value > self.limits.get(name, np.inf) for name, value in low.items()):
            self._seen.add(self.key(point))
            self.rejected += 1
            return False
        return True

    def _neighbour(self, point: Point) -> Point | None:
        """The nearest open point, over the whole space where it is small, else among many samples."""
        size = self.space.size
        if size is not None and size <= SEARCHED:
            others = list(self.space.points())
        else:
            others = [self.space.sample(self._rng) for _ in range(SEARCHED // 2)]
            others += [_crossed(self._rng, point, other) for other in others]
        at = self.space.encode(point)
        distances = np.array([np.abs(self.space.encode(other) - at).sum() for other in others])
        order = np.argsort(distances, kind="stable")
        return next((others[i] for i in order if self._open(others[i])), None)

    def _point(self, params: Mapping[str, Any]) -> Point:
        made: Point = {}
        for name, dimension in self.space.dimensions.items():
            value = params[name]
            made[name] = dimension.choices[value] if dimension.kind == "choice" else dimension.tidy(value)
        return made

    def _params(self, point: Mapping[str, Scalar]) -> dict[str, Any]:
        return {
            name: d.choices.index(point[name]) if d.kind == "choice" else point[name]
            for name, d in self.space.dimensions.items()
        }


def _crossed(rng: np.random.Generator, point: Point, other: Point) -> Point:
    """The point with one value taken from the other."""
    name = list(point)[int(rng.integers(len(point)))]
    return {**point, name: other[name]}


def _sampler(name: Literal["gp", "tpe"], seed: int, startup: int) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True)


def _study(goals: Mapping[str, Direction], sampler: Any) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = ["maximize" if goal == "max" else "minimize" for goal in goals.values()]
    return optuna.create_study(directions=directions, sampler=sampler)


def _distribution(dimension: Dimension) -> Any:
    import optuna.distributions as kinds

    if dimension.kind == "choice":  # by position: choices may be of any type
        return kinds.CategoricalDistribution(range(len(dimension.choices)))
    if dimension.kind == "int":
        return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return kinds.FloatDistribution(dimension.low, dimension.high, log=dimension.log)

"""Asynchronous successive halving: which trials are worth more epochs (ASHA, Li et al. 2020, 1810.05934).

Rungs stand after r, r*eta, r*eta^2, ... epochs. A trial trains to its next rung and waits there. Of n
trials that came to a rung n // eta may go on, the best that waits first. Whoever is free takes a trial
from the highest rung where one may go on, or else begins a new one (the paper's algorithm 2): nobody
waits for a rung to be full.

Two things the paper leaves open are settled here. Those that went on are counted, so that trials which
come better and better, as those of a searcher that learns do, cannot all go on: the epochs have a bound
that no order of trials exceeds. And when no trial is left to begin, the best of each rung goes on, so that
the best of all is run out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from recray.config import unknown_name
from recray.errors import ConfigError

SCHEDULERS = ("asha", "none")
GRACE = 6  # the first rung stands after 1/6 of the epochs: the first few say little of the last
Standing = Literal["goes", "waits", "stopped", "ended"]
"""under way; waiting at a rung; there for good; run out or ended by itself"""


@dataclass(frozen=True)
class Halving:
    """Rungs after `grace` * `eta`^k epochs, k = 0, 1, ...; 1/`eta` of those that come to one go on.

    epochs: of a trial that is run out. Raises ConfigError for numbers that halve nothing.
    """

    epochs: int
    grace: int = 1
    eta: int = 3

    def __post_init__(self) -> None:
        if self.grace < 1:
            raise ConfigError(f"grace is {self.grace} epochs", fix="give 1 or more")
        if self.eta < 2:
            raise ConfigError(f"eta is {self.eta}", fix="give 2 (half go on) or more")

    def rung(self, epoch: int) -> int:
        """The last rung at or before `epoch`, itself in epochs; 0 where none has come yet."""
        at = self.grace
        while at * self.eta <= epoch:
            at *= self.eta
        return at if at <= epoch else 0

    def after(self, epoch: int) -> int:
        """The first rung past `epoch`."""
        return self.rung(epoch) * self.eta or self.grace


def scheduled(scheduler: str, grace: int, eta: int, epochs: int) -> Halving | None:
    """By the name of a scheduler; a `grace` of 0 is a sixth of the `epochs`, one at least.

    Raises ConfigError for a scheduler that is not known, and a grace that leaves nothing to stop.
    """
    if scheduler not in SCHEDULERS:
        raise unknown_name("scheduler", scheduler, SCHEDULERS)
    if scheduler == "asha" and 1 < epochs <= grace:
        raise ConfigError(
            f"grace is {grace} of {epochs} epochs: no trial would be stopped",
            fix="give a smaller --grace, or --scheduler none",
        )
    return Halving(epochs, grace or max(1, epochs // GRACE), eta) if scheduler == "asha" else None


@dataclass
class Rungs:
    """Where the trials of a search stand; told of them, says which go on. No clock, no chance, no thread.

    trials: how many the search begins. curves: of each trial the best value so far after each epoch (its
    best epoch is what a trial leaves), the sign such that more is better.
    """

    halving: Halving
    trials: int
    goal: Literal["max", "min"] = "max"
    curves: dict[str, list[float]] = field(default_factory=dict)
    waiting: dict[str, None] = field(default_factory=dict)  # in order of coming
    stopped: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)

    def report(self, trial: str, values: Sequence[float], standing: Standing) -> None:
        """What a trial's epochs gave, all from the first one on, and what has become of it."""
        self.forget(trial)
        sign = 1 if self.goal == "max" else -1
        self.curves[trial] = list(accumulate((sign * value for value in values), max))
        if standing == "waits":
            self.waiting[trial] = None
        elif standing != "goes":
            (self.stopped if standing == "stopped" else self.ended).add(trial)

    def forget(self, trial: str) -> None:
        """It failed: nobody is compared with it any more."""
        self.curves.pop(trial, None)
        self.waiting.pop(trial, None)
        self.stopped.discard(trial)
        self.ended.discard(trial)

    def best(self, values: Sequence[float]) -> float:
        """The best value up to the first rung: numbers of one length, from which a searcher may learn."""
        return (max if self.goal == "max" else min)(values[: self.halving.grace])

    def next(self) -> tuple[str, int] | None:
        """The waiting trial that goes on, and the epoch it goes to; None where none may."""
        for rung in self._rungs():
            if len(self._went(rung)) < len(self._came(rung)) // self.halving.eta:
                chosen = self._best_at(rung)
                del self.waiting[chosen]
                return chosen, rung * self.halving.eta
        return None

    def hopeless(self) -> list[str]:
        """Those that wait in vain: as many as may ever go on from their rung were better there.

        All of those go on first, whoever comes later.
        """
        most = max(1, self.trials // self.halving.eta)
        lost = []
        for trial in self.waiting:
            others = self._came(rung := self._rung(trial))
            better = sum(self.curves[other][rung - 1] > self.curves[trial][-1] for other in others)
            lost += [trial] if better >= most else []
        return lost

    def last(self) -> tuple[str, int] | None:
        """As `next`, when none may go on, none is under way and none is left to begin; None is the end.

        The best that waits goes on where it is above all that went on from its rung, as long as half of the
        epochs of running every trial out pay for it; without a question while no trial has ended by itself.
        """
        for rung in self._rungs():
            top, went = self._best_at(rung), self._went(rung)
            if any(self.curves[other][rung - 1] >= self.curves[top][-1] for other in went):
                continue
            until = min(rung * self.halving.eta, self.halving.epochs)
            spent = sum(map(len, self.curves.values())) + until - len(self.curves[top])
            if not self.ended or 2 * spent <= self.trials * self.halving.epochs:
                del self.waiting[top]
                return top, rung * self.halving.eta
        return None

    def _rungs(self) -> list[int]:
        """Where trials wait, the highest first."""
        return sorted({self._rung(trial) for trial in self.waiting}, reverse=True)

    def _best_at(self, rung: int) -> str:
        here = [trial for trial in self.waiting if self._rung(trial) == rung]
        return max(here, key=lambda trial: self.curves[trial][-1])

    def _came(self, rung: int) -> list[str]:
        return [trial for trial, curve in self.curves.items() if len(curve) >= rung]

    def _went(self, rung: int) -> list[str]:
        """Those that came to a rung and neither wait nor were stopped there."""
        stay = {trial for trial in (*self.waiting, *self.stopped) if self._rung(trial) == rung}
        return [trial for trial in self._came(rung) if trial not in stay]

    def _rung(self, trial: str) -> int:
        return self.halving.rung(len(self.curves[trial]))

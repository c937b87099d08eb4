"""Run a search: ask, try, keep, tell, until enough trials stand. In this process, or on Ray.

With rungs (`halving.py`) a trial comes back at each rung and waits there; it goes on, or is stopped and
has ended like any other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from recray.errors import ConfigError, RecrayError
from recray.progress import say
from recray.tuning.halving import Rungs, Standing
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point
from recray.tuning.trial import Outcome, Trial, TrialCache, words

Objective = Callable[..., Outcome]
"""(point) -> outcome; in a sweep with rungs (point, epoch to train to, or None for all) -> outcome, whose
detail has the `values` after each epoch from the first on, and as its `standing` "waits" where there are
epochs left, "ended" where there are none."""

HOPELESS = 5  # so many failures from the start, and nothing else, end a search


class Sweep:
    """The state of a running search, fed by whoever runs the trials (never two threads at once)."""

    def __init__(
        self,
        searcher: ConstrainedSearcher,
        cache: TrialCache,
        trials: int,
        *,
        describe: Callable[[Trial], str] | None = None,
        usual: Point | None = None,
        rungs: Rungs | None = None,
        started: TrialCache | None = None,
        heard: Callable[[Trial], None] | None = None,
        noun: str = "trial",
        until: float = math.inf,
        beside: Callable[[Point], tuple[Any, ...]] | None = None,
    ) -> None:
        """describe: words of a trial that ended well. usual: a point whose values need no words.

        heard: is told of every trial once, also of those that were finished before. noun: what one is called.
        until: by `time.monotonic`, when no other trial is begun any more. beside: what else than its point a
        trial is given, as JSON; not with rungs.
        rungs: decide which trials go on. started: of the cache's context; keeps what has begun and not
        ended, so that a killed search goes on with it. Only for objectives that can be gone on with.
        """
        if trials < 1:
            raise ConfigError(f"a search of {trials} trials finds nothing", fix="give --trials 1 or more")
        self.searcher, self.cache, self.wanted = searcher, cache, trials
        self.trials: list[Trial] = []
        self.rungs, self._started = rungs, started
        self._running: dict[str, tuple[Trial, float]] = {}  # hash -> as it was when it went, start
        self._waiting: dict[str, Trial] = {}
        self._again: list[Trial] = []  # cut off by the end of an earlier process
        self._told: set[str] = set()
        self._used_up = False  # the space has no other point
        self._last = 0  # the highest number given; failures of a run before leave gaps
        self._describe, self._usual = describe or _metrics, usual
        self._heard, self._noun, self._until_s = heard, noun, until
        self._beside = beside or (lambda point: ())
        self._resume()

    @property
    def left(self) -> int:
        """How many trials are still to be begun, or to be gone on with where they were cut off."""
        under_way = len(self._running) + len(self._waiting)
        if len(self.trials) >= HOPELESS and not self._waiting and all(trial.error for trial in self.trials):
            return 0
        if time.monotonic() > self._until_s:
            return 0
        return max(self.wanted - len(self.trials) - under_way, 0)

    @property
    def running(self) -> int:
        """How many trials run now."""
        return len(self._running)

    @property
    def over(self) -> bool:
        """Whether there is nothing to do any more."""
        return not (self.left or self._running or self._waiting)

    def next(self) -> tuple[str, tuple[Any, ...]] | None:
        """(hash, what the objective is to be called with) of what is to run now.

        None: nothing, as long as those that run have not come back; where none runs, the search is over.
        """
        if self._again and self.left:
            trial = self._again.pop(0)
            return self._go(trial, self._until(trial))
        if self.rungs is not None and (better := self.rungs.next()) is not None:
            return self._go(self._waiting.pop(better[0]), better[1])
        point = self.searcher.ask() if self.left and not self._used_up else None
        self._used_up = self._used_up or bool(self.left and point is None)
        if point is not None:
            name = self.cache.hash(self.searcher.canonical(point))
            self._last += 1
            trial = Trial(hash=name, number=self._last, point=point)
            return self._go(trial, self._until(trial))
        if self.rungs is None or self._running:
            return None
        if (best := self.rungs.last()) is not None:
            return self._go(self._waiting.pop(best[0]), best[1])
        for name in list(self._waiting):
            self._stop(name)
        return None

    def done(self, name: str, outcome: Outcome | None, error: str | None = None) -> None:
        """What was running came back: keep it, tell the searcher, say a line."""
        before, start = self._running.pop(name)
        if outcome is not None:
            wrong = [k for k, v in outcome.metrics.items() if not math.isfinite(v)]
            if wrong:
                outcome, error = None, f"{wrong[0]} is not a number"
        trial = replace(
            before,
            metrics={} if outcome is None else dict(outcome.metrics),
            detail={} if outcome is None else dict(outcome.detail),
            error=None if outcome is not None else error or "failed",
            seconds=round(before.seconds + time.monotonic() - start, 3),
        )
        self._place(trial)
        self._tell(trial)
        if trial.hash in self._waiting:
            self._remember(trial)
            self._say(trial, f"{_metrics(trial)}  waits after epoch {len(trial.detail['values'])}")
        else:
            self._end(trial)
        for lost in self.rungs.hopeless() if self.rungs is not None else ():
            self._stop(lost)

    def result(self) -> list[Trial]:
        """All trials by number; RecrayError when every one failed."""
        failed = [trial for trial in self.trials if trial.error]
        if len(failed) == len(self.trials):
            first = f"the first said: {failed[0].error}" if failed else "nothing could be tried"
            raise RecrayError(f"all {len(failed)} trials failed", fix=first)
        return sorted(self.trials, key=lambda trial: trial.number)

    def _go(self, trial: Trial, until: int | None) -> tuple[str, tuple[Any, ...]]:
        self._running[trial.hash] = trial, time.monotonic()
        self._remember(_standing(trial, "goes"))
        point = dict(trial.point)
        return trial.hash, (point, *self._beside(point)) if self.rungs is None else (point, until)

    def _until(self, trial: Trial) -> int | None:
        """The next rung of a trial that begins, or that was cut off."""
        return None if self.rungs is None else self.rungs.halving.after(len(trial.detail.get("values", ())))

    def _place(self, trial: Trial) -> None:
        """Tell the rungs where the trial stands."""
        if self.rungs is None:
            return
        if trial.error:
            self.rungs.forget(trial.hash)
            return
        standing = trial.detail.get("standing", "ended")
        self.rungs.report(trial.hash, trial.detail.get("values", ()), standing)
        if standing == "waits":
            self._waiting[trial.hash] = trial

    def _tell(self, trial: Trial) -> None:
        """Tell the searcher, once a trial, what it may compare with others."""
        if trial.hash in self._told:
            return
        self._told.add(trial.hash)
        if self._heard is not None:
            self._heard(trial)
        learned: Mapping[str, float] | None = None if trial.error else trial.metrics
        if learned and self.rungs is not None and trial.detail.get("values"):
            learned = {name: self.rungs.best(trial.detail["values"]) for name in self.searcher.goals}
        self.searcher.tell(dict(trial.point), learned)

    def _stop(self, name: str) -> None:
        """End a trial at the rung where it waits."""
        trial = _standing(self._waiting.pop(name), "stopped")
        self._place(trial)
        self._end(trial)

    def _end(self, trial: Trial) -> None:
        if trial.error is None:
            self.cache.keep(trial)
        else:
            self._remember(trial)  # it was not cut off
        self.trials.append(trial)
        self._say(trial, f"failed: {trial.error}" if trial.error else self._describe(trial))

    def _remember(self, trial: Trial) -> None:
        if self._started is not None:
            self._started.keep(trial)

    def _resume(self) -> None:
        for trial in self.cache.load():
            self.trials.append(trial)
            self._place(trial)
            self._tell(trial)
        ended = {trial.hash for trial in self.trials}
        begun = [] if self._started is None else self._started.load()
        for trial in begun:
            if trial.hash in ended:
                continue
            if trial.detail.get("values"):
                self._place(trial)
                self._tell(trial)
            if trial.hash not in self._waiting:
                self.searcher.tell(dict(trial.point), None)  # not to be suggested
                self._again.append(trial)
        self._last = max((trial.number for trial in (*self.trials, *begun)), default=0)
        if self.trials:
            say(f"{len(self.trials)} {self._noun}s were finished before and are kept")
        if held := len(self._waiting) + len(self._again):
            say(f"{held} trials were begun before and go on where they were")

    def _say(self, trial: Trial, said: str) -> None:
        width = len(str(self.wanted))
        what = words(trial.point, self._usual)
        say(f"{self._noun} {trial.number:>{width}}/{self.wanted}  {what}  {said}  {trial.seconds:.1f} s")


def run(sweep: Sweep, objective: Objective, *, workers: int = 0, address: str | None = None) -> list[Trial]:
    """Run the sweep to its end: one trial at a time here (workers = 0), or `workers` at once on Ray.

    An objective that raises fails that trial alone. Returns all trials; RecrayError if all failed.
    """
    if workers > 0:
        from recray.tuning.on_ray import run_on_ray

        run_on_ray(sweep, objective, workers=workers, address=address)
        return sweep.result()
    while (asked := sweep.next()) is not None:
        name, given = asked
        outcome, error = attempt(objective, given)
        sweep.done(name, outcome, error)
    return sweep.result()


def attempt(objective: Objective, given: tuple[Any, ...]) -> tuple[Outcome | None, str | None]:
    """(outcome, None), or (None, one line that says what went wrong)."""
    try:
        return objective(*given), None
    except Exception as error:
        text = str(error).strip().splitlines()
        said = text[0][:300] if text else "no words"
        return None, said if isinstance(error, RecrayError) else f"{type(error).__name__}: {said}"


def _standing(trial: Trial, standing: Standing) -> Trial:
    return replace(trial, detail={**trial.detail, "standing": standing})


def _metrics(trial: Trial) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in trial.metrics.items())

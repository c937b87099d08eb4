"""Run a search: ask, try, keep, tell, until enough trials stand. In this process, or on Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from recray.errors import ConfigError, RecrayError
from recray.progress import say
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point
from recray.tuning.trial import Outcome, Trial, TrialCache, words

Objective = Callable[[Point], Outcome]

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
    ) -> None:
        if trials < 1:
            raise ConfigError(f"a search of {trials} trials finds nothing", fix="give --trials 1 or more")
        self.searcher, self.cache, self.wanted = searcher, cache, trials
        self.trials: list[Trial] = []
        self._running: dict[str, tuple[int, Point, float]] = {}  # hash -> number, point, start
        self._last = 0  # the highest number given; failures of a run before leave gaps
        self._describe, self._usual = describe or _metrics, usual
        self._resume()

    @property
    def left(self) -> int:
        """How many trials are still to be started."""
        if len(self.trials) >= HOPELESS and all(trial.error for trial in self.trials):
            return 0
        return max(self.wanted - len(self.trials) - len(self._running), 0)

    def next(self) -> tuple[str, Point] | None:
        """(hash, point) of the next trial to run; None when enough were started, or none is left."""
        if not self.left:
            return None
        point = self.searcher.ask()
        if point is None:
            return None
        name = self.cache.hash(self.searcher.canonical(point))
        self._last += 1
        self._running[name] = (self._last, point, time.monotonic())
        return name, point

    def done(self, name: str, outcome: Outcome | None, error: str | None = None) -> None:
        """A running trial ended: keep it, tell the searcher, say a line."""
        number, point, start = self._running.pop(name)
        if outcome is not None:
            wrong = [k for k, v in outcome.metrics.items() if not math.isfinite(v)]
            if wrong:
                outcome, error = None, f"{wrong[0]} is not a number"
        trial = Trial(
            hash=name,
            number=number,
            point=point,
            metrics={} if outcome is None else dict(outcome.metrics),
            detail={} if outcome is None else dict(outcome.detail),
            error=None if outcome is not None else error or "failed",
            seconds=round(time.monotonic() - start, 3),
        )
        if outcome is not None:
            self.cache.keep(trial)
        self.trials.append(trial)
        self.searcher.tell(point, None if outcome is None else outcome.metrics)
        self._say(trial)

    def result(self) -> list[Trial]:
        """All trials by number; RecrayError when every one failed."""
        failed = [trial for trial in self.trials if trial.error]
        if len(failed) == len(self.trials):
            first = f"the first said: {failed[0].error}" if failed else "nothing could be tried"
            raise RecrayError(f"all {len(failed)} trials failed", fix=first)
        return sorted(self.trials, key=lambda trial: trial.number)

    def _resume(self) -> None:
        for trial in self.cache.load():
            self._last = max(self._last, trial.number)
            self.trials.append(trial)
            self.searcher.tell(trial.point, trial.metrics)
        if self.trials:
            say(f"{len(self.trials)} trials were finished before and are kept")

    def _say(self, trial: Trial) -> None:
        said = f"failed: {trial.error}" if trial.error else self._describe(trial)
        width = len(str(self.wanted))
        what = words(trial.point, self._usual)
        say(f"trial {trial.number:>{width}}/{self.wanted}  {what}  {said}  {trial.seconds:.1f} s")


def run(sweep: Sweep, objective: Objective, *, workers: int = 0, address: str | None = None) -> list[Trial]:
    """Run the sweep to its end: one trial at a time here (workers = 0), or `workers` at once on Ray.

    An objective that raises fails that trial alone. Returns all trials; RecrayError if all failed.
    """
    if workers > 0:
        from recray.tuning.on_ray import run_on_ray

        run_on_ray(sweep, objective, workers=workers, address=address)
        return sweep.result()
    while (asked := sweep.next()) is not None:
        name, point = asked
        outcome, error = attempt(objective, point)
        sweep.done(name, outcome, error)
    return sweep.result()


def attempt(objective: Objective, point: Point) -> tuple[Outcome | None, str | None]:
    """(outcome, None), or (None, one line that says what went wrong)."""
    try:
        return objective(point), None
    except Exception as error:
        text = str(error).strip().splitlines()
        said = text[0][:300] if text else "no words"
        return None, said if isinstance(error, RecrayError) else f"{type(error).__name__}: {said}"


def _metrics(trial: Trial) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in trial.metrics.items())

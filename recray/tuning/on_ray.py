"""The wing's door to Ray: Ray Tune runs the trials, our searcher says which, our cache keeps them.

Tune's own state is never restored from: it is saved seldom and not atomically, so a finished trial
would run again. A killed search is run again instead, and finds its trials in the cache.

Nor does Tune's own ASHA say which trials stop: its rungs cannot be filled from trials that ended before,
and what it stops has ended for good, so it lets many go on while there are few to compare them with. Here
what Tune runs as a trial is one stretch of ours, up to its next rung; the sweep, which is where the driver
is and nowhere else, says which one comes next.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from recray import connect
from recray.storage import scratch
from recray.tuning.sweep import Objective, Sweep, attempt
from recray.tuning.trial import Outcome

SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # no CSV, JSON and TensorBoard file a trial
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: the block below stops what it started
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output, of which verbose=0 leaves nothing
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_on_ray(sweep: Sweep, objective: Objective, *, workers: int, address: str | None = None) -> None:
    """Run the sweep's trials on Ray, `workers` at a time, each on one CPU.

    Actors are reused from trial to trial. A worker that dies is tried once more; a trial that fails
    fails alone. The objective travels once, over Ray's own object store.
    """
    if sweep.over:
        return
    with connect.session(address, num_cpus=max(workers, os.cpu_count() or 1)), quiet_tune():
        with scratch() as folder:
            tuner = tune.Tuner(
                tune.with_resources(tune.with_parameters(_Tried, objective=objective), {"cpu": 1}),
                tune_config=tune.TuneConfig(
                    search_alg=_Asking(sweep),
                    metric="finished",
                    mode="max",
                    num_samples=-1,  # until the sweep has no more
                    max_concurrent_trials=workers,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="search",
                    storage_path=str(folder),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=1),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            )
            tuner.fit()


class _Tried(tune.Trainable):  # type: ignore[misc]
    """One call of the objective a step, in an actor that serves many; an error is a result like any other."""

    def setup(self, config: Mapping[str, Any], objective: Objective) -> None:
        self.objective = objective
        self.reset_config(config)

    def reset_config(self, new_config: Mapping[str, Any]) -> bool:
        self.given = tuple(json.loads(new_config["given"]))
        return True

    def step(self) -> dict[str, Any]:
        outcome, error = attempt(self.objective, self.given)
        said = None if outcome is None else asdict(outcome)
        if said is not None:
            said["detail"]["node"] = ray.get_runtime_context().get_node_id()
        return {"done": True, "finished": 1, "outcome": json.dumps(said), "failure": error or ""}


class _Asking(Searcher):  # type: ignore[misc]
    """Tune asks it for points; it asks the sweep, and tells it how the trials ended."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(metric="finished", mode="max")
        self.sweep = sweep
        self.names: dict[str, str] = {}  # Tune's trial id -> the trial's hash

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        asked = self.sweep.next()
        if asked is None:
            return None if self.sweep.running else str(Searcher.FINISHED)
        self.names[trial_id], given = asked
        return {"given": json.dumps(given)}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        name = self.names.pop(trial_id, None)
        if name is None:
            return
        if error or not result or "outcome" not in result:
            self.sweep.done(name, None, "the worker that ran it died")
            return
        said = json.loads(result["outcome"])
        outcome = None if said is None else Outcome(**said)
        self.sweep.done(name, outcome, result["failure"] or None)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: what is worth keeping is in the trial cache."""


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Tune's settings for the block, its log and its words kept from the user's."""
    before = {name: os.environ.get(name) for name in SETTINGS}
    logger = logging.getLogger("ray.tune")
    level = logger.level
    os.environ.update(SETTINGS)
    logger.setLevel(logging.CRITICAL)  # how each trial ended is said by the sweep
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

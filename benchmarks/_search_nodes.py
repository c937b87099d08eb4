"""The driver of a job: trials of the planted problem on whatever nodes a cluster has.

`ray job submit --working-dir . -- python -m benchmarks._search_nodes OUT` leaves each trial as a file in OUT
and says on standard output how many there were, how many failed, and the best that fits. The soak test takes
a node away on the way.
"""

from __future__ import annotations

import json
import sys
import time

from benchmarks._search_planted import LIMITS, OPTIMUM, SPACE, WORK, fits, planted
from recray.storage import place
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point, Space
from recray.tuning.sweep import Sweep, run
from recray.tuning.trial import Outcome, TrialCache

TRIALS, WORKERS = 200, 2
PAUSE = 0.2  # seconds of a trial


def tried(point: Point) -> Outcome:
    """One trial."""
    time.sleep(PAUSE)
    return Outcome(planted(point))


def main(out: str, trials: int = TRIALS) -> None:
    """Search, and say what was found."""
    searcher = ConstrainedSearcher(
        Space.parse(SPACE), {"quality": "max"}, limits=LIMITS, sampler="tpe", seed=0
    )
    sweep = Sweep(searcher, TrialCache(place(out), {"of": WORK}), trials)
    found = run(sweep, tried, workers=WORKERS)
    best = max(
        (trial.metrics["quality"] for trial in found if not trial.error and fits(trial.metrics)), default=0.0
    )
    failed = sum(trial.error is not None for trial in found)
    print(json.dumps({"trials": len(found), "failed": failed, "best": best, "optimum": OPTIMUM}))


if __name__ == "__main__":
    main(sys.argv[1])

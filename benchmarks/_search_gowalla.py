"""Searches of a packed retriever on lightgcn_gowalla, by the volume that their fronts dominate over time.

The retriever is iALS by its recipe with 64 dims (--quick: four sweeps), trained on the set's training file.
Quality is told by its test file, here the search's validation split: methods are compared, not models, and
the set's lists have no order that would make an item the last. `--only 0` takes one seed of three. Every
method has the same seconds on the same machine, on one Ray worker that is kept from trial to trial, and its
trials measure the same things in the same way. Told are the seconds until a method has 95 % of the final
volume, that of all methods' trials together, below a reference point that is fixed here; infeasible trials
do not count for anybody. A method that does not come so far is told of with all the seconds it had; where
none did there is no ratio.

ours           parts measured once, plans put together, what cannot fit left out
optuna         Ray Tune's OptunaSearch as it ships, with quality, p99 and bytes as its three goals
optuna-pieces  the same, with our cache of encoded tables and indexes lent to it
random         Ray Tune's random search

The error of our latency model is that on its own trials, each left out in turn.
`RECRAY_BENCH` names a folder in which the model is kept from one run to the next.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._sets import DATA, there
from benchmarks.rows import Row, usable_cores
from recray import connect
from recray.data.prepare import prepare
from recray.errors import ArtefactError, RecrayError
from recray.manifest import Artefact, open_artefact
from recray.models.base import Retriever
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.training.run import train
from recray.tuning import packing
from recray.tuning.compress import Limits, Work
from recray.tuning.cost import Error
from recray.tuning.latency import Effort
from recray.tuning.pareto import hypervolume
from recray.tuning.space import Point, Space
from recray.tuning.sweep import run
from recray.tuning.trial import Outcome

WORK = "lightgcn_gowalla"
REFERENCE = (0.0, 0.02, 12e6)  # quality, seconds of p99, bytes per 64 dims: fixed before any run
SHARE = 0.95  # of the final volume
METRIC = "ndcg@10"
SEEDS = (0, 1, 2)
SECONDS = (180.0, 60.0)  # of every method; of --quick
EFFORT = (3.0, 1.0)  # seconds of a trial's timing
USERS = (2000, 300)  # of a trial
GOALS = {"optuna": 4.0, "optuna-pieces": 2.0, "random": 10.0}


@dataclass(frozen=True)
class Logged:
    """An objective that notes when each trial ended and what it measured."""

    tried: packing.PlanTrial
    log: str

    def __call__(self, point: Point, rival: Sequence[float] | None = None) -> Outcome:
        outcome = self.tried(point, rival)
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), **outcome.metrics}) + "\n")
        return outcome


@dataclass(frozen=True)
class Ran:
    """One method's trials: seconds since it started, and costs float[n, 3] to be made small."""

    seconds: Sequence[float]
    costs: np.ndarray[Any, Any]
    error: Error | None = None

    def until(self, volume: float, corner: Sequence[float], limit: float) -> tuple[float, int, bool]:
        """(seconds, trials, whether) until the front dominates `volume`."""
        for n in range(1, len(self.costs) + 1):
            if hypervolume(self.costs[:n], corner) >= volume:
                return self.seconds[n - 1], n, True
        return limit, len(self.costs), False


def gowalla_rows(quick: bool, only: str = "") -> Iterator[Row]:
    """Seconds to 95 % of the final hypervolume, and the latency model's error; `only`: a seed."""
    if not there(WORK):
        return
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        folder = Path(os.environ.get("RECRAY_BENCH", scratch))
        retriever, data = _model(folder, Path(scratch), quick)
        model = load_model(retriever)
        assert isinstance(model, Retriever)
        limit = SECONDS[quick]
        tried = packing.PlanTrial(
            retriever=retriever.place.uri,
            ranker=None,
            dataset=data.artefact.place.uri,
            metric=METRIC,
            users=USERS[quick],
            seed=0,
            effort=Effort(seconds=EFFORT[quick]),
        )
        corner = (REFERENCE[0], REFERENCE[1], REFERENCE[2] * model.item_vectors().shape[1] / 64)
        with connect.session(num_cpus=usable_cores()):
            for seed in [int(only)] if only else SEEDS[: 1 if quick else None]:
                ran: dict[str, Ran] = {}
                for name, method in METHODS.items():
                    say(f"{name}, seed {seed}: {limit:.0f} s")
                    place = Path(tempfile.mkdtemp(dir=scratch))
                    ran[name] = method(Asked(retriever, data, model, tried, corner, seed, limit, place))
                    say(f"{name}, seed {seed}: {len(ran[name].costs)} trials")
                yield from _rows(ran, corner, limit, seed)


@dataclass(frozen=True)
class Asked:
    """What a method is given: the work, the corner that limits it, a seed, its seconds and a folder."""

    retriever: Artefact
    data: Any
    model: Retriever
    tried: packing.PlanTrial
    corner: tuple[float, float, float]
    seed: int
    seconds: float
    folder: Path

    @property
    def space(self) -> Space:
        """Of all plans for the model."""
        space = packing.plan_space(self.model, None)
        assert space is not None
        return space

    def ran(self, start: float, error: Error | None = None) -> Ran:
        """What the log holds of trials inside the corner, in the order they ended."""
        log = self.folder / "log"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        kept = sorted(
            (line for line in lines if line["at"] <= start + self.seconds), key=lambda line: line["at"]
        )
        costs = np.array([(-line[METRIC], line["p99"], line["bytes"]) for line in kept]).reshape(-1, 3)
        return Ran([line["at"] - start for line in kept], costs, error)


def ours(asked: Asked) -> Ran:
    """Parts, then whole trials until the time is up."""
    limits = Limits(p99=asked.corner[1], size=asked.corner[2])
    parents = {"dataset": asked.data.artefact, "checkpoint": asked.retriever}
    tried = replace(asked.tried, pieces=_made(asked.folder / "pieces"))
    start, until = time.time(), time.monotonic() + asked.seconds
    seeded = replace(tried, seed=asked.seed)  # of the searcher; trials are of the same users
    work = Work(
        asked.space,
        (asked.model, None),
        seeded,
        limits.budget,
        limits,
        (0.0, None),
        0.01,
        asked.folder / "out",
        parents,
    )
    work.measure_parts(tried, 1, None, until)
    try:
        run(work.sweep(10_000, until, race=True), Logged(tried, str(asked.folder / "log")), workers=1)
    except RecrayError as error:  # no trial in all the time
        say(str(error))
    return asked.ran(start, work.forecast.model.error)


def optuna(asked: Asked, pieces: bool = False) -> Ran:
    """Ray Tune with OptunaSearch as it ships."""
    from optuna import distributions
    from ray.tune.search.optuna import OptunaSearch

    space: dict[str, Any] = {}
    for name, d in asked.space.dimensions.items():
        if d.kind == "choice":
            space[name] = distributions.CategoricalDistribution(d.choices)
        elif d.kind == "int":
            space[name] = distributions.IntDistribution(int(d.low), int(d.high), log=d.log)
        else:
            space[name] = distributions.FloatDistribution(d.low, d.high, log=d.log)
    search = OptunaSearch(space, metric=[METRIC, "p99", "bytes"], mode=["max", "min", "min"], seed=asked.seed)
    return _tuned(asked, pieces, search_alg=search)


def lent(asked: Asked) -> Ran:
    """The same with our pieces."""
    return optuna(asked, pieces=True)


def random(asked: Asked) -> Ran:
    """Ray Tune's own random search."""
    from ray import tune

    space: dict[str, Any] = {}
    for name, d in asked.space.dimensions.items():
        if d.kind == "choice":
            space[name] = tune.choice(d.choices)
        elif d.kind == "int":
            space[name] = (
                tune.lograndint(int(d.low), int(d.high) + 1)
                if d.log
                else tune.randint(int(d.low), int(d.high) + 1)
            )
        else:
            space[name] = tune.loguniform(d.low, d.high) if d.log else tune.uniform(d.low, d.high)
    return _tuned(asked, False, param_space=space)


METHODS: Mapping[str, Callable[[Asked], Ran]] = {
    "ours": ours,
    "optuna": optuna,
    "optuna-pieces": lent,
    "random": random,
}


def _tuned(asked: Asked, pieces: bool, **more: Any) -> Ran:
    """Ray Tune for the seconds, one trial at a time, its actor reused; a trial that fails is worst of all."""
    from ray import tune

    tried = replace(asked.tried, pieces=_made(asked.folder / "pieces") if pieces else None)
    objective = Logged(tried, str(asked.folder / "log"))
    worst = {METRIC: 0.0, "p99": 10 * asked.corner[1], "bytes": 10 * asked.corner[2]}

    class Tried(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: Mapping[str, Any]) -> None:
            self.point = dict(config)

        def reset_config(self, new_config: Mapping[str, Any]) -> bool:
            self.point = dict(new_config)
            return True

        def step(self) -> dict[str, Any]:
            try:
                return {"done": True, **objective(self.point).metrics}
            except Exception as error:
                return {"done": True, **worst, "said": str(error)[:200]}

    from recray.tuning.on_ray import quiet_tune

    search, start = more.pop("search_alg", None), time.time()
    with quiet_tune():
        tune.Tuner(
            tune.with_resources(Tried, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=-1,
                max_concurrent_trials=1,
                reuse_actors=True,
                time_budget_s=asked.seconds,
            ),
            run_config=tune.RunConfig(name="peer", storage_path=str(_made(asked.folder / "tune")), verbose=0),
            **more,
        ).fit()
    return asked.ran(start)


def _rows(ran: Mapping[str, Ran], corner: Sequence[float], limit: float, seed: int) -> Iterator[Row]:
    worst = (-corner[0], *corner[1:])
    final = hypervolume(np.concatenate([one.costs for one in ran.values()]), worst)
    at = {name: one.until(SHARE * final, worst, limit) for name, one in ran.items()}
    seconds, trials, came = at["ours"]
    for peer, goal in GOALS.items():
        theirs, peer_trials, peer_came = at[peer]
        yield Row(
            name=f"seconds to {SHARE:.0%} of the final hypervolume, beside {peer}, seed {seed}",
            work=WORK,
            metric="hypervolume_seconds",
            value=seconds,
            unit="s",
            peer=peer,
            peer_value=theirs if came or peer_came else None,
            given={
                "trials": trials, "peer trials": peer_trials, "reached": came, "peer reached": peer_came,
                "reference": list(corner), "seconds each": limit, "wanted ratio": goal,
            },
            seeds=(seed,),
        )  # fmt: skip
    error = ran["ours"].error
    for name, bar in (("p50", 15.0), ("p99", 25.0)):
        if error is not None and error.n:
            yield Row(
                name=f"latency model, {name} of trials left out, seed {seed}",
                work=WORK,
                metric="mape",
                value=100 * getattr(error, name),
                unit="%",
                given={"trials": error.n, "out of range": error.out, "bar": bar},
                seeds=(seed,),
            )


def _model(folder: Path, scratch: Path, quick: bool) -> tuple[Artefact, Any]:
    """iALS, kept in `folder`; the set's test file is the dataset's validation split."""
    changes = ["options.dim=64", *(["options.sweeps=4"] if quick else [])]
    at = folder / f"search-ials-{'quick' if quick else 'full'}"
    files = DATA / WORK
    data = prepare(
        files / "train.sorted.txt.xz", valid=files / "test.txt.xz", split="none", out=scratch / "data"
    )
    try:
        found = open_artefact(at, "checkpoint")
        if found.manifest.parents["dataset"]["hash"] == data.artefact.hash:
            return found, data
    except ArtefactError:
        pass
    return train(data, recipe("ials@lightgcn_gowalla", changes), out=at), data


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

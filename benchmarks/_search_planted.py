"""A planted problem: made-up plans whose best one under two limits is known.

Quality falls with fewer bits, with a quantized graph and away from a blend, and rises with candidates; time
and bytes are limited so that neither the best quality nor the smallest plan is the answer. Told is by how
much the best that fits falls short of the optimum, in per cent, the mean of the seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import mean

import numpy as np

from benchmarks.rows import Row
from recray.tuning.searcher import ConstrainedSearcher
from recray.tuning.space import Point, Space

WORK = "planted 4 codecs x 2 graphs x candidates x blend"
SPACE = ("codec=f32,f16,int8,int4", "graph=eager,onnx", "candidates=20..400", "blend=0..1.0")
LIMITS = {"time": 3.2, "bytes": 2.0}
CODEC = {"f32": (1.0, 8.0), "f16": (0.999, 4.0), "int8": (0.99, 2.0), "int4": (0.9, 1.0)}  # quality, bytes
SEEDS = (0, 1, 2)
ALLOWED = 5.0  # per cent


def planted(point: Mapping[str, object]) -> dict[str, float]:
    """What a plan measures."""
    quality, size = CODEC[str(point["codec"])]
    candidates, blend = float(str(point["candidates"])), float(str(point["blend"]))
    eager = point["graph"] == "eager"
    quality *= (
        (1.0 if eager else 0.995) * (1 - 0.5 * math.exp(-candidates / 60)) * (1 - 0.4 * (blend - 0.6) ** 2)
    )
    return {"quality": quality, "time": (3.0 if eager else 1.0) + candidates / 100, "bytes": size}


OPTIMUM = planted({"codec": "int8", "graph": "onnx", "candidates": 220, "blend": 0.6})["quality"]


def fits(metrics: Mapping[str, float]) -> bool:
    """Whether both limits hold."""
    return all(metrics[name] <= limit for name, limit in LIMITS.items())


def planted_rows(quick: bool) -> Iterator[Row]:
    """Ours beside Optuna's default sampler, as it comes and told of the limits, and random points."""
    trials = 16 if quick else 60
    ours = [_short(_ours(seed, trials)) for seed in SEEDS]
    peers = (("optuna", _optuna), ("optuna-constrained", _constrained), ("random", _random))
    for peer, ask in peers:
        theirs = [_short(ask(seed, trials)) for seed in SEEDS]
        yield Row(
            name="constrained search",
            work=WORK,
            metric="mape",
            value=mean(ours),
            unit="% below the optimum",
            peer=peer,
            peer_value=mean(theirs),
            given={"trials": trials, "worst": max(ours), "allowed": ALLOWED},
            seeds=SEEDS,
        )


def _short(found: list[dict[str, float]]) -> float:
    best = max((one["quality"] for one in found if fits(one)), default=0.0)
    return 100 * (1 - best / OPTIMUM)


def _ours(seed: int, trials: int) -> list[dict[str, float]]:
    searcher = ConstrainedSearcher(Space.parse(SPACE), {"quality": "max"}, limits=LIMITS, seed=seed)
    found = []
    for _ in range(trials):
        point = searcher.ask()
        assert point is not None
        found.append(planted(point))
        searcher.tell(point, found[-1])
    return found


def _constrained(seed: int, trials: int) -> list[dict[str, float]]:
    return _optuna(seed, trials, limited=True)


def _optuna(seed: int, trials: int, *, limited: bool = False) -> list[dict[str, float]]:
    """limited: whether the sampler is told by how much each limit is exceeded."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: list[dict[str, float]] = []

    def objective(trial: optuna.Trial) -> float:
        point: Point = {
            "codec": trial.suggest_categorical("codec", list(CODEC)),
            "graph": trial.suggest_categorical("graph", ["eager", "onnx"]),
            "candidates": trial.suggest_int("candidates", 20, 400),
            "blend": trial.suggest_float("blend", 0, 1),
        }
        found.append(planted(point))
        for name, limit in LIMITS.items() if limited else ():
            trial.set_constraint(name, found[-1][name] / limit - 1)
        return found[-1]["quality"]

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.optimize(objective, n_trials=trials)
    return found


def _random(seed: int, trials: int) -> list[dict[str, float]]:
    draw, space = np.random.default_rng(seed), Space.parse(SPACE)
    return [planted(space.sample(draw)) for _ in range(trials)]

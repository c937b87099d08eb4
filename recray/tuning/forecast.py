"""What is known of plans before they are built: bytes from the codecs, the rest from parts and trials.

Table, index and ranker are nearly independent of each other. So plans that differ from the uncompressed one
in one thing only (`part_points`) are measured first, with few users and a short timing; put together they say
of any plan about how large, how fast and how good it is. That serves to leave out what cannot fit before it
is built, and to propose what should extend the front. What users are told is measured whole all the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from recray import config
from recray.compression.codec import codec_named
from recray.models.base import Model
from recray.tuning import packing
from recray.tuning.cost import CostModel, Predicted, Seen
from recray.tuning.pareto import Budget, Value, dominated, hypervolume
from recray.tuning.ridge import Features, Ridge
from recray.tuning.space import Dimension, Point, Space
from recray.tuning.trial import Trial

POOL = 600  # plans that are looked at for one proposal
WEIGHED = 24  # of them, whose gain of hypervolume is computed
LENGTH = 20  # items of a history, where operations are reckoned


def features(point: Mapping[str, object]) -> dict[str, dict[str, float | str]]:
    """stage -> what decides how long it takes; numbers as logarithms."""
    plan = config.as_dict(packing.plan_of(point))  # type: ignore[arg-type]
    coded = {name: _word(plan[f"{name}_codec"]) for name in ("retriever", "ranker")}
    search: dict[str, float | str] = {"index": plan["index"], "codec": coded["retriever"]}
    for name in packing.VARIES.get(plan["index"], {}):
        if name in plan["index_params"]:
            search[name] = math.log(plan["index_params"][name])
    made: dict[str, dict[str, float | str]] = {
        "encode": {"codec": coded["retriever"], "graph": plan["encoder_graph"]},
        "search": search,
        "rest": {},
    }
    if "blend" in point and plan["blend"] < 1:
        search["depth"] = asked = math.log(plan["candidates"])
        made["rank"] = {"codec": coded["ranker"], "graph": plan["ranker_graph"], "candidates": asked}
    return made


def choices(point: Mapping[str, object]) -> dict[str, float | str]:
    """All that decides the quality, in one row."""
    made: dict[str, float | str] = {}
    for stage, row in features(point).items():
        made |= {f"{stage}.{name}": value for name, value in row.items()}
    if isinstance(blend := point.get("blend"), (int, float)):
        made |= {"blend": float(blend), "blend squared": float(blend) ** 2}
    return made


def part_points(space: Space, usual: Point) -> list[Point]:
    """The usual plan, and those that differ from it in one thing; numbers at the ends of their ranges."""
    made = [dict(usual)]
    for name, dimension in space.dimensions.items():
        if name in packing.USED_BY:
            continue
        if dimension.kind != "choice":
            ends = (0.0, 0.5, 1.0) if name == "blend" else (dimension.low, dimension.high)
            made += [{**usual, name: dimension.tidy(end)} for end in ends]
            continue
        for value in dimension.choices:
            own = [space.dimensions[each] for each in packing.VARIES.get(str(value), ()) if name == "index"]
            made += [{**usual, name: value, **corner} for corner in _corners(own)]
    return list({json.dumps(packing.canonical(point), sort_keys=True): point for point in made}.values())


class Forecast:
    """Bytes, latency and quality of plans by what was measured so far; proposes plans under a budget.

    overhead: seconds of HTTP that the budget's p99 counts in. cost: (seconds in process, bytes) ->
    money. usual: the uncompressed plan, see `packing.first_points`.
    """

    def __init__(
        self, space: Space, retriever: Model, ranker: Model | None, budget: Budget, metric: str,
        *, overhead: float = 0.0, seed: int = 0, cost: Callable[[float, float], float] | None = None,
        usual: Point | None = None,
    ) -> None:  # fmt: skip
        self.space, self.budget, self.metric, self.overhead = space, budget, metric, overhead
        self.models = {"retriever": retriever, "ranker": ranker}
        self.model = CostModel()
        self._cost = cost or (lambda seconds, size: 0.0)
        self._rng = np.random.default_rng(seed)
        self._rest: dict[tuple[str, str], float] = {}  # (stage, graph) -> bytes that are no table
        self._index: list[tuple[Features, float]] = []
        self._fitted: Ridge | None = None
        self._values: list[Value] = []
        self._good: list[Point] = []
        self._users: list[Sequence[float] | None] = []  # of each good one: its value for each user, if whole
        self.usual = packing.canonical(usual or packing.first_points(space)[0])
        self.plain: dict[bool, float] = {}  # of a part / whole: the uncompressed plan's quality
        self._early: dict[bool, list[Seen]] = {True: [], False: []}  # came before it, with their own quality

    def learn(self, trial: Trial, *, part: bool = False) -> None:
        """What a part or a trial measured."""
        if trial.error is not None or "latency" not in trial.detail:
            return
        point, metrics = trial.point, trial.metrics
        quality = metrics[self.metric]
        if packing.canonical(point) == self.usual:
            self.plain[part] = quality
        plain = self.plain.get(part)
        seen = Seen(
            key=json.dumps(packing.canonical(point), sort_keys=True),
            features=self.features(point),
            choices=choices(point),
            stages=trial.detail["latency"].get("stages") or {},
            p50=None if part else metrics["p50"],
            p99=None if part else metrics["p99"],
            quality=quality / plain if plain else None,
        )
        self.model.learn(seen)
        self._early[part].append(replace(seen, features={}, stages={}, p50=None, p99=None, quality=quality))
        if plain:  # of all but this one: what the uncompressed plan was not known for
            for early in self._early[part][:-1]:
                self.model.learn(replace(early, quality=(early.quality or 0.0) / plain))
            self._early[part].clear()
        self._weigh(trial)
        if not part:
            self._values.append(Value(quality, metrics["p99"] + self.overhead, metrics["bytes"]))
            self._good.append(dict(point))
            self._users.append(trial.detail.get("values"))

    def features(self, point: Mapping[str, object]) -> dict[str, dict[str, float | str]]:
        """See `features`; a retriever without vectors scores the whole catalogue in one stage."""
        made = features(point)
        if not getattr(self.models["retriever"], "has_vectors", True):
            made["search"] |= made.pop("encode")
        return made

    def bytes(self, point: Mapping[str, object]) -> float:
        """What a plan's bundle weighs: tables exactly, networks and indexes as they were measured; what was
        never measured counts nothing, so a plan is never lighter than this but by a few hundred bytes."""
        plan, total = packing.plan_of(point), 0.0  # type: ignore[arg-type]
        for stage, graph in (("retriever", plan.encoder_graph), ("ranker", plan.ranker_graph)):
            codecs = plan.retriever_codec if stage == "retriever" else plan.ranker_codec
            total += packing.coded_bytes(self.models[stage], codecs) + self._rest.get((stage, graph), 0.0)
        asked = features(point)["search"]
        if self._index and plan.index != "exact":
            if self._fitted is None:
                self._fitted = Ridge.fit([row for row, _ in self._index], [size for _, size in self._index])
            total += 0.0 if self._fitted.beyond(asked) else math.exp(self._fitted.predict(asked))
        return total

    def operations(self, point: Mapping[str, object]) -> float:
        """Multiplications of a request, from the sizes of what it passes; a history has LENGTH items."""
        plan = packing.plan_of(point)  # type: ignore[arg-type]
        retriever, ranker = self.models["retriever"], self.models["ranker"]
        made = LENGTH * _weights(retriever)
        if "item" in (tables := getattr(retriever, "tables", {})):
            rows, dim = tables["item"].num_rows, tables["item"].dim
            looked = {
                "hnsw": 2.0 * plan.index_params.get("links", 32) * plan.index_params.get("ef_search", 64)
            }
            if plan.index == "ivf":
                lists = max(1.0, 4 * math.sqrt(rows))
                looked["ivf"] = lists + rows * min(1.0, plan.index_params.get("probes", 16) / lists)
            made += dim * min(float(rows), looked.get(plan.index, rows))
        if ranker is not None and plan.blend < 1:
            made += plan.candidates * _weights(ranker)
        return made

    def latency(self, point: Mapping[str, object]) -> Predicted:
        """In process, without HTTP."""
        return self.model.latency(self.features(point))

    def bound(self, point: Point) -> dict[str, float]:
        """What a plan will hardly go below: bytes, and p99 less the model's error."""
        light = packing.table_bytes(point, self.models["retriever"], self.models["ranker"])
        return {"bytes": light, "p99": self.model.surely_above(self.features(point))}

    def rival(self, point: Point) -> tuple[Sequence[float], ...]:
        """What to race a plan against: of the best trial that is surely no larger and no slower, its value
        for each user; nothing where there is none."""
        low, light = self.model.surely_above(self.features(point)) + self.overhead, self.bytes(point)
        best: tuple[float, Sequence[float]] | None = None
        for value, users in zip(self._values, self._users):
            if users is None or value.bytes > light or value.p99 > low:
                continue
            if best is None or value.quality > best[0]:
                best = value.quality, users
        return () if best is None else (best[1],)

    def propose(self) -> Iterator[Point]:
        """Plans that are predicted to fit, those first that would add most to the front's hypervolume."""
        if not self._values:
            return
        found = [(point, value) for point in self._pool() if (value := self.value(point)) is not None]
        found = [(point, value) for point, value in found if self.budget.fits(value)]
        if not found:
            return
        measured = np.array([value.costs for value in self._values]).reshape(-1, 3)
        predicted = np.array([value.costs for _, value in found])
        keep = np.flatnonzero(~dominated(np.concatenate([predicted, measured]))[: len(found)])
        by_quality = keep[np.argsort(predicted[keep, 0], kind="stable")]
        some = [by_quality[i] for i in _spread(len(by_quality), WEIGHED)]
        corner = (0.0, self.budget.p99, self.budget.size)
        front = measured[~dominated(measured)] if len(measured) else measured
        gains = [hypervolume(np.concatenate([front, predicted[i : i + 1]]), corner) for i in some]
        for at in np.argsort(gains, kind="stable")[::-1]:
            yield found[some[at]][0]

    def value(self, point: Point) -> Value | None:
        """What a plan is predicted to be worth, HTTP counted in; None where anything is out of range."""
        share = self.model.quality(choices(point))
        told = self.latency(point)
        if share is None or told.p50 is None or told.p99 is None:
            return None
        plain, size = self.plain.get(False, self.plain.get(True, 0.0)), self.bytes(point)
        return Value(share * plain, told.p99 + self.overhead, size, self._cost(told.p50, size))

    def _pool(self) -> list[Point]:
        made = [self.space.sample(self._rng) for _ in range(POOL // 2)]
        while self._good and len(made) < POOL:
            point = self._good[int(self._rng.integers(len(self._good)))]
            other = made[int(self._rng.integers(len(made)))]
            name = list(self.space.dimensions)[int(self._rng.integers(len(self.space.dimensions)))]
            made.append({**point, name: other[name]})
        return made

    def _weigh(self, trial: Trial) -> None:
        told = trial.detail.get("bytes")
        if not told:
            return
        plan = packing.plan_of(trial.point)
        for stage, graph in (("retriever", plan.encoder_graph), ("ranker", plan.ranker_graph)):
            codecs = plan.retriever_codec if stage == "retriever" else plan.ranker_codec
            self._rest[stage, graph] = max(told[stage] - packing.coded_bytes(self.models[stage], codecs), 0)
        if plan.index != "exact" and told["index"] > 0:
            self._index.append((features(trial.point)["search"], math.log(told["index"])))
            self._fitted = None


def _corners(dimensions: Sequence[Dimension]) -> list[Point]:
    """Three points that tell two numbers' effects apart and reach all ends; one where nothing varies."""
    if not dimensions:
        return [{}]
    made: list[Point] = [{d.name: d.at(0.5) for d in dimensions}]
    for turn in (0, 1):
        ends = {d.name: (d.low, d.high)[(turn + i) % 2] for i, d in enumerate(dimensions)}
        made.append({d.name: d.tidy(ends[d.name]) for d in dimensions})
    return made


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of the places 0 ... count - 1, evenly apart, both ends among them."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))


def _weights(model: Model | None) -> int:
    network = getattr(model, "network", None)
    return 0 if network is None else sum(weight.numel() for weight in network.parameters())


def _word(codecs: object) -> str:
    return codecs if isinstance(codecs, str) else json.dumps(codecs, sort_keys=True)


def smallest(space: Space, retriever: Model, ranker: Model | None) -> tuple[int, str]:
    """(bytes, words) of the codecs that make the tables smallest."""
    told, total = [], 0
    for name, model in (("retriever_codec", retriever), ("ranker_codec", ranker)):
        dimension = space.dimensions.get(name)
        values = ("f32",) if dimension is None else tuple(str(choice) for choice in dimension.choices)
        sizes = {value: packing.coded_bytes(model, codec_named(value).text) for value in values}
        best = min(sizes, key=lambda value: sizes[value])
        total += sizes[best]
        told += [f"{name}={best}"] if model is not None else []
    return total, " ".join(told)

"""Plans as points: which space there is for two models, and what a packed plan is worth.

Everything here runs in a trial: the bundle is built in a scratch folder, asked for the validation
users' items, and timed one user at a time on their real histories.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from recray import config, evaluation
from recray.bundles.build import build
from recray.bundles.bundle import Bundle
from recray.bundles.plan import Codecs, Plan, choices, codec_of
from recray.compression.codec import codec_named
from recray.data.dataset import Cases, Dataset, open_dataset
from recray.manifest import Artefact, open_artefact
from recray.models.base import Model, Ranker, Retriever
from recray.models.embeddings import Table
from recray.storage import scratch
from recray.tuning.latency import Effort, Measurement, measure, slot
from recray.tuning.probe import measured_here
from recray.tuning.race import raced
from recray.tuning.space import Dimension, Point, Scalar, Space
from recray.tuning.trial import Outcome

VARIES = {  # what varies of each index, on a log scale; no two have a parameter of one name
    "hnsw": {"links": (8, 48), "ef_search": (16, 256)},
    "ivf": {"probes": (4, 128), "refine": (1, 8)},
}
USED_BY = {name: index for index, ranges in VARIES.items() for name in ranges}
CANDIDATES = (20, 400)
ASKED = 500  # histories that are timed in turn
K = 10
PART_USERS, PART_SECONDS = 500, 0.5  # of a part


def plan_space(retriever: Retriever, ranker: Ranker | None) -> Space | None:
    """All that may vary of a plan for these models; None where nothing may."""
    dimensions = [
        Dimension(name, "choice", choices=values)
        for name, values in choices(retriever, ranker).items()
        if len(values) > 1
    ]
    indexes = next((d.choices for d in dimensions if d.name == "index"), ())
    for index, ranges in VARIES.items():
        if index in indexes:
            dimensions += [Dimension(name, "int", *ends, log=True) for name, ends in ranges.items()]
    most = min(CANDIDATES[1], retriever.n_items)
    if ranker is not None and most > CANDIDATES[0]:
        dimensions.append(Dimension("candidates", "int", CANDIDATES[0], most, log=True))
    if ranker is not None:
        dimensions.append(Dimension("blend", "float", 0.0, 1.0))
    return Space(dimensions) if dimensions else None


def plan_of(point: Mapping[str, Scalar]) -> Plan:
    """The plan that a point means; what it does not name is as in `Plan()`."""
    fields: dict[str, Any] = {name: value for name, value in point.items() if name not in USED_BY}
    own = {name: point[name] for name in VARIES.get(fields.get("index", ""), ()) if name in point}
    if own:
        fields["index_params"] = own
    return config.build(Plan, fields, where="plan")


def canonical(point: Mapping[str, Scalar]) -> dict[str, Any]:
    """What decides the outcome: the parameters of an index that is not used do not."""
    return config.as_dict(plan_of(point))


def tidy(point: Mapping[str, Scalar], usual: Mapping[str, Scalar]) -> Point:
    """The same plan, with the parameters of an index that is not used as they are in `usual`."""
    idle = {name for name, index in USED_BY.items() if point.get("index") != index}
    return {name: usual[name] if name in idle else value for name, value in point.items()}


def first_points(space: Space, base: Plan | None = None) -> list[Point]:
    """Nothing compressed (the reference: `base`, by default as plans come), then an expert's guess."""
    plain = config.as_dict(base or Plan())
    wished = {"retriever_codec": "int8", "ranker_codec": "int8"}
    wished |= {"encoder_graph": "onnx-int8", "ranker_graph": "onnx-int8", "index": "exact"}
    usual: Point = {name: plain.get(name, int(d.low)) for name, d in space.dimensions.items()}
    return [usual, {name: wished.get(name, value) for name, value in usual.items()}]


def table_bytes(point: Mapping[str, Scalar], retriever: Model | None, ranker: Model | None) -> int:
    """The bytes of the encoded tables, which a plan's bundle cannot go below; known without building."""
    plan = plan_of(point)
    return coded_bytes(retriever, plan.retriever_codec) + coded_bytes(ranker, plan.ranker_codec)


def coded_bytes(model: Model | None, codecs: Codecs) -> int:
    """Bytes of a model's tables, stored so; 0 without a model."""
    if model is None:
        return 0
    tables = {name: cast(Table, table) for name, table in model.tables.items()}
    return sum(
        codec_named(codec_of(codecs, name)).bytes_of(table.num_rows, table.dim)
        for name, table in tables.items()
    )


@dataclass(frozen=True, kw_only=True)
class PlanTrial:
    """The objective of `search_compress`: point -> quality per user, latency, bytes. Travels by value.

    pieces: a folder of the driver's machine where encoded tables, graphs and indexes are kept between trials,
    named by what they hold. A worker on another machine, where it is not, encodes every time.
    part: not a trial, but a part to be put together with others: timed shortly and in this process.

    Called with a point and maybe a rival's value for each user, see `race.py`. A plan that is beaten by it is
    not asked for the other users (`detail["raced"]` says by how many it was), and timed shortly.
    """

    retriever: str
    ranker: str | None
    dataset: str
    metric: str
    users: int
    seed: int
    effort: Effort = field(default_factory=Effort)
    pieces: Path | None = None
    part: bool = False

    def settings(self) -> dict[str, Any]:
        """What of this decides the outcome of a trial, beside the inputs' hashes."""
        told = {"metric": self.metric, "users": self.users, "seed": self.seed, "effort": asdict(self.effort)}
        return {**told, "part": True} if self.part else {**told, "users in": "random order"}

    def as_part(self) -> PlanTrial:
        """The same with fewer users and a short timing."""
        effort = Effort(least=200, most=2000, seconds=PART_SECONDS, warmup=20, threads=self.effort.threads)
        return replace(self, part=True, users=min(self.users, PART_USERS), effort=effort)

    def __call__(self, point: Point, rival: Sequence[float] | None = None) -> Outcome:
        with scratch() as folder, ExitStack() as stack:
            stack.enter_context(_threads(self.effort.threads if self.part else None))
            shared = stack.enter_context(ExitStack())
            shared.enter_context(slot(shared=True))
            data, cases = _asked(self.dataset, self.users, self.seed)
            retriever, ranker = _checkpoints(self.retriever, self.ranker)
            plan = plan_of(point)
            pieces = self._pieces()
            bundle = build(folder / "bundle", retriever, ranker, data, plan, pieces=pieces)
            top_k, k = evaluation.recommender_top_k(bundle.recommender), int(self.metric.split("@")[1])

            def ask(rows: NDArray[np.int64]) -> NDArray[np.float64]:
                return evaluation.evaluate(top_k, cases.take(rows), ks=(k,)).values[self.metric]

            values = raced(ask, len(cases), rival)
            let_go = rival is not None and len(values) < len(cases)
            requests = folder / "requests.json"
            requests.write_text(json.dumps(_requests(data, cases)))
            shared.close()  # the shared slot: measuring takes it alone
            found = self._timed(bundle, str(requests), short=let_go)
            quality = float(values.mean())
            if let_go and rival is not None and (beside := float(np.mean(rival[: len(values)]))) > 0:
                quality *= float(np.mean(rival)) / beside  # what all users would have said, by the rival's
            return Outcome(
                {
                    self.metric: quality,
                    "p50": found.p50,
                    "p99": found.p99,
                    "mean": found.mean,
                    "bytes": float(bundle.model_bytes),
                },
                {
                    "plan": config.as_dict(plan),
                    "latency": asdict(found),
                    "bytes": dict(bundle.artefact.manifest.report["bytes"]),
                    **(
                        {"raced": len(values)} if let_go else {"values": [round(float(v), 6) for v in values]}
                    ),
                },
            )

    def _timed(self, bundle: Bundle, requests: str, *, short: bool) -> Measurement:
        if self.part:
            with slot():
                return Measurement(**measured_here(bundle, requests, K, self.effort))
        arguments = {"bundle": bundle.artefact.place.uri, "requests": requests, "k": K}
        effort = replace(self.effort, seconds=self.effort.seconds / 4) if short else self.effort
        return measure("recray.tuning.probe:bundle_requests", arguments, effort)

    def _pieces(self) -> Path | None:
        return self.pieces if self.pieces is not None and self.pieces.is_dir() else None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads of torch, and of graphs that are opened in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=2)  # of trials and of parts
def _asked(dataset: str, users: int, seed: int) -> tuple[Dataset, Cases]:
    """The dataset and at most `users` of its validation cases, the same ones for the same seed."""
    data = open_dataset(dataset)
    cases = data.cases("valid")
    some = np.random.default_rng(seed).permutation(len(cases))[:users]
    return data, cases.take(some)  # the first of them are as random as all


@lru_cache(maxsize=1)
def _checkpoints(retriever: str, ranker: str | None) -> tuple[Artefact, Artefact | None]:
    behind = None if ranker is None else open_artefact(ranker, "checkpoint")
    return open_artefact(retriever, "checkpoint"), behind


def _requests(data: Dataset, cases: Cases) -> list[dict[str, Any]]:
    """What users of the cases would send: their own histories, and the context of their next item."""
    made = []
    for b in range(min(ASKED, len(cases))):
        context = {c: data.context_values[c][int(rows[b])] for c, rows in cases.context.items() if rows[b]}
        history = [data.items.id_of(int(row)) for row in cases.histories[b]]
        made.append({"history": history, "context": context})
    return made

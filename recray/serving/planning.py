"""Before a graph starts: models in the ingress replica (fused), or a replica kind each (split)? Arithmetic.

A request costs its ingress r seconds of a core and stage s its i_s, and a batch of b requests costs c_s a
stage; split, each stage is a hop of h more a batch. On n cores of a node, m bytes of memory, N nodes:

    fused   cpu = r + sum (i_s + c_s / b)          replicas = N min(n, m / (P + G sum bytes_s))
    split   cpu = r + sum (i_s + (h + c_s) / b)    replicas of s = N min(n, m / sum (P + G bytes_s))

where P is what a process takes before it holds a model, and G how many generations it holds while one is
shipped: the one that answers, the one before and the next. A replica keeps about one core busy, so a layout
answers min(N n, processes) / cpu requests a second. Fused is chosen unless it does not fit, fewer
replicas of it fit than make up for the hops, or the stages ask for different hardware.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recray.errors import ArtefactError, ConfigError, InputError
from recray.manifest import Artefact
from recray.serving.settings import Batch, Layout

if TYPE_CHECKING:
    from recray.bundles.bundle import Bundle

Chosen = Literal["fused", "split"]
PROCESS = 4 * (1 << 30) // 10  # bytes of Python, torch and Ray in a replica before it holds a model
GENERATIONS = 3  # that a replica holds at a time, at most; see `generations.State.resident`
HISTORY, CANDIDATES = 50, 200  # items of each, where bytes on the way are reckoned
CLIENTS = 64  # that ask at a time, where nothing else is said
TOGETHER = 16  # requests in the batch whose time is measured
REPEATS = 9  # of which the median counts
TABLE = "retriever/tables/item.safetensors"  # of a bundle


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """One stage: bytes of one generation, seconds of a core a request and a batch, and where it runs."""

    name: str
    bytes: int
    item_s: float
    call_s: float = 0.0
    device: Literal["cpu", "gpu"] = "cpu"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a node has, and how many there are. Raises ConfigError for what no machine has."""

    cores: int
    memory: int
    gpus: int = 0
    nodes: int = 1

    def __post_init__(self) -> None:
        if min(self.cores, self.memory, self.nodes) < 1 or self.gpus < 0:
            raise ConfigError(f"no machine has {self.cores} cores, {self.memory} bytes, {self.nodes} nodes")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of a core: the HTTP side of a request, and a call of another deployment with its way back."""

    request_s: float
    hop_s: float


COSTS: Mapping[str, Costs] = {  # of a profile; measured on two cores of an AMD Zen 5 server
    "lite": Costs(request_s=4.9e-3, hop_s=6.5e-3),
    "fast": Costs(request_s=0.6e-3, hop_s=3.6e-3),
}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One layout on this machine; rps is 0 where it does not fit."""

    hops: int  # a batch
    bytes: int  # between processes, a request
    replicas: int  # of the ingress (fused), of each stage (split)
    batch: float  # requests that go together under `clients`
    cpu_s: float  # a request
    rps: float


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """What was decided, and why, in words."""

    layout: Chosen
    batch: Batch
    replicas: int
    reason: str
    clients: int
    expected: Mapping[Chosen, Expected] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        told = {name: dict(vars(one)) for name, one in self.expected.items()}
        return {**vars(self), "batch": dict(vars(self.batch)), "expected": told}


def make_plan(
    loads: Sequence[StageLoad],
    machine: Machine,
    costs: Costs = COSTS["lite"],
    *,
    layout: Layout = "auto",
    batch: Batch | None = None,
    clients: int = CLIENTS,
) -> ServePlan:
    """Choose a layout; `layout` and `batch` overrule. Raises ConfigError where nothing fits a node."""
    asked = batch or Batch(in_flight=max(2, _split_replicas(loads, machine)))
    expected: dict[Chosen, Expected] = {
        "fused": _fused(loads, machine, costs, asked, clients),
        "split": _split(loads, machine, costs, asked, clients),
    }
    fused, split = expected["fused"], expected["split"]
    chosen, reason = _chosen(loads, fused, split, machine)
    if layout != "auto":
        chosen, reason = layout, f"{layout} was asked for"
    if not expected[chosen].replicas:
        sizes = ", ".join(f"{load.name} {GENERATIONS} x {load.bytes:,}" for load in loads)
        raise ConfigError(
            f"does not fit into {machine.memory:,} bytes of memory ({sizes} bytes while one is shipped)",
            where=f"layout {chosen}",
            fix="compress the bundle, or serve it on larger nodes",
        )
    return ServePlan(
        layout=chosen,
        batch=asked,
        replicas=expected[chosen].replicas,
        reason=reason,
        clients=clients,
        expected=expected,
    )


def _chosen(
    loads: Sequence[StageLoad], fused: Expected, split: Expected, machine: Machine
) -> tuple[Chosen, str]:
    devices = {load.device for load in loads}
    if len(devices) > 1 and machine.gpus and split.replicas:
        wants = next(load.name for load in loads if load.device == "gpu")
        return "split", f"the {wants} runs on a GPU and the rest does not"
    if not fused.replicas:
        return "split", "all stages together do not fit into one node's memory"
    if split.rps > fused.rps:
        return "split", (
            f"only {fused.replicas} replicas with all stages fit into memory: "
            f"{fused.rps:,.0f} requests/s against {split.rps:,.0f}"
        )
    return "fused", (
        f"no hop between the stages: {fused.rps:,.0f} requests/s against {split.rps:,.0f} with "
        f"{split.hops} hops a batch"
    )


def _fused(
    loads: Sequence[StageLoad], machine: Machine, costs: Costs, batch: Batch, clients: int
) -> Expected:
    fit = machine.memory // (PROCESS + sum(GENERATIONS * load.bytes for load in loads))
    replicas = machine.nodes * min(machine.cores, fit)
    together = _together(batch, clients, max(replicas, 1))
    cpu = costs.request_s + sum(load.item_s + load.call_s / together for load in loads)
    return Expected(
        hops=0, bytes=0, replicas=replicas, batch=together, cpu_s=cpu, rps=replicas / cpu if replicas else 0.0
    )


def _split(
    loads: Sequence[StageLoad], machine: Machine, costs: Costs, batch: Batch, clients: int
) -> Expected:
    replicas = _split_replicas(loads, machine)
    together = _together(batch, clients, batch.in_flight)
    cpu = costs.request_s + sum(load.item_s + (costs.hop_s + load.call_s) / together for load in loads)
    busy = min(machine.nodes * machine.cores, replicas * (len(loads) + 1))
    return Expected(
        hops=len(loads),
        bytes=_bytes(len(loads)),
        replicas=replicas,
        batch=together,
        cpu_s=cpu,
        rps=busy / cpu if replicas else 0.0,
    )


def _split_replicas(loads: Sequence[StageLoad], machine: Machine) -> int:
    """Replicas of each stage that fit beside those of the others and an ingress; on several nodes a stage
    each may do."""
    fit = machine.memory // (PROCESS * (len(loads) + 1) + sum(GENERATIONS * load.bytes for load in loads))
    spread = machine.nodes > 1 and all(
        2 * PROCESS + GENERATIONS * load.bytes <= machine.memory for load in loads
    )
    return machine.nodes * min(machine.cores, fit) or int(spread)


def _together(batch: Batch, clients: int, ways: int) -> float:
    """Requests in a batch when `clients` wait and `ways` batches are under way."""
    return max(1.0, min(float(batch.size), clients / ways))


def _bytes(hops: int) -> int:
    """What a request sends between processes: histories as rows there, rows and scores both ways."""
    asked, pair = 4 * HISTORY, 8
    retrieve = 2 * asked + pair * CANDIDATES
    return retrieve if hops < 2 else retrieve + asked + pair * CANDIDATES + pair * 10


def loads_of(artefact: Artefact) -> list[StageLoad]:
    """The stages of a bundle, from its manifest and the header of its table: bytes in memory, and times
    reckoned from the sizes (2 dots a ns; 0.2 ms to encode a history; 2 us a ranked candidate) until they are
    measured.

    The table of items counts once, coded, and beside it float32 copies of its N x D however few its bits:
    the index's, and two (vectors of length 1, and the index over them) from the first `/similar` on; one more
    of a model whose vectors are not the table. An index in bfloat16 or codes takes less. The retriever's
    other files count three times, unpacked, and a ranker's twice. Raises ArtefactError.
    """
    sizes = {"retriever": 0, "ranker": 0}
    for name, entry in artefact.manifest.files.items():
        part = "ranker" if name.startswith("ranker/") else "retriever"
        sizes[part] += int(entry["bytes"])
    plan = artefact.manifest.recipe["plan"]
    scanned = sizes["retriever"] / 4 if plan["index"] == "exact" else 0.0
    item_s = 2e-4 + scanned / 8e9
    held = 3 * sizes["retriever"]
    if TABLE in artefact.manifest.files:  # else nothing has vectors
        held += _copies(artefact) - 2 * int(artefact.manifest.files[TABLE]["bytes"])
    made = [StageLoad(name="retriever", bytes=held, item_s=item_s, call_s=1e-3)]
    if sizes["ranker"]:
        item_s = 1e-4 + 2e-6 * int(plan["candidates"])
        made.append(StageLoad(name="ranker", bytes=2 * sizes["ranker"], item_s=item_s, call_s=1e-3))
    return made


def _copies(artefact: Artefact) -> int:
    """Bytes of the decoded copies of the item table that a replica holds, at most."""
    from recray.models import model_class
    from recray.models.base import Retriever

    at = artefact.file(TABLE)
    try:
        with at.open() as file:  # safetensors: the length of a JSON header, and the header
            about = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
        cells = int(about["rows"]) * int(about["dim"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtefactError(f"is not an encoded table ({error})", where=at) from None
    cls = model_class(artefact.manifest.recipe["models"]["retriever"])
    own = getattr(cls, "item_vectors", None) is not Retriever.item_vectors
    return 4 * cells * (3 + own)


def measured(bundle: Bundle) -> list[StageLoad]:
    """The same with times measured here, on one thread, from users of the bundle asking alone and TOGETHER
    at a time. The memory stays what the manifest says."""
    import torch

    from recray.serving import stages

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"retriever": [], "ranker": []}
    try:
        for size in (1, TOGETHER):
            users = [at for at in range(len(bundle.users)) if len(bundle.histories[at])][:size]
            asked = [bundle.request(user=bundle.users.id_of(at)) for at in users] or [bundle.request()]
            requests = [asked[n % len(asked)] for n in range(size)]
            batch = stages.to_retrieve(requests, bundle.plan.candidates)
            kept = stages.retrieve(bundle, batch)
            _, ranked = stages.to_rank(requests, batch, kept)
            found["retriever"].append(_seconds(stages.retrieve, bundle, batch))
            if ranked.wants and bundle.recommender.ranker is not None:
                found["ranker"].append(_seconds(stages.rank, bundle, ranked))
    finally:
        torch.set_num_threads(threads)
    made = []
    for load in loads_of(bundle.artefact):
        if len(found[load.name]) == 2:
            alone, together = found[load.name]
            item_s = max((together - alone) / (TOGETHER - 1), together / TOGETHER / 2)
            load = dataclasses.replace(load, item_s=item_s, call_s=max(0.0, alone - item_s))
        made.append(load)
    return made


def _seconds(work: Callable[..., object], *asked: object) -> float:
    took = []
    for _ in range(2 + REPEATS):
        start = time.perf_counter()
        work(*asked)
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:])


def told(where: str | os.PathLike[str] | None) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """What `recray plan BUNDLE --serve` says, as lines and as data: for each profile the plan on this
    machine, with the bundle's own times. Raises InputError without a bundle."""
    from recray.bundles.bundle import open_bundle

    if where is None:
        raise InputError("no bundle is given", where="plan --serve", fix="recray plan BUNDLE --serve")
    loads, machine = measured(open_bundle(where, threads=1)), this_machine()
    lines = [
        (load.name, f"{load.item_s * 1e3:.3f} ms a request and {load.call_s * 1e3:.3f} ms a batch, measured")
        for load in loads
    ]
    data: dict[str, Any] = {"stages": [dict(vars(load)) for load in loads], "machine": dict(vars(machine))}
    for profile, costs in COSTS.items():
        plan = make_plan(loads, machine, costs)
        lines += [(f"{profile}: {name}", words) for name, words in table(plan)]
        data[profile] = plan.as_dict()
    return lines, data


def this_machine() -> Machine:
    """Cores this process may use and memory of this computer, as one node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 1 << 34
    return Machine(cores=cores, memory=memory)


def table(plan: ServePlan) -> list[tuple[str, str]]:
    """(what, words) line by line: the choice, then hops, bytes and expected rps of both layouts."""
    lines = [("layout", f"{plan.layout}: {plan.reason}")]
    for name, one in plan.expected.items():
        words = "does not fit"
        if one.replicas:
            words = (
                f"{one.hops} hops a batch, {one.bytes:,} bytes a request between processes, "
                f"{one.replicas} replica{'s' * (one.replicas > 1)}, {one.cpu_s * 1e3:.2f} ms of a core a "
                f"request, {math.floor(one.rps):,} requests/s"
            )
        lines.append((name, words))
    together = plan.expected[plan.layout].batch
    lines.append(("batch", f"at most {plan.batch.size}; {together:.0f} together with {plan.clients} clients"))
    return lines

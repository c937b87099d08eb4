"""What is counted while serving: the names, and one process's counts, which only grow.

Nothing here speaks to anybody. Counting is an addition in memory; now and then somebody collects what has
been counted (`on_ray/metrics.py` hands it to Ray's own metrics, which Prometheus scrapes on every node).
A label is a word of ours, a generation or a number of a bucket: never an id of a user, an item or a request.

A histogram of upper edges e_1 < .. < e_n is told as Prometheus has it, in counters: NAME_bucket{le="e_i"}
how many values were at most e_i, NAME_sum and NAME_count.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from recray.money import Price

if TYPE_CHECKING:
    from recray.serving.router import Router

Kind = Literal["counter", "gauge", "histogram"]
PREFIX = "ray_recray_"  # Ray puts ray_ before each name
TOTAL = "_total"  # and Prometheus this behind each counter's
MOST = (
    100  # values of a label of one metric; those that come then are OTHER, since Ray never lets a series go
)
OTHER = "other"
NAME = 12  # letters of a generation: the bundle's, since new items would make ever more names
EVENTS = ("view", "click", "cart", "buy", "return")  # kinds of events that are told apart
MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)


@dataclass(frozen=True)
class Metric:
    """One name: what it counts, its labels in order, and the upper edges of a histogram."""

    kind: Kind
    about: str
    labels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "answers": Metric("counter", "Answered requests for recommendations", ("generation",)),
    "degraded": Metric("counter", "Reasons why answers were less than asked for", ("generation", "reason")),
    "refused": Metric("counter", "Requests that got no answer, by the code of the error", ("code",)),
    "ms": Metric("histogram", "Milliseconds of an answer, by stage", ("generation", "stage"), MS),
    "batch": Metric(
        "histogram", "Requests answered together", ("generation",), (1, 2, 4, 8, 16, 32, 64, 128)
    ),
    "batches": Metric("counter", "Batches that a replica passed on or computed"),
    "batched": Metric("counter", "Requests in them"),
    "busy_seconds": Metric("counter", "Seconds that they took; a second of two at a time is two"),
    "waiting": Metric("gauge", "Requests that wait for a place in a batch"),
    "cache": Metric("counter", "Look-ups in a cache: hit or miss", ("cache", "outcome")),
    "acted": Metric("counter", "Answers that events named by their request_id", ("generation",)),
    "events": Metric(
        "counter", "Events of items that an answer showed, by kind", ("generation", "event")
    ),
    "version": Metric("gauge", "Steps of the pointer to the generation that answers"),
    "canary_share": Metric("gauge", "Share of the users whom a canary answers"),
    "cpu_seconds": Metric("counter", "Seconds of a core that replicas used"),
    "memory_bytes": Metric("gauge", "Memory that a replica holds"),
    "price_core_second": Metric("gauge", "Price of one second of a core, as it was stated"),
    "price_byte_second": Metric("gauge", "Price of one byte of memory for a second"),
}  # fmt: skip


def exported() -> set[str]:
    """Every name that Prometheus sees."""
    made = set()
    for name, metric in METRICS.items():
        if metric.kind == "histogram":
            made |= {f"{PREFIX}{name}_{part}{TOTAL}" for part in ("bucket", "sum", "count")}
        else:
            made.add(f"{PREFIX}{name}{TOTAL if metric.kind == 'counter' else ''}")
    return made


class Sample(NamedTuple):
    """What one series has to tell: of a counter its growth since it was collected last, else its value."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: dict[str, str]
    value: float


class Meter:
    """The counts of one process. One thread owns it."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, tuple[str, ...]], float] = {}
        self._series: dict[tuple[str, tuple[str, ...]], _Series] = {}
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}
        self._words: dict[tuple[str, int], set[str]] = {}  # of each label of a metric

    def count(self, name: str, *labels: str, by: float = 1.0) -> None:
        """Add to a counter."""
        key = (name, labels)
        held = self._numbers.get(key)
        if held is None:
            key = self._bounded(name, labels)
            held = self._numbers.get(key, 0.0)
        self._numbers[key] = held + by

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge, or a counter that somebody else counts, to what it is now."""
        self._numbers[name, labels] = value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add one value to a histogram."""
        found = self._series.get((name, labels))
        if found is None:
            found = self._series.setdefault(self._bounded(name, labels), _Series(METRICS[name].edges))
        found.counts[bisect_left(found.edges, value)] += 1
        found.sum += value

    def collect(self) -> Iterator[Sample]:
        """What has changed since the last time."""
        now = dict(self._numbers)
        for (name, labels), series in self._series.items():
            now |= {(part, (*labels, *le)): value for part, le, value in series.parts(name)}
        for (name, labels), value in now.items():
            metric = METRICS.get(name) or METRICS[name.rpartition("_")[0]]
            told = dict(zip((*metric.labels, "le"), labels))
            if metric.kind == "gauge":
                yield Sample(name, "gauge", told, value)
                continue
            grown = value - self._told.get((name, labels), 0.0)
            if grown > 0 or (name, labels) not in self._told:
                self._told[name, labels] = value
                yield Sample(name, "counter", told, grown)

    def _bounded(self, name: str, labels: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
        """The key of a new series: with so many words known of a label, those that come then are one. The
        other labels keep theirs, since alerts ask for them."""
        made = []
        for at, word in enumerate(labels):
            known = self._words.setdefault((name, at), set())
            if len(known) < MOST:
                known.add(word)
            made.append(word if word in known else OTHER)
        return name, tuple(made)


class _Series:
    """How many values lie below each edge and above the last, and their sum."""

    def __init__(self, edges: tuple[float, ...]) -> None:
        self.edges, self.counts, self.sum = edges, [0] * (len(edges) + 1), 0.0

    def parts(self, name: str) -> Iterator[tuple[str, tuple[str, ...], float]]:
        below = 0
        for edge, count in zip((*self.edges, float("inf")), self.counts):
            below += count
            yield f"{name}_bucket", ("+Inf" if edge == float("inf") else f"{float(edge):g}",), below
        yield f"{name}_sum", (), self.sum
        yield f"{name}_count", (), below


def answered(meter: Meter, generation: str, timing_ms: Mapping[str, float], degraded: list[str]) -> None:
    """Count one answer; `timing_ms` is what it tells of itself, by stage."""
    name = generation[:NAME]
    meter.count("answers", name)
    for stage, ms in timing_ms.items():
        meter.observe("ms", ms, name, stage)
    for reason in degraded:
        meter.count("degraded", name, reason)


def acted(meter: Meter, generation: str, kinds: list[str | None], answers: int) -> None:
    """Count the events, by kind, of items that so many answers of a generation have shown."""
    name = generation[:NAME]
    meter.count("acted", name, by=answers)
    for kind in kinds:
        meter.count("events", name, kind if kind in EVENTS else OTHER)


def gathered(meter: Meter, router: Router) -> None:
    """Look at what the generations of an ingress have gathered since the last time, and who answers."""
    waiting = 0
    for name, ingress in router.held.items():
        batches = ingress.layout.batches
        waiting += batches.waiting
        while batches.sizes:  # the newest of them, where there were very many
            meter.observe("batch", batches.sizes.popleft(), name[:NAME])
        if (kept := ingress.answers) is not None:
            meter.count("cache", "answers", "hit", by=kept.hits)
            meter.count("cache", "answers", "miss", by=kept.misses)
            kept.hits = kept.misses = 0
    meter.set("waiting", waiting)
    meter.set("version", router.state.version)
    meter.set("canary_share", router.state.share)


def worked(meter: Meter, sums: Mapping[str, float]) -> None:
    """Set what a replica has done, by the sums of `scaling.Batches`."""
    for name, told in (("batches", "calls"), ("batched", "requests"), ("busy_seconds", "busy_s")):
        meter.set(name, sums[told])


def used(meter: Meter, price: Price) -> None:
    """Set what this process has used, and what that costs."""
    meter.set("cpu_seconds", time.process_time())
    meter.set("memory_bytes", resident_bytes())
    meter.set("price_core_second", price.core_second)
    meter.set("price_byte_second", price.byte_second)


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0

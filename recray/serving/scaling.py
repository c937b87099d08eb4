"""How many replicas of every stage, together, so that 99 of 100 answers come within one target. Arithmetic.

A replica answers what has gathered as one batch: c + i b seconds for b requests, at most `size` of them,
with a squared coefficient of variation v. Requests are spread over replicas with a queue each, which gets x
a second; a = x i and f = c + i size:

    s = max(c + i, c / (1 - a))    the mean batch: what gathers during one is b = x s, and s = c + i b
                                   (Inoue, Performance Evaluation 147, 2021)
    q = (1 + v)(c^2 + 2 c a s + i^2 x s) / (1 - (1 + v) a^2)    its mean square, from the same recursion with
                                   Poisson arrivals; q / s is the mean batch that an arrival meets
    u = min(1, x s)                how often it meets one
    wait = max of q / s (1 - .01 / u)                      what is left of that one, and of
        ln(100 u) (f / size + v s) / (2 (1 - x f / size))  the queue's exponential tail (Kingman, 1962)
    own = n + 2.33 sqrt(v n^2 + i^2 x q / s),  n = c + i x (q / s + sqrt(q - s^2))    its own batch

p99 = MARGIN (wait + own) of each stage, added up: rather too much than too little. Replicas are added where
that sum falls most until it is within the target (marginal analysis; Fox, Operations Research 14, 1966).

`decide` puts that to use over time. More replicas come at once, fewer only after `calm_s` in which every
look said that so many would do for HEADROOM times the load; so a step of the load turns it at most once.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from recray.serving.planning import COSTS
from recray.serving.profiles import MARK
from recray.serving.settings import Batch, GraphArgs

MARGIN = 1.25  # p99 of simulated queues lies up to so much above the formula, where v is small
LIMIT = 0.8  # of the requests that a replica can answer in full batches, at most
HEADROOM = 1.3  # times the load that fewer replicas must stand
NEAR = 1.25  # times the p99 of as many replicas as there may be: enough where even those miss the target
FORGET_S = 60.0  # after which a measured batch counts for a third
SAMPLE = 8  # batches without which nothing is known of a part
COUNTERS = ("calls", "requests", "busy_s", "requests2", "busy2", "both", "door_s")
Counts = dict[str, int]
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one part of a replica takes for a batch: call_s + item_s * requests, give or take."""

    call_s: float
    item_s: float
    spread: float = 0.0  # squared coefficient of variation around that
    size: int = 1  # requests in a batch, at most

    @property
    def rate(self) -> float:
        """Requests a second in full batches."""
        return self.size / (self.call_s + self.item_s * self.size)

    def p99_s(self, rate: float) -> float:
        """Seconds for 99 of 100 requests where `rate` come a second; infinite where they are too many."""
        if rate >= self.rate:
            return math.inf
        c, i, v = self.call_s, self.item_s, self.spread
        alone, full, grows = c + i, c + i * self.size, rate * i
        mean = min(full, max(alone, c / (1 - grows))) if grows < 1 else full
        left = 1 - (1 + v) * grows**2
        square = (1 + v) * (c * c + 2 * c * grows * mean + i * grows * mean) / left if left > 0 else math.inf
        square = max(square, (1 + v) * alone**2)
        met, found, wait = min(square / mean, (1 + v) * full), min(1.0, rate * mean), 0.0
        if found > 0.01:
            tail = math.log(100 * found) * (full / self.size + v * mean) / 2
            wait = max(met * (1 - 0.01 / found), tail / (1 - rate / self.rate))
        apart = math.sqrt(max(0.0, square - mean * mean))
        own = min(full, max(mean, c + grows * (met + apart)))
        others = min(self.size - 1.0, rate * met)
        return MARGIN * (wait + own + 2.33 * math.sqrt(v * own**2 + i * i * others))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The replicas of one deployment: the parts that each request passes there, and how many there may be."""

    works: tuple[Work, ...] = ()
    least: int = 1
    most: int = 1

    def p99_s(self, rate: float, count: int) -> float:
        """Of all parts, `rate` requests a second spread over `count` replicas."""
        return sum(work.p99_s(rate / count) for work in self.works) if count else math.inf

    def enough(self, rate: float) -> int:
        """The fewest replicas that are not overloaded, within bounds."""
        wanted = [rate / (LIMIT * work.rate) for work in self.works] or [float(rate > 0)]
        return max(self.least, min(self.most, math.ceil(max(wanted) - 1e-9)))


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is to be held, and how patiently."""

    target_s: float
    fixed_s: float = 0.0  # of the target that no replica can change: hops between processes
    calm_s: float = 60.0  # how long fewer replicas must have been enough before some go
    drain_s: float = 10.0  # within which a queue that has formed is to be gone


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look: seconds on any clock, requests a second, requests that are under way or wait, and replicas
    of each deployment: as asked for, and as they run."""

    now: float
    rate: float
    ongoing: float
    counts: Mapping[str, int]
    running: Mapping[str, int]


@dataclass(frozen=True)
class Memory:
    """What would have done at the looks of the last `calm_s`, the oldest first."""

    looks: tuple[tuple[float, Counts], ...] = ()


def sized(pools: Mapping[str, Pool], rate: float, target_s: float) -> Counts:
    """The fewest replicas found of each deployment that keep `target_s` at so many requests a second; where
    nothing keeps it, that come near to what all of them would do."""
    counts = {name: pool.enough(rate) for name, pool in pools.items()}
    helped = {name: pool for name, pool in pools.items() if pool.p99_s(rate, pool.most) < math.inf}
    goal = max(target_s, NEAR * sum(pool.p99_s(rate, pool.most) for pool in helped.values()))
    while True:
        took = {name: pool.p99_s(rate, counts[name]) for name, pool in helped.items() if counts[name]}
        falls = {
            name: took[name] - helped[name].p99_s(rate, counts[name] + 1)
            for name in took
            if counts[name] < helped[name].most
        }
        if sum(took.values()) <= goal or not falls:
            return counts
        counts[max(falls, key=lambda name: falls[name])] += 1


def decide(pools: Mapping[str, Pool], aim: Aim, seen: Seen, memory: Memory) -> tuple[Counts, Memory]:
    """How many replicas to ask for from now on, and what to remember until the next look."""
    target_s = max(aim.target_s - aim.fixed_s, aim.target_s / 10)
    there = all(seen.running.get(name, 0) >= seen.counts[name] for name in pools)
    # what has gathered while replicas were starting is theirs to answer: it counts when they are there
    queue = max(0.0, seen.ongoing - seen.rate * aim.target_s) if there else 0.0
    needed = sized(pools, seen.rate + queue / aim.drain_s, target_s)
    if all(pool.least == 0 for pool in pools.values()) and not seen.rate and seen.ongoing < 0.5:
        enough = dict.fromkeys(pools, 0)
    else:
        enough = {name: max(1, n) for name, n in sized(pools, HEADROOM * seen.rate, target_s).items()}
    kept = [look for look in memory.looks if look[0] > seen.now - aim.calm_s]
    calm = there and len(kept) < len(memory.looks)  # it goes back far enough
    looks = (*memory.looks[-len(kept) - 1 :], (seen.now, enough))
    made = {}
    for name, pool in pools.items():
        have = seen.counts[name]
        low = max(counts.get(name, have) for _, counts in looks)
        want = max(have, needed[name]) if needed[name] > have or not calm else min(have, low)
        made[name] = max(pool.least, min(pool.most, want))
    return made, Memory(looks)


@dataclass
class Sums:
    """Batches of one part, older ones counting less; its cost a batch and a request by least squares."""

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    at: float = -math.inf

    def add(self, more: Mapping[str, float], at: float) -> None:
        """Add what one replica counted until `at`."""
        kept = math.exp(min(0.0, self.at - at) / FORGET_S)
        self.at = max(self.at, at)
        for name, value in more.items():
            self.sums[name] = self.sums[name] * kept + value

    def work(self, size: int) -> Work | None:
        """None where too few batches were seen. Where all had about the same size, half of the time of one
        is taken to be the batch's and half its requests'."""
        calls = self.sums["calls"]
        if calls < SAMPLE:
            return None
        b, s = self.sums["requests"] / calls, max(self.sums["busy_s"] / calls, 1e-6)
        b = max(b, 1.0)
        var_b = self.sums["requests2"] / calls - b * b
        cov = self.sums["both"] / calls - b * s
        slope = cov / var_b if var_b > 0.05 * b * b else s / b / 2
        item = min(max(slope, 0.05 * s / b), s / b)
        left = self.sums["busy2"] / calls - s * s - 2 * item * cov + item * item * max(var_b, 0.0)
        spread = min(max(left / (s * s), 0.0), 4.0)
        return Work(call_s=max(s - item * b, 0.0), item_s=item, spread=spread, size=size)

    def door(self, requests: float) -> Work | None:
        """What the HTTP side took a request, all on one thread after the other."""
        if requests < SAMPLE or self.sums["door_s"] <= 0:
            return None
        return Work(call_s=0.0, item_s=self.sums["door_s"] / requests, spread=1.0)


class Batches:
    """Counts the batches of one replica; any thread may add. `told` is what it says of them."""

    def __init__(self, told: Mapping[str, float] | None = None) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0.0)
        self._told = told

    @classmethod
    def of(cls, args: GraphArgs, hops: int = 0) -> Batches:
        """For a replica that serves by `args` and passes each batch on `hops` times."""
        if args.p99_ms is None:
            return cls()
        hop_s = COSTS["fast" if os.environ.get(MARK) == "1" else "lite"].hop_s
        size = (args.batch or Batch()).size
        return cls({"size": size, "target_ms": args.p99_ms, "fixed_ms": 1e3 * hops * hop_s})

    def add(self, requests: int, seconds: float) -> None:
        """One batch, and how long it took."""
        with self._lock:
            counts = self._counts
            counts["calls"] += 1
            counts["requests"] += requests
            counts["busy_s"] += seconds
            counts["requests2"] += requests * requests
            counts["busy2"] += seconds * seconds
            counts["both"] += requests * seconds

    def timed(self, requests: int, work: Callable[..., Made], *asked: object) -> Made:
        """`work(*asked)`, counted."""
        start = time.perf_counter()
        made = work(*asked)
        self.add(requests, time.perf_counter() - start)
        return made

    def sums(self) -> dict[str, float]:
        """Since the start, by the names of COUNTERS."""
        with self._lock:
            return dict(self._counts)

    def told(self) -> dict[str, float]:
        """Sums since the start by the names of COUNTERS, and what is fixed; nothing where nobody asks."""
        if self._told is None:
            return {}
        with self._lock:
            return {**self._told, **self._counts, "door_s": door_seconds()}


class Counted:
    """A replica that tells what it counted; Ray Serve asks by this name."""

    batches: Batches

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `Batches.told` says."""
        return self.batches.told()


def door_seconds() -> float:
    """Seconds of a core that this process's threads took, without those of ours that run and load models."""
    taken = 0.0
    for thread in threading.enumerate():
        if thread.ident is None or thread.name.startswith("recray-"):
            continue
        try:
            taken += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        except (OSError, AttributeError):  # it ended just now; or no Linux
            continue
    return taken


Series = Mapping[str, Sequence[tuple[float, float]]]
"""A counter's name -> (seconds since 1970, its value), the newest last."""


class Watch:
    """What all replicas of an application reported, as pools and a rate."""

    def __init__(self) -> None:
        self._sums: dict[str, Sums] = {}
        self._last: dict[str, tuple[float, dict[str, float]]] = {}
        self._rates: dict[str, dict[str, float]] = {}

    def see(self, deployment: str, replica: str, series: Series) -> None:
        """Take in what one replica counted; what was seen before counts once."""
        lines = [series.get(name, ()) for name in COUNTERS]
        if not all(lines):
            return
        at, newest = lines[0][-1][0], {name: line[-1][1] for name, line in zip(COUNTERS, lines)}
        then, before = self._last.get(replica, (at, newest))
        if at > then:
            more = {name: max(0.0, newest[name] - before[name]) for name in COUNTERS}
            self._sums.setdefault(deployment, Sums()).add(more, at)
        self._last[replica] = (at, newest)
        first, last = series["requests"][0], series["requests"][-1]
        rate = (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0
        self._rates.setdefault(deployment, {})[replica] = rate

    def keep(self, deployment: str, replicas: Sequence[str]) -> None:
        """Forget the replicas of a deployment that are no more."""
        rates = self._rates.get(deployment, {})
        for gone in set(rates) - set(replicas):
            del rates[gone]
            self._last.pop(gone, None)

    @property
    def rate(self) -> float:
        """Requests a second, as the stage that saw most of them counted."""
        return max((sum(rates.values()) for rates in self._rates.values()), default=0.0)

    def works(self, deployment: str, size: int) -> tuple[Work, ...]:
        """The parts of a deployment that are known by now."""
        sums = self._sums.get(deployment)
        if sums is None:
            return ()
        requests = sums.sums["requests"] or max(one.sums["requests"] for one in self._sums.values())
        door = sums.door(requests) if deployment == "Ingress" else None
        return tuple(work for work in (door, sums.work(size)) if work is not None)

"""Serving beside what bounds it: the same ingress without a model, a naive graph, a server without Ray.

50k items x 64, a SASRec-size encoder, 200 candidates, JSON over HTTP; load generator and servers share the
machine. The works, by the ranker behind the retriever:

neumf      fused and split by the profile fast, no-op behind the same ingress, naive graph at Ray's
           defaults, bare uvicorn with the same batcher; closed loops, and open loops at 70 % of each peak
dlrm       the same
overload   fused and split with a deadline, asked for twice what they can answer
inside     what one request costs in process, alone and 16 together, by stage
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks._process import Worker
from benchmarks._serving_bundle import bodies, make_bundle
from benchmarks._serving_flood import flood
from benchmarks._serving_load import Load, closed, generator
from benchmarks.rows import Row, main, usable_cores
from recray.bundles.bundle import Bundle
from recray.progress import say

CLIENTS = (1, 16, 64)
LOAD = 0.7  # of the peak, in the open loop


@dataclass(frozen=True)
class Scale:
    """Rounds in which all servers take their turn, and seconds of a turn."""

    rounds: int
    seconds: float
    open_seconds: float
    replicas: int = 1  # of each deployment of ours, and of the no-op


FULL, QUICK = Scale(5, 8, 20), Scale(2, 3, 6)


@dataclass
class Seen:
    """server -> clients -> what each round saw; server -> the open loops."""

    closed: dict[str, dict[int, list[Load]]] = field(default_factory=dict)
    open: dict[str, list[Load]] = field(default_factory=dict)

    def rps(self, server: str, clients: int) -> float:
        return statistics.median(load.rps for load in self.closed[server][clients])

    def p50(self, server: str, clients: int) -> float:
        return statistics.median(load.p50_ms for load in self.closed[server][clients])

    def peak(self, server: str) -> float:
        return max(self.rps(server, clients) for clients in self.closed[server])

    def tail(self, server: str) -> float:
        """p99 over p50 at LOAD."""
        return statistics.median(load.p99_ms / load.p50_ms for load in self.open[server])

    def given(self, server: str, clients: int) -> dict[str, object]:
        """What else held."""
        loads = self.closed[server][clients]
        return {
            "clients": clients, "p50_ms": round(self.p50(server, clients), 2),
            "p99_ms": round(statistics.median(load.p99_ms for load in loads), 2),
            "errors": sum(load.errors for load in loads), "rounds": [round(load.rps, 1) for load in loads],
            "generator": generator(), "cores": usable_cores(),
        }  # fmt: skip


def neumf(quick: bool) -> Iterator[Row]:
    """Behind a NeuMF."""
    return layouts("neumf", QUICK if quick else FULL)


def dlrm(quick: bool) -> Iterator[Row]:
    """Behind a DLRM."""
    return layouts("dlrm", QUICK if quick else FULL)


def inside(quick: bool) -> Iterator[Row]:
    """Without HTTP."""
    from benchmarks._serving_inside import inside_rows

    return inside_rows(quick)


def layouts(ranker: str, scale: Scale) -> Iterator[Row]:
    """Rows of one bundle."""
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        bundle = make_bundle(Path(scratch), ranker)
        yield from _rows(f"50kx64, 200 candidates, {ranker}", measured(bundle, scale), scale)


def measured(bundle: Bundle, scale: Scale) -> Seen:
    """Run everything: first all that can stand beside each other, in turn, then the naive graph, which
    needs a cluster without the flags."""
    seen, asked = Seen(), bodies(bundle)
    uri = bundle.artefact.place.uri
    for kinds in (("fast", "uvicorn"), ("naive",)):
        with contextlib.ExitStack() as stack:
            urls: dict[str, str] = {}
            for kind in kinds:
                command = [
                    sys.executable, "-m", "benchmarks._serving_servers", kind, uri, str(scale.replicas)
                ]  # fmt: skip
                urls |= stack.enter_context(Worker([command])).ready["urls"]
            _closed(seen, urls, asked, scale)
            for _ in range(3):
                for server in ("noop", "fused", "split"):
                    if server in urls:
                        rate = LOAD * seen.peak(server)
                        came = flood(urls[server], asked, rate, scale.open_seconds)
                        load = Load(came.rps, came.ms(50), came.ms(99), came.asked - len(came.took))
                        seen.open.setdefault(server, []).append(load)
                        _tell(server, f"open at {rate:.0f}/s", load)
    return seen


def _closed(seen: Seen, urls: Mapping[str, str], asked: Sequence[bytes], scale: Scale) -> None:
    for url in urls.values():  # warm-up
        closed(url, asked, 16, min(2.0, scale.seconds))
        time.sleep(0.2)
    for _ in range(scale.rounds):
        for clients in CLIENTS:
            for server, url in urls.items():
                load = closed(url, asked, clients, scale.seconds)
                seen.closed.setdefault(server, {}).setdefault(clients, []).append(load)
                _tell(server, f"{clients} clients", load)


def _tell(server: str, how: str, load: Load) -> None:
    words = f"{load.rps:,.0f} rps, p50 {load.p50_ms:.1f} ms, p99 {load.p99_ms:.1f} ms"
    say(f"  {server}, {how}: {words}" + f", {load.errors} errors" * bool(load.errors))


def _rows(work: str, seen: Seen, scale: Scale) -> Iterator[Row]:
    given: dict[str, object] = {"replicas": scale.replicas}

    def row(ours: str, peer: str, clients: int, least: float, goal: float) -> Row:
        value, beside = seen.rps(ours, clients), seen.rps(peer, clients)
        share = value / beside
        return Row(
            name=f"{ours}, {clients} clients", work=work, metric="rps", value=value, unit="requests/s",
            peer={"noop": "no-op", "naive": "naive-graph"}.get(peer, peer), peer_value=beside,
            given={
                **given, **seen.given(ours, clients), "peer": seen.given(peer, clients), "least": least,
                "goal": goal, "kept": share >= least, "goal_kept": share >= goal,
            },
        )  # fmt: skip

    for clients in CLIENTS:
        yield row("fused", "noop", clients, 0.40, 0.80)
        yield row("split", "noop", clients, 0.18, 0.40)
        yield row("fused", "uvicorn", clients, 0.70, 1.0)
    yield row("fused", "naive", 16, 15, 30)
    yield row("split", "naive", 16, 6, 12)
    p50, beside = seen.p50("fused", 1), seen.p50("noop", 1)
    limits = {"most": 3, "goal": 2, "kept": p50 <= 3 * beside, "goal_kept": p50 <= 2 * beside}
    yield Row(
        name="fused, one client", work=work, metric="p50_ms", value=p50, unit="ms", peer="no-op",
        peer_value=beside, given={**given, "clients": 1, **limits},
    )  # fmt: skip
    for server in ("fused", "split"):
        loads, tail, own = seen.open[server], seen.tail(server), seen.tail("noop")
        yield Row(
            name=f"{server}, p99 over p50 at 70 % of its peak", work=work, metric="p99_ms",
            value=statistics.median(load.p99_ms for load in loads), unit="ms", peer="no-op",
            peer_value=statistics.median(load.p99_ms for load in seen.open["noop"]), ratio=own / tail,
            given={
                **given, "tail": round(tail, 2), "peer_tail": round(own, 2), "most": 1.5,
                "kept": tail <= 1.5 * own, "rps": round(statistics.median(load.rps for load in loads), 1),
                "errors": sum(load.errors for load in loads),
            },
        )  # fmt: skip


def overload(quick: bool) -> Iterator[Row]:
    """More than can be answered."""
    from benchmarks._serving_overload import overload_rows

    return overload_rows(quick)


WORKS: dict[str, Callable[[bool], Iterator[Row]]] = {
    work.__name__: work for work in (inside, neumf, dlrm, overload)
}
LONG = ("dlrm", "overload")  # not in the quick form of all of them


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Requests a second of each layout beside a no-op, a naive graph and uvicorn; --quick leaves out some."""
    for name, rows in WORKS.items():
        if work == name or (work is None and not (quick and name in LONG)):
            yield from rows(quick)


if __name__ == "__main__":
    sys.exit(main("serving", bench, works=tuple(WORKS)))

"""kill -9 of one part after the other, under load: what was lost, for how long nobody answered, and whether
an event that was acknowledged is there, once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._reliability_load import Events, Load
from benchmarks._reliability_site import SPLIT, Cluster, Redis, Site, all_back, site
from recray.bundles.bundle import Bundle
from recray.feedback.store import open_store
from recray.progress import say
from recray.serving import process

STAGES = [f"replica of {name}" for name in SPLIT]
PARTS = (*STAGES, "controller", "proxy", "redis", "worker node")


@dataclass(frozen=True)
class Killed:
    """One kill: requests without a 200 until all was whole again, those under way when it was struck, seconds
    until the next 200, and seconds until two replicas of each ran again."""

    part: str
    lost: int
    under_way: int
    silent_s: float
    whole_s: float
    answered: int


@dataclass(frozen=True)
class Kept:
    """Events that were acknowledged over all kills, those that are gone, and those that are there twice."""

    sent: int
    lost: int
    doubled: int
    retries: int


def killed(
    bundle: Bundle, users: Sequence[str], *, parts: Sequence[str] = PARTS, calm_s: float = 10.0
) -> Iterator[Killed | Kept]:
    """Every part in turn on cluster/local with two workers (on one node of its own without "worker node")."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="recray-kills-")))
        redis = Redis(folder)
        redis.start()
        stack.callback(redis.kill)
        cluster = stack.enter_context(Cluster(2)) if "worker node" in parts else None
        one = stack.enter_context(site(bundle, "split", redis.url, cluster))
        events = Events(one.url, bundle.items.ids_of(range(20)))
        with Load(one.url, users, clients=4, keep=False) as load, events:
            load.wait(20)
            for part, strike in _strikes(one, redis, cluster).items():
                if part in parts:
                    yield _struck(part, strike, one, load, calm_s)
        doubled = 0
        store = open_store(redis.url)
        for start in range(0, len(events.sent), 500):
            some = [body["user"] for body in events.sent[start : start + 500]]
            doubled += sum(len(kept) - 1 for kept in store.histories(some) if len(kept) > 1)
        store.close()
        yield Kept(len(events.sent), events.lost(), doubled, events.retries)


def head_away(bundle: Bundle) -> float:
    """Seconds from kill -9 of the head node until a new cluster answers: a head is started again by whoever
    watches it (here by us, at once), and `recray serve` after it."""
    port = process.check_free("127.0.0.1", 0)
    with Cluster(2) as cluster:
        with _command(bundle, port):
            struck = time.monotonic()
            cluster.kill_head()
        cluster.up()
        with _command(bundle, port):
            return time.monotonic() - struck


@contextlib.contextmanager
def _command(bundle: Bundle, port: int) -> Iterator[None]:
    """`recray serve` for the block, which begins when it answers."""
    words = [sys.executable, "-m", "recray", "serve", bundle.artefact.place.uri, "--port", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait_ready(f"http://127.0.0.1:{port}")
        yield
    finally:
        server.kill()
        server.wait(30)


def _strikes(one: Site, redis: Redis, cluster: Cluster | None) -> Mapping[str, Callable[[], None]]:
    def end(pids: Callable[[], Sequence[int]]) -> Callable[[], None]:
        return lambda: os.kill(pids()[0], signal.SIGKILL)

    def again() -> None:
        redis.kill()
        time.sleep(2)
        redis.start()

    made: dict[str, Callable[[], None]] = {
        label: end(lambda name=name: one.replicas(name))  # type: ignore[misc]
        for label, name in zip(STAGES, SPLIT)
    }
    made["controller"] = end(lambda: one.pids("ray::ServeController"))
    made["proxy"] = end(lambda: one.pids("ray::ProxyActor"))
    made["redis"] = again
    if cluster is not None:
        made["worker node"] = cluster.kill_worker
    return made


def _struck(part: str, strike: Callable[[], None], one: Site, load: Load, calm_s: float) -> Killed:
    all_back(one, SPLIT)
    load.wait(20)
    before, failed, answered = time.monotonic(), len(load.failed), load.answered
    under_way = load.under_way
    strike()
    struck = time.monotonic()
    load.until(lambda: load.newest > struck, 180)
    silent_s = load.newest - struck
    all_back(one, SPLIT, 180)
    whole_s = time.monotonic() - struck
    time.sleep(calm_s)  # what is lost late counts as well
    load.wait(20)
    if len(load.failed) > failed and load.failed[-1].at > struck:
        silent_s = max(silent_s, _gap(load, struck))
    made = Killed(part, len(load.failed) - failed, under_way, silent_s, whole_s, load.answered - answered)
    say(f"  {made}, {time.monotonic() - before:.0f} s; {[one.what for one in load.failed[failed:]][:3]}")
    return made


def _gap(load: Load, struck: float) -> float:
    """Seconds from the blow until the last failure that came of it."""
    return max(one.at for one in load.failed) - struck

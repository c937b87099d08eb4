"""What happens to a server under load, when it gets another bundle and when its parts are killed.

ships      bundle after bundle is shipped: requests that fail, answers that mix two (each is computed again)
kills      kill -9 of each kind of replica, the controller, the proxy, Redis and a worker node, in turn, with
           two replicas of each: requests lost beside those under way, and events acknowledged and gone
corrupt    damaged bundles are shipped: which of them get to answer
api        Schemathesis over the OpenAPI document: answers of 500 and above
soak       twenty minutes of load: what the replicas hold in memory, at the end and near the start
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import recray
from benchmarks._reliability_kills import PARTS, Kept, Killed, head_away, killed
from benchmarks._reliability_load import Load, mixed
from benchmarks._reliability_site import site
from benchmarks._serving_bundle import make_bundle
from benchmarks.rows import Row
from benchmarks.rows import main as run
from recray.bundles.build import build
from recray.bundles.bundle import Bundle
from recray.bundles.plan import Plan
from recray.errors import InputError
from recray.manifest import open_artefact
from recray.progress import say

ITEMS, USERS = 5_000, [f"u{n}" for n in range(0, 400, 7)]
SHAPE = f"{ITEMS // 1000}kx64, neumf"
LAYOUTS = ("fused", "split")
FLAT = 0.05  # by so much of its memory a server may grow


def bundles(folder: Path, count: int = 3) -> list[Bundle]:
    """Bundles of one catalogue that answer differently."""
    first = make_bundle(folder, items=ITEMS)
    parts = [open_artefact(folder / name, "checkpoint") for name in ("sasrec", "neumf")]
    from recray.data.dataset import open_dataset

    data = open_dataset(folder / "dataset")
    plans = [Plan(candidates=60, blend=share) for share in (0.0, 0.3)]
    return [first, *(build(folder / f"bundle-{n}", *parts, data, plan) for n, plan in enumerate(plans))][
        :count
    ]


def ships(quick: bool) -> Iterator[Row]:
    """Ships under load, one after the other."""
    count = 6 if quick else 100
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        made = bundles(Path(scratch))
        for layout in LAYOUTS:
            with site(made[0], layout) as one, Load(one.url, USERS) as load:
                load.wait(20)
                took = []
                for n in range(count):
                    start = time.monotonic()
                    recray.ship(made[(n + 1) % 3], url=one.url, token=one.token)
                    took.append(time.monotonic() - start)
                    load.wait(10)
            wrong = mixed(load.answers, made)
            given = {
                "ships": count, "requests": load.answered + len(load.failed), "clients": load.clients,
                "replicas": 2, "generations_seen": len({one.generation for one in load.answers}),
                "seconds_a_ship": round(statistics.median(took), 2), "most": 0,
                "kept": not load.failed and not wrong,
            }  # fmt: skip
            for what, value in (("failed requests", len(load.failed)), ("mixed answers", len(wrong))):
                yield _row(f"{count} ships, {layout}: {what}", what.split()[0], value, given)


def kills(quick: bool) -> Iterator[Row]:
    """kill -9 of each part in turn."""
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        bundle = bundles(Path(scratch), 1)[0]
        parts = [part for part in PARTS if not (quick and part == "worker node")]
        for one in killed(bundle, USERS, parts=parts, calm_s=2 if quick else 15):
            if isinstance(one, Killed):
                single = one.part in ("controller", "proxy")
                given = {
                    "under_way": one.under_way, "seconds_without_an_answer": round(one.silent_s, 2),
                    "seconds_until_whole": round(one.whole_s, 1), "answered": one.answered, "replicas": 2,
                    "most": one.under_way, "kept": one.lost <= one.under_way or (one.part == "proxy"),
                    "one_of_its_kind": single,
                }  # fmt: skip
                yield _row(f"kill -9 of the {one.part}: lost requests", "lost", one.lost, given)
            elif isinstance(one, Kept):
                given = {"sent": one.sent, "retries": one.retries, "doubled": one.doubled, "most": 0}
                given["kept"] = one.lost == one.doubled == 0
                yield _row("events over all kills: lost or doubled", "lost", one.lost + one.doubled, given)
        if not quick:
            value = head_away(bundle)
            yield _row("kill -9 of the head: until a new one answers", "seconds", value, {"nodes": 3}, "s")


def corrupt(quick: bool) -> Iterator[Row]:
    """Damaged bundles are shipped under load."""
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        made = bundles(Path(scratch), 2)
        for layout in LAYOUTS[: 1 if quick else 2]:
            answered_from, refused = 0, []
            with site(made[0], layout) as one, Load(one.url, USERS) as load:
                load.wait(20)
                for name, damage in DAMAGES.items():
                    copy = Path(scratch) / f"{layout}-{name.replace(' ', '-')}"
                    shutil.copytree(made[1].artefact.place.uri, copy)
                    damage(copy)
                    try:
                        recray.ship(copy, url=one.url, token=one.token)
                        answered_from += 1
                    except InputError as error:
                        refused.append(f"{name}: {error}".replace(f"{copy}", "BUNDLE")[:120])
                    load.wait(10)
            wrong = mixed(load.answers, made[:1])
            given = {
                "refused": refused, "failed": len(load.failed), "of_another": len(wrong), "most": 0,
                "kept": not answered_from and not wrong and not load.failed,
            }  # fmt: skip
            yield _row(f"damaged bundles that answered, {layout}", "answered", answered_from, given)


def _largest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _flip(folder: Path) -> None:
    data = bytearray(_largest(folder).read_bytes())
    data[len(data) // 2] ^= 1
    _largest(folder).write_bytes(data)


def _cut(folder: Path) -> None:
    with _largest(folder).open("r+b") as file:
        file.truncate(100)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": _flip,
    "cut short": _cut,
    "one file gone": lambda folder: _largest(folder).unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: (folder / "manifest.json").write_text("{"),
}


def api(quick: bool) -> Iterator[Row]:
    """Schemathesis, over HTTP and with the admin's token."""
    from benchmarks._reliability_api import asked_of

    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        made = bundles(Path(scratch), 1)[0]
        with site(made, "fused") as one:
            headers = {"authorization": f"Bearer {one.token}"}
            told = asked_of(one.url, 10 if quick else 300, headers)
            for fault in told.faults[:5]:
                say(f"  {fault}")
            given = {
                "requests": told.requests, "operations": len(told.paths), "shed": told.shed, "most": 0,
                "kept": not told.faults, "faults": told.faults[:5],
            }  # fmt: skip
            yield _row("schemathesis: answers of 500 and above", "failed", len(told.faults), given)


def soak(quick: bool) -> Iterator[Row]:
    """Load and now and then a ship, and what the replicas' memory does."""
    seconds = 60 if quick else 1200
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        made = bundles(Path(scratch))
        with site(made[0], "fused") as one, Load(one.url, USERS, keep=False) as load:
            for bundle in (made[1], made[2], made[0], made[1]):  # until three are held, as from then on
                recray.ship(bundle, url=one.url, token=one.token)
                load.wait(30 if quick else 200)
            start, memory = time.monotonic(), [one.memory()]
            while time.monotonic() < start + seconds:
                load.until(lambda: time.monotonic() > start + seconds, seconds / 20)
                memory.append(one.memory())
        first = statistics.median(memory[: max(2, len(memory) // 5)])
        last = statistics.median(memory[-max(2, len(memory) // 5) :])
        given = {
            "seconds": seconds, "bytes_at_first": first, "grown": round(last / first - 1, 4), "most": FLAT,
            "kept": last <= first * (1 + FLAT), "answered": load.answered, "failed": len(load.failed),
        }  # fmt: skip
        yield _row(f"replicas after {seconds} s of load", "bytes", last, given, unit="bytes")


def _row(name: str, metric: str, value: float, given: dict[str, object], unit: str = "") -> Row:
    return Row(name=name, work=SHAPE, metric=metric, value=value, unit=unit or metric, given=given)


WORKS: dict[str, Callable[[bool], Iterator[Row]]] = {
    work.__name__: work for work in (ships, corrupt, api, kills, soak)
}


def bench(quick: bool, work: str | None = None) -> Iterator[Row]:
    """Ships, damaged bundles, odd requests, kills and a soak."""
    for name, rows in WORKS.items():
        if work in (None, name):
            say(name)
            yield from rows(quick)


if __name__ == "__main__":
    sys.exit(run("reliability", bench, works=tuple(WORKS)))

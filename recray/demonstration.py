"""The whole path on the synthetic world, by the verbs of the Python API: what `recray demo` runs.

It holds itself to what it claims: when the served pipeline is not better than both baselines, or the
compressed one is not half as large at next to no loss, or a request fails, it ends with an error.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import http.client
import json
import os
import platform
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recray import connect, report_page, storage
from recray.data import synthetic
from recray.errors import InputError, RecrayError
from recray.manifest import versions
from recray.progress import say

if TYPE_CHECKING:
    from recray.evaluation import Report

LOSS = 0.02  # relative NDCG that compression may cost
REQUESTS = 600  # over HTTP, before and after compression each
CLIENTS = 2  # that ask at the same time, each on a connection of its own
ROUNDS = 4  # in which the two are asked in turn, so that a busy moment meets both
P99 = "100ms"  # the budget of one request in process


@dataclass(frozen=True)
class Scale:
    """How much is made and tried."""

    world: Mapping[str, Any]
    sasrec: Sequence[str]
    neumf: Sequence[str]
    trials: int
    workers: int = 2


SASREC = ("train.batch_size=64", "train.lr=0.003", "options.dropout=0.1")
NEUMF = (
    "train.threads=1",  # its steps are too small to share
    "train.batch_size=32",
    "train.lr=0.01",
    "options.dropout=0",
    "options.negatives=32",
    "options.max_len=20",
)
FULL = Scale(
    {"n_users": 4000, "n_items": 1500, "mean_length": 30.0},
    (*SASREC, "train.epochs=4", "train.valid_users=1000"),
    (*NEUMF, "train.epochs=2", "train.valid_users=500"),
    trials=4,
)
QUICK = Scale(
    {"n_users": 1500, "n_items": 480, "mean_length": 25.0},
    (*SASREC, "train.epochs=4", "train.valid_users=500", "train.batch_size=32", "options.max_len=20"),
    (*NEUMF, "train.epochs=3", "train.valid_users=200"),
    trials=3,
)


def run(api: Any, out: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Any]:
    """Run the path with the verbs of `api` (the module `recray.api`) and leave the report in `out`.

    Returns what `report.json` holds. Everything that was started is stopped at the end, also after
    Ctrl-C. Raises InputError for an `out` that holds other things, RecrayError, after the report was
    written, when a claim does not hold.
    """
    folder = _folder(out)
    path = _Path(api, folder, QUICK if quick else FULL)
    report = path.walk()
    report["command"] = "recray demo" + " --quick" * quick
    storage.write_file(folder / "report.json", json.dumps(report, indent=1).encode())
    storage.write_file(folder / "report.html", report_page.page(report).encode())
    say(table(report))
    say(f"kept in {folder / 'report.json'} and {folder / 'report.html'}")
    broken = [check["what"] for check in report["checks"] if not check["holds"]]
    if broken:
        raise RecrayError(f"the demo does not hold what it claims: not so: {'; '.join(broken)}", where=folder)
    return report


@dataclass
class _Path:
    """One walk along the path: the verbs, where results go, and how long each stage took."""

    api: Any
    folder: Path
    scale: Scale
    seconds: dict[str, float] = field(default_factory=dict)

    def walk(self) -> dict[str, Any]:
        """All stages in turn; returns the report."""
        with self._stage("world", "a synthetic world with known truth"):
            world = synthetic.make(synthetic.WorldConfig(**self.scale.world))
            files = synthetic.write_world(world, self.folder / "world")
        with self._stage("prepare", "interactions to a dataset"):
            data = self.api.prepare(
                files / "log.parquet",
                items=files / "items.parquet",
                users=files / "users.parquet",
                context=("weekday", "weather"),
                out=self.folder / "dataset",
            )
        with self._stage("baselines", "popularity and item neighbours"):
            made = {
                name: self.api.train(data, recipe=name, out=self.folder / name)
                for name in ("popularity", "item-knn")
            }
        with contextlib.ExitStack() as stack:
            with self._stage("cluster", "a Ray cluster on this machine"):
                stack.enter_context(connect.session(num_cpus=max(4, os.cpu_count() or 1)))
            plain, served = self._bundles(data)
            with self._stage("evaluate", "full ranking of the catalogue, paired by user"):
                measured = {
                    name: self.api.evaluate(what, data=data)
                    for name, what in {**made, "uncompressed": plain, "served": served}.items()
                }
            with self._stage("serve", f"{2 * REQUESTS} requests over HTTP to Ray Serve"):
                asked = self._ask(world.users["user"].to_pylist(), plain, served)
        sizes = {"before": plain.model_bytes, "after": served.model_bytes}
        shape = {"users": data.n_users, "items": data.n_items, "interactions": world.log.num_rows}
        report: dict[str, Any] = {
            "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "world": shape,
            "quality": _quality(measured),
            "bytes": {**sizes, "ratio": sizes["after"] / sizes["before"]},
            "http": asked,
            "search": _search(self.folder / "search"),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "versions": versions(),
            "hardware": _hardware(),
        }
        report["checks"] = _checks(report)
        return report

    def _bundles(self, data: Any) -> tuple[Any, Any]:
        """Train both stages, search a compressed form: the uncompressed and the chosen bundle."""
        api, out, scale = self.api, self.folder, self.scale
        with self._stage("train", f"SASRec on Ray Train, {scale.workers} workers"):
            sasrec = api.train(
                data, recipe="sasrec", workers=scale.workers, set=scale.sasrec, out=out / "sasrec"
            )
        with self._stage("rank", "NeuMF, the ranker"):
            neumf = api.train(data, recipe="neumf", set=scale.neumf, out=out / "neumf")
        with self._stage("bundle", "everything uncompressed, in one folder"):
            plain = api.bundle(sasrec, ranker=neumf, data=data, out=out / "uncompressed")
        size = plain.model_bytes // 2
        with self._stage("compress", f"{scale.trials} plans on Ray Tune, p99 {P99}, {size:,} bytes"):
            search = api.compress(
                sasrec,
                ranker=neumf,
                data=data,
                p99=P99,
                size=f"{size}B",
                trials=scale.trials,
                out=out / "search",
            )
            return plain, api.bundle(search, data=data, out=out / "served")

    @contextlib.contextmanager
    def _stage(self, name: str, what: str) -> Iterator[None]:
        say(f"— {name}: {what}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def _ask(self, users: Sequence[str], plain: Any, served: Any) -> dict[str, Any]:
        """Both bundles served side by side and asked in turn."""
        from recray.serving.on_ray import serving

        times: dict[str, list[float]] = {"before": [], "after": []}
        failed: dict[str, list[str]] = {"before": [], "after": []}
        with contextlib.ExitStack() as stack:
            urls = {
                name: stack.enter_context(serving(bundle.artefact.place.uri, port=0, name=name))
                for name, bundle in (("before", plain), ("after", served))
            }
            for url in urls.values():
                ask(url, users[:20], clients=CLIENTS)  # warm-up, not counted
            same = _same(urls["after"], served, users[:20])
            share = REQUESTS // ROUNDS
            for turn in range(ROUNDS):
                asked = [users[i % len(users)] for i in range(turn * share, (turn + 1) * share)]
                for name, url in urls.items():
                    seconds, errors = ask(url, asked, clients=CLIENTS, least=10)
                    times[name] += seconds
                    failed[name] += errors
        found: dict[str, Any] = {name: _told(times[name], failed[name]) for name in urls}
        return {**found, "same_as_in_process": same}


def ask(url: str, users: Sequence[str], *, clients: int, least: int = 0) -> tuple[list[float], list[str]]:
    """POST one request a user from several threads: (seconds of each answer, one line a failure).

    least: items that an answer must have.
    """
    seconds: list[float] = []
    errors: list[str] = []

    def client(mine: Sequence[str]) -> None:
        at = urllib.parse.urlsplit(url)
        line = http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)
        with contextlib.closing(line):
            for user in mine:
                start = time.perf_counter()
                try:
                    items = _recommend(line, at.path, user)
                    seconds.append(time.perf_counter() - start)
                    if len(items) < least:
                        errors.append(f"{user}: {len(items)} items")
                except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                    errors.append(f"{user}: {error!r:.200}")
                    line.close()  # the next request opens it again

    threads = [threading.Thread(target=client, args=(users[i::clients],)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds, errors


def _recommend(line: http.client.HTTPConnection, prefix: str, user: str) -> list[str]:
    body = json.dumps({"user": user, "k": 10})
    line.request("POST", f"{prefix}/v1/recommend", body, {"content-type": "application/json"})
    answer = line.getresponse()
    raw = answer.read()
    if answer.status != 200:
        raise ValueError(f"status {answer.status}: {raw[:100]!r}")
    return [entry["item"] for entry in json.loads(raw)["items"]]


def _same(url: str, bundle: Any, users: Sequence[str]) -> bool:
    """Whether HTTP gives each user, item for item, what the bundle gives in this process."""
    at = urllib.parse.urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(at.hostname or "", at.port, timeout=30)) as line:
        return all(
            _recommend(line, at.path, user) == [entry.item for entry in bundle.recommend(user=user).items]
            for user in users
        )


def _told(seconds: Sequence[float], errors: Sequence[str]) -> dict[str, Any]:
    import numpy as np

    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3 if seconds else (None, None)
    return {
        "requests": len(seconds),
        "failures": len(errors),
        "first_failures": list(errors[:3]),
        "p50_ms": None if p50 is None else round(float(p50), 2),
        "p99_ms": None if p99 is None else round(float(p99), 2),
        "clients": CLIENTS,
    }


def _quality(measured: Mapping[str, Report]) -> dict[str, Any]:
    """NDCG@10 of each on the same users, and by how much the served one is better."""
    metric, served = "ndcg@10", measured["served"]
    return {
        "metric": metric,
        "users": len(served.user_rows),
        **{name: report.means[metric] for name, report in measured.items()},
        "differences": {
            name: served.against(report, metric).as_dict()
            for name, report in measured.items()
            if name != "served"
        },
        "relative_loss": 1 - served.means[metric] / measured["uncompressed"].means[metric],
        "served_means": served.means,
    }


def _search(folder: Path) -> dict[str, Any]:
    """What the page and the table need of the search artefact."""
    front = json.loads((folder / "front.json").read_bytes())
    chosen = json.loads((folder / "chosen.json").read_bytes())
    trials = []
    for row in front["trials"]:
        told = {key: row[key] for key in ("number", "words", "error")}
        if row["error"] is None:
            metrics = row["metrics"]
            told |= {
                "quality": metrics[front["metric"]],
                "p99_ms": 1e3 * metrics["p99"],
                "bytes": metrics["bytes"],
                "dominated": row["dominated"],
                "fits": row["fits"],
            }
        told["chosen"] = row["trial"] == front["chosen"]
        told["reference"] = row["trial"] == front["reference"]
        trials.append({"dominated": False, **told})
    return {"budget": front["budget"], "why": chosen["why"], "trials": trials}


def _checks(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    quality, size, http_ = report["quality"], report["bytes"], report["http"]
    gains = {name: quality["differences"][name] for name in ("popularity", "item-knn")}
    asked = [http_["before"], http_["after"]]
    failures = sum(one["failures"] for one in asked)
    found = [
        (f"the served model beats {name}: the 95 % interval starts at {gain['low']:+.4f}", gain["low"] > 0)
        for name, gain in gains.items()
    ]
    found += [
        (f"model bytes are at most half after compression: {size['ratio']:.0%}", size["ratio"] <= 0.5),
        (
            f"compression costs at most {LOSS:.0%} of NDCG@10: {quality['relative_loss']:+.2%}",
            quality["relative_loss"] <= LOSS,
        ),
        (
            f"at least 500 requests over HTTP each before and after, none failed: {failures} failed",
            failures == 0 and min(one["requests"] for one in asked) >= 500,
        ),
        ("an answer over HTTP equals the one in process, item for item", http_["same_as_in_process"]),
    ]
    return [{"what": what, "holds": bool(holds)} for what, holds in found]


def table(report: Mapping[str, Any]) -> str:
    """The one table at the end."""
    quality, size, asked = report["quality"], report["bytes"], report["http"]
    lines = [f"{'':<24}{'ndcg@10':>9}  {'served is better by':>28}{'bytes':>12}{'p50':>10}{'p99':>10}"]
    for name, label in (
        ("popularity", "popularity"),
        ("item-knn", "item neighbours"),
        ("uncompressed", "uncompressed"),
        ("served", "compressed, as served"),
    ):
        line = f"{label:<24}{quality[name]:>9.4f}  "
        gain = quality["differences"].get(name)
        told = "" if gain is None else f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        line += f"{told:>28}"
        side = {"uncompressed": "before", "served": "after"}.get(name)
        if side:
            ends = "".join(f"{asked[side][p] or float('nan'):>7.1f} ms" for p in ("p50_ms", "p99_ms"))
            line += f"{size[side]:>12,}{ends}"
        lines.append(line)
    took = sum(report["seconds"].values())
    lines.append(
        f"{asked['before']['requests'] + asked['after']['requests']:,} requests over HTTP, "
        f"{asked['before']['failures'] + asked['after']['failures']} failed; the whole path took {took:.0f} s"
    )
    return "\n".join(["", *lines, ""])


def _folder(out: str | os.PathLike[str]) -> Path:
    target = storage.place(out)
    if target.remote:
        raise InputError("the demo keeps its report on this machine", where=target, fix="give a local --out")
    folder = target.local
    if folder.is_file():
        raise InputError("is a file, and the result is a folder", where=folder, fix="choose another --out")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "world").is_dir():
        raise InputError("is a folder with other things in it", where=folder, fix="choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot be made ({error.strerror})", where=folder, fix="choose another --out"
        ) from None
    return folder


def _hardware() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }

"""SASRec against RecTools' SASRec: the same split, width, blocks, heads, length, dropout, loss, batch, seed.

The speed is next-item predictions a second while training: a pad is no prediction, so work spent on
padding does not count. A peer's epoch takes minutes, so a turn of it is some batches of an epoch, drawn
anew; a turn of ours is a whole epoch or many batches. Both are warm and only one works at a time.

Its quality after many epochs takes hours; that is run once and kept:
`python -m benchmarks._sasrec s3rec_beauty --epochs 20 --json benchmarks/results/rectools_beauty.json`
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._process import ROOT, PeerError, Worker, peer_python
from benchmarks._sets import ml1m, s3rec_beauty, there
from benchmarks.rows import Row, hardware
from recray.data.dataset import Cases, Dataset
from recray.evaluation import Report, TopK, evaluate, model_top_k
from recray.models import build_model
from recray.models.base import Catalogue, Retriever
from recray.models.saved import load_model
from recray.progress import say
from recray.recipes import recipe
from recray.training.loop import fit
from recray.training.run import resolve, train

Prepared = Callable[[Path], Dataset]
Turn = tuple[float, float]  # predictions made, seconds

SAME = {"dim": 64, "blocks": 2, "heads": 2, "length": 50, "dropout": 0.2, "batch": 128, "lr": 1e-3}
OURS_ONLY = ("train.epochs=60", "train.patience=5")  # further changes of our recipe, told in every row
THREADS = 2
KEPT = {"ml1m": "rectools_ml1m", "s3rec_beauty": "rectools_beauty"}  # the peer's long runs, in results/
ENDLESS = ("train.epochs=1000", "train.patience=0", "train.valid_users=0")
TURNS = {"ml1m": (60, 10), "s3rec_beauty": (0, 4)}  # batches of a turn of ours and of the peer; 0 = an epoch
QUICK = {"ml1m": (30, 5), "s3rec_beauty": (60, 2)}
BARS = {"ml1m": 2, "s3rec_beauty": 15}
METRICS = ("hr@10", "ndcg@10")


WORKS: dict[str, Prepared] = {"ml1m": ml1m, "s3rec_beauty": s3rec_beauty}


def sasrec_rows(work: str, quick: bool) -> Iterator[Row]:
    """Predictions a second, then test quality beside the peer's kept run."""
    if not there(work):
        return
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        data = WORKS[work](Path(scratch) / "data")
        yield speed(data, Path(scratch) / "peer", work, quick)
        if not quick:
            yield from quality(data, work, Path(scratch))


def speed(data: Dataset, folder: Path, work: str, quick: bool) -> Row:
    """Medians over interleaved turns; the first turn of each side is its warm-up and not counted."""
    ours: list[Turn] = []
    theirs: list[Turn] = []
    versions: dict[str, str] = {}
    our_batches, peer_batches = (QUICK if quick else TURNS)[work]
    rounds = 2 if quick else 6
    with contextlib.ExitStack() as stack:
        peer = start_peer(data, folder, batches=peer_batches)
        try:
            versions = stack.enter_context(peer).ready["versions"] if peer else {}
        except PeerError as error:
            say(f"rectools does not run: {error}")
            peer = None

        def peers_turn(turn: Turn) -> bool:
            ours.append(turn)
            theirs.extend((a["interactions"], a["seconds"]) for a in (peer.ask(train=True) if peer else ()))
            return len(ours) <= rounds

        our_turns(data, our_batches, peers_turn)
    speeds, peer_speeds = [[made / seconds for made, seconds in turns[1:]] for turns in (ours, theirs)]
    value, an_epoch = statistics.median(speeds), predictions(data)
    given = {
        "threads": THREADS, **SAME, "set": list(OURS_ONLY), "loss": "softmax", "rounds": rounds,
        "predictions_an_epoch": an_epoch, "epoch_seconds": round(an_epoch / value, 2), "bar": BARS[work],
        "runs": [round(s) for s in speeds], "peer_runs": [round(s) for s in peer_speeds],
        "peer_versions": versions,
    }  # fmt: skip
    return Row(
        name="sasrec training", work=work, metric="samples/s", value=value, unit="next-item predictions/s",
        peer="rectools", peer_value=statistics.median(peer_speeds) if peer_speeds else None, given=given,
        seeds=(0,),
    )  # fmt: skip


def our_turns(data: Dataset, batches: int, after: Callable[[Turn], bool]) -> None:
    """THE PLACE WHERE OURS IS CALLED for speed: train by SAME's settings until `after` a turn says no.

    A turn is so many batches, or, with 0, an epoch; also an epoch's last batches are one.
    """
    asked = resolve(recipe("sasrec", (*changes(), *ENDLESS, f"train.save_steps={batches}")))
    catalogue = Catalogue(data.n_items, data.context_sizes)
    model = build_model(asked.model, catalogue, asked.options, seed=asked.train.seed)
    loss, made, started = model.loss, 0.0, time.perf_counter()

    def counting(batch: Any) -> Any:
        nonlocal made
        made += batch.positions  # those with a target
        return loss(batch)

    def report(epoch: object, state: object) -> None:
        nonlocal made, started
        if not after((made, time.perf_counter() - started)):
            raise _EnoughError
        made, started = 0.0, time.perf_counter()

    model.loss = counting  # type: ignore[method-assign]
    with contextlib.suppress(_EnoughError):
        fit(model, data, asked.train, report=report)


class _EnoughError(Exception):
    """Nothing is wrong: what was to be measured is."""


def changes() -> tuple[str, ...]:
    """SAME as changes of our recipe."""
    names = {"length": "options.max_len", "batch": "train.batch_size", "lr": "train.lr"}
    words = {names.get(name, f"options.{name}"): value for name, value in SAME.items()}
    words["train.threads"] = THREADS
    return (*(f"{name}={value}" for name, value in words.items()), *OURS_ONLY)


def predictions(data: Dataset) -> int:
    """Targets of one epoch of ours: every training interaction but each user's first."""
    return int(np.maximum(data.histories("train").lengths - 1, 0).sum())


def quality(data: Dataset, work: str, scratch: Path) -> Iterator[Row]:
    """Ours by the recipe and SAME's settings, early stopping on valid; the peer's kept run, if any."""
    made = train(data, recipe("sasrec", changes()), out=scratch / "checkpoint")
    model = load_model(made)
    assert isinstance(model, Retriever)
    report = evaluate(model_top_k(model), data.cases("test"), ks=(10,))
    kept = kept_run(work)
    best = max(kept["epochs"], key=lambda epoch: epoch["ndcg@10"]) if kept else None
    for metric in METRICS:
        mean = report.interval(metric)
        given = {
            "users": len(report.user_rows),
            "epochs": made.manifest.report["epochs"],
            **SAME,
            "set": list(OURS_ONLY),
        }
        given |= {"train_seconds": made.manifest.report["seconds"]}
        if kept and best:
            given |= {
                "peer_epoch": best["epoch"],
                "peer_epochs": len(kept["epochs"]),
                "peer_kept": kept["date"],
            }
        yield Row(
            name="sasrec test quality", work=work, metric=metric, value=mean.mean, unit="mean over users",
            peer="rectools", peer_value=best[metric] if best else None, given=given, seeds=(0,),
            interval=(mean.low, mean.high),
        )  # fmt: skip


def kept_run(work: str) -> dict[str, Any] | None:
    """What `long_run` left, if anything."""
    file = ROOT / "benchmarks" / "results" / f"{KEPT[work]}.json"
    found: dict[str, Any] | None = json.loads(file.read_text()) if file.is_file() else None
    return found


def start_peer(data: Dataset, folder: Path, *, batches: int = 0, keep: str = "") -> Worker | None:
    """The peer over this dataset's rows, or None where it is not installed. Raises PeerError."""
    python = peer_python("rectools")
    if python is None:
        return None
    folder.mkdir(parents=True)
    write_files(data, folder)
    settings = json.dumps({**SAME, "seed": 0, "threads": THREADS, "batches": batches, "keep": keep})
    command = [python, "-m", "benchmarks._rectools_peer", str(folder), settings]
    return Worker([command], {"OMP_NUM_THREADS": str(THREADS)})


def write_files(data: Dataset, folder: Path) -> None:
    """train.tsv, known.tsv (what is known of a user at test time), asked.txt; users and items by row."""
    cases = data.cases("test")
    for name, users, histories in (
        ("train.tsv", np.arange(data.n_users), data.histories("train")),
        ("known.tsv", cases.user_rows, cases.histories),
    ):
        user = np.repeat(users, histories.lengths)
        order = np.arange(len(histories.items)) - np.repeat(histories.offsets[:-1], histories.lengths)
        np.savetxt(folder / name, np.stack([user, histories.items, order], 1), fmt="%d", delimiter="\t")
    np.savetxt(folder / "asked.txt", cases.user_rows, fmt="%d")


def listed(file: Path, cases: Cases) -> TopK:
    """The lists of a file, a line of item rows a user of `cases`, as something to evaluate."""
    line_of = {int(user): line.split() for user, line in zip(cases.user_rows, file.read_text().splitlines())}

    def top_k(part: Cases, k: int) -> NDArray[np.int64]:
        made = np.full((len(part), k), -1, np.int64)
        for row, user in enumerate(part.user_rows):
            items = line_of[int(user)][:k]
            made[row, : len(items)] = [int(item) for item in items]
        return made

    return top_k


def long_run(work: str, epochs: int, out: Path) -> int:
    """Train the peer and measure it after every epoch with our evaluation; `out` grows by the epoch.

    A run that was cut off goes on after its last whole epoch, if the state beside `out` is there.
    """
    command = shlex.join(["python", "-m", "benchmarks._sasrec", *sys.argv[1:]])
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        data = WORKS[work](Path(scratch) / "data")
        cases = data.cases("test")
        state = out.with_name(f"{out.stem}.state.npz").resolve()
        before = json.loads(out.read_text())["epochs"] if out.is_file() and state.is_file() else []
        if not before:
            state.unlink(missing_ok=True)
        peer = start_peer(data, Path(scratch) / "peer", keep=str(state))
        if peer is None:
            return 1
        with peer:
            kept = {
                "peer": "rectools", "work": work, "command": command, "settings": {**SAME, "loss": "softmax"},
                "threads": THREADS, "seed": 0, "versions": peer.ready["versions"], "hardware": hardware(),
                "date": dt.date.today().isoformat(), "users": len(cases), "epochs": before,
            }  # fmt: skip
            for epoch in range(len(before) + 1, epochs + 1):
                (turn,) = peer.ask(train=True)
                lists = Path(scratch) / "top10.txt"
                peer.ask(top=str(lists))
                report: Report = evaluate(listed(lists, cases), cases, ks=(10,))
                measured = {metric: round(report.means[metric], 6) for metric in METRICS}
                kept["epochs"].append({"epoch": epoch, **turn, **measured})
                out.write_text(json.dumps(kept, indent=1) + "\n")
                say(f"epoch {epoch}: {turn['seconds']:.1f} s, {measured}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks._sasrec", description=long_run.__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    asked = parser.parse_args()
    sys.exit(long_run(asked.work, asked.epochs, asked.json))

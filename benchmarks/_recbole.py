"""RecBole's models on MovieLens-100K, on our split, measured by our evaluation, for the work `ml100k`.

Each is trained by RecBole's Trainer with the settings that RecBole ships, one process after another on the
same files, with early stopping on the validation split (NDCG@10 as RecBole measures it: a sequential model
may list what is known). Then it lists unseen items for what is known at test time, validation included: a
sequential model is told of all of it, item weights (ItemKNN, EASE) are applied to it, and a model that has
a vector for each user has the one that it trained.

Training takes hours on two cores, so it is run once and kept; models that are in the file are not run
again unless named: `python -m benchmarks._recbole --json benchmarks/results/recbole_ml100k.json`
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._lines import METRICS_10, measured
from benchmarks._process import ROOT, PeerError, Worker, peer_python
from benchmarks._sasrec import listed, write_files
from benchmarks._sets import ml100k, there
from benchmarks.rows import hardware, usable_cores
from recray.data.dataset import Dataset
from recray.errors import InputError
from recray.progress import say

KEPT = ROOT / "benchmarks" / "results" / "recbole_ml100k.json"
SHARED = {  # RecBole's own, but for the metric, which is MRR@10 there, and what changes no figure's meaning
    "epochs": 300, "stopping_step": 10, "train_batch_size": 2048, "learning_rate": 1e-3,
    "valid_metric": "NDCG@10", "metrics": ["NDCG"], "topk": [10], "eval_batch_size": 1 << 18, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """One of RecBole's models: our recipe that it stands beside, and what is changed for it."""

    name: str
    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What it is called in a row."""
        return f"recbole-{self.name.lower()}"


# With the loss over all items RecBole asks for no negatives to be drawn.
SOFTMAX = {"train_neg_sample_args": None}
MODELS = (  # what takes longest comes last
    # By its own settings Pop counts an item once a batch, and drawn negatives too, which is no popularity.
    Model("Pop", "popularity", {"train_neg_sample_args": None, "train_batch_size": 1}),
    Model("ItemKNN", "item-knn"),
    Model("EASE", "ease"),
    Model("BPR", "bpr"),
    Model("NeuMF", "neumf"),
    Model("LightGCN", "spectral"),
    Model("Caser", "caser", {**SOFTMAX, "MAX_ITEM_LIST_LENGTH": 10}),  # what its own page advises
    Model("GRU4Rec", "gru4rec", SOFTMAX),
    Model("SASRec", "sasrec", SOFTMAX),
)


def kept_peers(metrics: Sequence[str], file: Path = KEPT) -> dict[str, dict[str, list[float]]]:
    """Our recipe -> name of the peer -> its figures, from what `long_run` left; {}, said, without it."""
    if not file.is_file():
        say(f"no {file.name}: no figure of RecBole's; `python -m benchmarks._recbole --json FILE` makes it")
        return {}
    models = json.loads(file.read_text())["models"]
    return {
        model.recipe: {model.title: [models[model.name][metric] for metric in metrics]}
        for model in MODELS
        if model.name in models
    }


def start_peer(data: Dataset, folder: Path, threads: int, epochs: int) -> Worker | None:
    """RecBole over this dataset's rows, or None where it is not installed. Raises PeerError, InputError."""
    python = peer_python("recbole")
    if python is None:
        return None
    train, valid = data.histories("train"), data.histories("valid")
    if (valid.lengths != 1).any() or not train.lengths.all():
        raise InputError("has a user without one validation item after others", where=data.artefact.place)
    folder.mkdir(parents=True)
    write_files(data, folder)
    newest = np.stack([np.arange(data.n_users), valid.items, train.lengths], 1)
    np.savetxt(folder / "valid.tsv", newest, fmt="%d", delimiter="\t")
    np.savetxt(folder / "items.txt", np.arange(data.n_items), fmt="%d")
    settings = json.dumps({**SHARED, "epochs": epochs, "threads": threads})
    command = [python, "-m", "benchmarks._recbole_peer", str(folder), settings]
    return Worker([command], {"OMP_NUM_THREADS": str(threads)})


def long_run(out: Path, names: Sequence[str], epochs: int, threads: int) -> int:
    """Train RecBole's models on MovieLens-100K and measure their lists; `out` grows by the model."""
    before = json.loads(out.read_text())["models"] if out.is_file() else {}
    asked = [m for m in MODELS if (m.name in names if names else m.name not in before)]
    if not there("ml100k"):
        return 1
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
        data = ml100k(Path(scratch) / "data")
        peer = start_peer(data, Path(scratch) / "peer", threads, epochs)
        if peer is None:
            return 1
        cases, lists = data.cases("test"), Path(scratch) / "top10.txt"
        with peer:
            kept = {
                "peer": "recbole", "work": "ml100k", "settings": SHARED, "versions": peer.ready["versions"],
                "hardware": hardware(), "users": len(cases), "models": before,
            }  # fmt: skip
            for model in asked:
                try:
                    (made,) = peer.ask(model=model.name, changes=dict(model.changes), top=str(lists))
                except PeerError as error:
                    say(f"{model.name} does not run: {error}")
                    return 1
                figures = dict(zip(METRICS_10, measured(data, listed(lists, cases), METRICS_10)))
                say(f"{model.name}: {made['seconds']} s, {made['epochs']} epochs, {figures}")
                before[model.name] = {
                    "recipe": model.recipe, **{name: round(value, 6) for name, value in figures.items()},
                    **made, "changes": dict(model.changes), "epochs_at_most": epochs, "threads": threads,
                    "date": dt.date.today().isoformat(),
                    "command": shlex.join(["python", "-m", "benchmarks._recbole", *sys.argv[1:]]),
                }  # fmt: skip
                out.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks._recbole", description=long_run.__doc__)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--models", nargs="*", default=(), choices=[model.name for model in MODELS])
    parser.add_argument("--epochs", type=int, default=SHARED["epochs"], help="at most")
    parser.add_argument("--threads", type=int, default=usable_cores())
    told = parser.parse_args()
    sys.exit(long_run(told.json, told.models, told.epochs, told.threads))

"""RecTools' SASRec, run in RecTools' own environment: `python -m benchmarks._rectools_peer FOLDER SETTINGS`.

FOLDER holds train.tsv and known.tsv (user, item, order; a line an interaction, no header, whole numbers)
and asked.txt (a user a line). SETTINGS is JSON: dim, blocks, heads, length, dropout, batch, lr, seed,
threads, batches (of an epoch to train on a question; 0 = all), keep (a file that the model and its
optimizer go to after each epoch, and from which they are taken up if it is there; "" = none).

{"train": true}      one epoch -> {"seconds", "interactions": next-item predictions made, "batches"}
{"top": "FILE"}      -> the ten best unseen items of each asked user, a line each, into FILE

Timed from the epoch's start to its end as Lightning calls them: no setup, no evaluation.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks._process import Answer, serve

warnings.simplefilter("ignore")  # the peer's own: nothing of ours runs here


class Peer:
    """The model over the files of a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import pytorch_lightning as lightning
        import torch
        from rectools.models import SASRecModel

        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        torch.set_num_threads(settings["threads"])
        lightning.seed_everything(settings["seed"])
        clock = _clock(lightning)
        limit = settings["batches"] or None

        def trainer() -> Any:
            return lightning.Trainer(
                accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, callbacks=[clock],
                enable_progress_bar=False, enable_model_summary=False, limit_train_batches=limit,
                max_epochs=1, min_epochs=1,
            )  # fmt: skip

        self.train, self.known = _dataset(folder / "train.tsv"), _dataset(folder / "known.tsv")
        self.asked = [int(line) for line in (folder / "asked.txt").read_text().split()]
        self.model = SASRecModel(
            n_blocks=settings["blocks"], n_heads=settings["heads"], n_factors=settings["dim"],
            session_max_len=settings["length"], dropout_rate=settings["dropout"], loss="softmax",
            lr=settings["lr"], batch_size=settings["batch"], get_trainer_func=trainer,
            recommend_torch_device="cpu",
        )  # fmt: skip
        self.keep = Path(settings["keep"]) if settings["keep"] else None
        if self.keep and self.keep.is_file():
            self._take_up(self.keep, trainer())

    def __call__(self, train: bool = False, top: str = "") -> Answer:
        if train:
            self.model.fit_partial(self.train, min_epochs=1, max_epochs=1)
            # RecTools trains with a copy of the trainer: the clock that ran is that one's
            clock = self.model.fit_trainer.callbacks[0]
            if self.keep:
                self._put_away(self.keep)
            return {"seconds": clock.seconds, "interactions": clock.interactions, "batches": clock.batches}
        started = time.perf_counter()
        found = self.model.recommend(
            self.asked, self.known, k=10, filter_viewed=True, on_unsupported_targets="ignore"
        )
        lists: dict[int, list[int]] = {user: [] for user in self.asked}
        for user, item in zip(found["user_id"], found["item_id"]):  # best first
            lists[user].append(int(item))
        Path(top).write_text("".join(f"{' '.join(map(str, lists[user]))}\n" for user in self.asked))
        return {"seconds": time.perf_counter() - started}

    def _put_away(self, file: Path) -> None:
        """Weights and Adam's moments; the order of batches is drawn anew when they are taken up."""
        import numpy as np

        module = self.model.lightning_model
        arrays = {f"weight {name}": value.numpy() for name, value in module.state_dict().items()}
        for number, slots in module.optimizer.state_dict()["state"].items():
            arrays |= {f"adam {number} {slot}": value.numpy() for slot, value in slots.items()}
        aside = file.with_suffix(".aside.npz")
        np.savez(aside, **arrays)
        aside.rename(file)

    def _take_up(self, file: Path, trainer: Any) -> None:
        import numpy as np
        import torch

        self.model._build_model_from_dataset(self.train)
        self.model.fit_trainer, self.model.is_fitted = trainer, True
        module = self.model.lightning_model
        weights: dict[str, Any] = {}
        moments: dict[int, dict[str, Any]] = {}
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                kind, _, rest = name.partition(" ")
                value = torch.from_numpy(arrays[name])
                if kind == "weight":
                    weights[rest] = value
                else:
                    number, _, slot = rest.partition(" ")
                    moments.setdefault(int(number), {})[slot] = value
        module.load_state_dict(weights)
        optimizer = module.configure_optimizers()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _clock(lightning: Any) -> Any:
    """A Lightning callback that times the last epoch and counts its real targets."""

    class Clock(lightning.Callback):
        seconds, interactions, batches = 0.0, 0, 0

        def on_train_epoch_start(self, *_: Any) -> None:
            self.interactions, self.batches, self.began = 0, 0, time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.interactions += int((batch["y"] != 0).sum())
            self.batches += 1

        def on_train_epoch_end(self, *_: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    return Clock()


def _dataset(file: Path) -> Any:
    import pandas as pd
    from rectools.dataset import Dataset

    log = pd.read_csv(file, sep="\t", names=["user_id", "item_id", "datetime"])
    log["datetime"] = pd.to_datetime(log["datetime"], unit="s")
    log["weight"] = 1.0
    return Dataset.construct(log)


def _start() -> tuple[Answer, Peer]:
    from importlib.metadata import version

    packages = ("RecTools", "torch", "numpy", "pytorch-lightning")
    peer = Peer(Path(sys.argv[1]), json.loads(sys.argv[2]))
    return {"versions": {name: version(name) for name in packages}}, peer


if __name__ == "__main__":
    serve(_start)

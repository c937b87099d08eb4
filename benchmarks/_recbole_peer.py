"""RecBole, run in an environment of its own: `python -m benchmarks._recbole_peer FOLDER SETTINGS`.

FOLDER holds train.tsv, valid.tsv and known.tsv (user, item, order; a line an interaction, no header, whole
numbers), asked.txt (a user a line) and items.txt (all items). A user's only line of valid.tsv is the newest.
SETTINGS is JSON: threads, seed, and what else RecBole's Config takes and all models share.

{"model": NAME, "changes": {...}, "top": "FILE"}
    trains by RecBole's Trainer until it stops early or has had its epochs; then the ten best unseen items of
    each asked user, a line each, go into FILE
    -> {"seconds", "cpu_seconds", "epochs", "best_epoch", "valid": of that epoch, as RecBole measures it,
        "parameters": the model's own}

Timed from building the model to the last validation: no reading of files.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks._process import Answer, serve

warnings.simplefilter("ignore")  # the peer's own: nothing of ours runs here

STEP = 64  # users scored at once


class Peer:
    """RecBole over the files of a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(settings["threads"])
        self.folder, self.settings = folder.resolve(), settings
        self.asked = [int(line) for line in (folder / "asked.txt").read_text().split()]
        self.known: dict[int, list[int]] = {user: [] for user in self.asked}
        for line in (folder / "known.tsv").read_text().splitlines():
            user, item, _ = map(int, line.split("\t"))
            self.known[user].append(item)
        _log_files(self.folder)
        sys.argv = sys.argv[:1]  # RecBole takes what is told there for its own
        os.chdir(folder)  # and leaves its logs where it runs

    def __call__(self, model: str, changes: dict[str, Any], top: str) -> Answer:
        from recbole.config import Config
        from recbole.data import create_dataset
        from recbole.utils import get_model, get_trainer, init_seed

        shared = {name: value for name, value in self.settings.items() if name != "threads"}
        config = Config(model=model, dataset="log", config_dict={**_FILES, **shared, **changes})
        init_seed(config["seed"], config["reproducibility"])
        data = create_dataset(config)
        train, valid = _loaders(config, data)
        started, cpu = time.perf_counter(), time.process_time()
        net = get_model(model)(config, train.dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, net)
        kept = _Best(net)
        trainer.fit(train, valid, verbose=False, saved=False, callback_fn=kept)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        kept.put_back()
        self._write_lists(Path(top), config, data, trainer)
        return {
            "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "epochs": kept.epochs,
            "best_epoch": kept.best_epoch, "valid": round(kept.best, 6),
            "parameters": _parameters(config, model),
        }  # fmt: skip

    def _write_lists(self, file: Path, config: Any, data: Any, trainer: Any) -> None:
        import numpy as np
        import torch

        user_of, item_of = data.field2token_id[data.uid_field], data.field2token_id[data.iid_field]
        names = data.field2id_token[data.iid_field]
        known = [np.array([item_of[str(item)] for item in self.known[user]]) for user in self.asked]
        users = np.array([user_of[str(user)] for user in self.asked])
        _tell(trainer.model, users, known)
        trainer.model.eval()
        lines = []
        for low in range(0, len(users), STEP):
            part = known[low : low + STEP]
            seen = np.repeat(np.arange(len(part)), [len(items) for items in part]), np.concatenate(part)
            question = _question(config, users[low : low + STEP], part)
            with torch.no_grad():
                asked = (question, tuple(map(torch.from_numpy, seen)), None, None)
                scores = trainer._full_sort_batch_eval(asked)[1]
            lines += [" ".join(names[row]) for row in scores.topk(10).indices.cpu().numpy()]
        file.write_text("".join(f"{line}\n" for line in lines))


class _Best:
    """Keeps the weights of the best validation; RecBole itself would pickle them."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.epochs, self.best_epoch, self.best = 0, 0, float("-inf")
        self.weights: dict[str, Any] = {}

    def __call__(self, epoch: int, valid: float) -> None:
        self.epochs = epoch + 1
        if valid >= self.best:  # RecBole's own rule: the later of two equals
            self.best_epoch, self.best = self.epochs, float(valid)
            self.weights = copy.deepcopy(self.net.state_dict())
        print(f"epoch {self.epochs}: {valid:.4f}", file=sys.stderr, flush=True)

    def put_back(self) -> None:
        self.net.load_state_dict(self.weights)
        for name in ("restore_user_e", "restore_item_e"):  # LightGCN's, of the last weights
            if hasattr(self.net, name):
                setattr(self.net, name, None)


_FILES = {
    "data_path": ".",
    "checkpoint_dir": "saved",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]},
    "eval_args": {"split": {"LS": "valid_only"}, "group_by": "user", "order": "TO", "mode": "full"},
    "show_progress": False,
}


def _log_files(folder: Path) -> None:
    """The log as RecBole reads it; it cuts each user's newest off again, which gives train and valid back."""
    made = folder / "log"
    made.mkdir()
    lines = (folder / "train.tsv").read_text() + (folder / "valid.tsv").read_text()
    (made / "log.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + lines)
    (made / "log.item").write_text("item_id:token\n" + (folder / "items.txt").read_text())


def _loaders(config: Any, data: Any) -> tuple[Any, Any]:
    """What `data_preparation` makes, but of train and valid only: there is no test item here to load."""
    from recbole.data.utils import create_samplers, get_dataloader

    train, valid, _ = data.build()
    samplers = create_samplers(config, data, [train, valid, valid])
    taught = get_dataloader(config, "train")(config, train, samplers[0], shuffle=config["shuffle"])
    return taught, get_dataloader(config, "valid")(config, valid, samplers[1], shuffle=False)


def _tell(net: Any, users: Any, known: list[Any]) -> None:
    """A model that answers from histories by item weights answers from what is known, too."""
    import numpy as np
    import scipy.sparse as sp

    rows = np.repeat(users, [len(items) for items in known])
    ones = np.ones(len(rows), np.float32)
    taken = sp.csr_matrix((ones, (rows, np.concatenate(known))), shape=(net.n_users, net.n_items))
    if hasattr(net, "item_similarity"):  # EASE
        net.interaction_matrix = taken
    elif hasattr(net, "pred_mat"):  # ItemKNN
        net.pred_mat = taken.dot(net.w).tolil()


def _question(config: Any, users: Any, known: list[Any]) -> Any:
    """The users and, for a sequential model, the newest of what is known, padded with 0 on the right."""
    import torch
    from recbole.data.interaction import Interaction

    length = config["MAX_ITEM_LIST_LENGTH"]
    newest = torch.zeros((len(known), length), dtype=torch.long)
    for row, items in enumerate(known):
        newest[row, : len(items[-length:])] = torch.from_numpy(items[-length:])
    return Interaction({
        config["USER_ID_FIELD"]: torch.from_numpy(users),
        config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]: newest,
        config["ITEM_LIST_LENGTH_FIELD"]: torch.tensor([min(len(items), length) for items in known]),
    })  # fmt: skip


def _parameters(config: Any, model: str) -> Answer:
    """What RecBole's file of this model's own settings names, as they were."""
    import recbole
    import yaml

    file = Path(recbole.__file__).parent / "properties" / "model" / f"{model}.yaml"
    return {name: config[name] for name in yaml.safe_load(file.read_text()) or ()}


def _start() -> tuple[Answer, Peer]:
    from importlib.metadata import version

    peer = Peer(Path(sys.argv[1]), json.loads(sys.argv[2]))
    packages = ("recbole", "torch", "numpy", "pandas", "scipy")
    return {"versions": {name: version(name) for name in packages}}, peer


if __name__ == "__main__":
    serve(_start)

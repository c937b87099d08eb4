"""A small log, in memory with a dataset's reading surface or prepared, and the shortest training on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.data.sequences import Histories


@dataclass(frozen=True)
class Log:
    """What the models read of `Dataset.interactions`."""

    item_rows: NDArray[np.int32]
    weights: NDArray[np.float32]
    context: dict[str, NDArray[np.int32]]


@dataclass(frozen=True, eq=False)
class SmallData:
    """Users who walk around a ring of items, `step` apart, with a little noise."""

    n_items: int
    train: Histories
    context_sizes: dict[str, int] = field(default_factory=dict)
    context: dict[str, NDArray[np.int32]] = field(default_factory=dict)
    item_features: Any = None  # an Arrow table

    @property
    def n_users(self) -> int:
        return len(self.train)

    def histories(self, split: str = "train", part: tuple[int, int] | None = None) -> Histories:
        assert split == "train"
        assert part is None
        return self.train

    def interactions(self, split: str = "train", part: tuple[int, int] | None = None) -> Log:
        weights = self.train.weights if self.train.weights is not None else np.ones(len(self.train.items))
        return Log(self.train.items, np.asarray(weights, np.float32), self.context)


def ring(n_users: int = 60, n_items: int = 23, *, seed: int = 0, columns: tuple[str, ...] = ()) -> Any:
    """User u starts anywhere and takes the next item of the ring; one in ten is any item.

    An item's feature is the quarter of the ring it lies in.
    """
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 30, n_users)
    rows = []
    for length in lengths:
        walk = (rng.integers(n_items) + np.arange(length)) % n_items
        noise = rng.random(length) < 0.1
        rows.append(np.where(noise, rng.integers(0, n_items, length), walk).tolist())
    made = Histories.of(rows)
    context = {name: rng.integers(0, 5, len(made.items)).astype(np.int32) for name in columns}
    table = pa.table({"arc": [f"arc {i * 4 // n_items}" for i in range(n_items)]})
    return SmallData(n_items, made, dict.fromkeys(columns, 5), context, table)


def ring_dataset(folder: Path, *, days: bool = False) -> Dataset:
    """Sixty users who walk around twenty items without noise, prepared in a folder; `days`: a context."""
    rows = [[f"u{u}", f"i{(u * 7 + t) % 20}", t, t % 3] for u in range(60) for t in range(4 + u % 5)]
    lines = [["user", "item", "time", "day"], *rows]
    log = folder / "log.csv"
    log.write_text("\n".join(",".join(map(str, line[: 3 + days])) for line in lines))
    return prepare([str(log)], context=["day"] * days, out=str(folder / "dataset"))


def fitted(model: Any, data: Any, epochs: int, *, batch_size: int = 32) -> Any:
    """The model after some epochs of Adam, ready to be asked."""
    optimizer = torch.optim.Adam(model.train().parameters(), 0.01)
    for epoch in range(epochs):
        for batch in model.batches(data, batch_size=batch_size, epoch=epoch, seed=0, rank=0, world=1):
            optimizer.zero_grad()
            model.loss(batch).backward()
            optimizer.step()
    return model.eval()

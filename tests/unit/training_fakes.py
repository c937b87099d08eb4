"""A model and a dataset small enough to train in milliseconds, for the tests of the loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from recray.data.dataset import Cases
from recray.data.sequences import Histories
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.embeddings import DenseTable

N_ITEMS = 30


class Batch(NamedTuple):
    rows: Tensor  # int64[B, L]
    targets: Tensor  # int64[B]
    share: float  # users of the whole step over `world`


class Tiny(Retriever):
    """Mean of the history's rows, through one layer, against all items."""

    name = "tiny"
    gradient = True
    Config = ModelConfig

    def __init__(self, catalogue: Catalogue | None = None, config: ModelConfig | None = None) -> None:
        super().__init__(catalogue or Catalogue(N_ITEMS, {}), config or ModelConfig())
        self.tables["item"] = DenseTable(N_ITEMS, 8)
        self.network = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))
        self.poison_at: int | None = None  # the step whose loss is not a number
        self.calls = 0

    def batches(
        self, data: Any, *, batch_size: int, epoch: int, seed: int, rank: int, world: int, skip: int = 0
    ) -> Iterator[Batch]:
        histories = data.histories("train")
        order = np.random.default_rng([seed, epoch]).permutation(len(histories))
        for start in range(skip * batch_size, len(order), batch_size):
            step = order[start : start + batch_size]
            mine = step[rank::world]
            rows, lengths = histories.take(mine).padded(8)
            targets = np.take_along_axis(rows, np.maximum(lengths - 1, 0)[:, None], 1)[:, 0]
            np.put_along_axis(rows, np.maximum(lengths - 1, 0)[:, None], -1, 1)
            yield Batch(torch.from_numpy(rows), torch.from_numpy(targets), len(step) / world)

    def loss(self, batch: Batch) -> Tensor:
        self.calls += 1
        logits = self._query(batch.rows) @ self.item_vectors().T
        loss = nn.functional.cross_entropy(logits, batch.targets, reduction="sum") / batch.share
        return loss * torch.nan if self.calls == self.poison_at else loss

    def encode(self, histories: Histories) -> Tensor:
        with torch.inference_mode():
            rows, _ = histories.padded(8)
            return self._query(torch.from_numpy(rows))[:, None]

    def _query(self, rows: Tensor) -> Tensor:
        assert self.network is not None
        found: Tensor = self.network(
            self.tables["item"](rows).sum(1) / (rows >= 0).sum(1, keepdim=True).clamp(1)
        )
        return found


class Place:
    place = "fake"


class FakeData:
    """Users who walk a ring of items, some faster than others: the next item can be learned."""

    artefact = Place()
    n_items = N_ITEMS

    def __init__(self, users: int = 50, *, valid: bool = True) -> None:
        made = np.random.default_rng(1)
        walks = [
            (s + np.arange(int(made.integers(3, 9)))) % N_ITEMS for s in made.integers(0, N_ITEMS, users)
        ]
        self.whole, self.valid = Histories.of([w.tolist() for w in walks]), valid

    def histories(self, split: str = "train") -> Histories:
        return self.whole.without_last(1)

    def has_split(self, name: str) -> bool:
        return self.valid

    def cases(self, split: str, limit: int = 10**9, seed: int = 0) -> Cases:
        users = np.arange(len(self.whole), dtype=np.int32)[:limit]
        known, targets = self.whole.without_last(1), self.whole.last(1)
        return Cases(users, known.take(users), targets.take(users), {})

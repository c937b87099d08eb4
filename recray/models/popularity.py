"""Most popular items: score(i) = the summed weight of i's interactions. The yardstick of all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recray.data.sequences import Histories
from recray.models.base import Catalogue, ModelConfig, Retriever
from recray.models.why import Reasons

if TYPE_CHECKING:
    from recray.data.dataset import Dataset


class Popularity(Retriever):
    """Vectors of one dimension: an item's is its count, every user's is 1."""

    name = "popularity"
    gradient = False

    @dataclass(frozen=True, kw_only=True)
    class Config(ModelConfig):
        weighted: bool = False  # sum the weights of interactions instead of counting them

    config: Popularity.Config

    def __init__(self, catalogue: Catalogue, config: Popularity.Config) -> None:
        super().__init__(catalogue, config)
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(catalogue.n_items))

    def fit(self, data: Dataset, *, seed: int = 0) -> Mapping[str, float]:
        log = data.interactions("train")
        rows = torch.from_numpy(log.item_rows.astype("int64"))
        weights = torch.from_numpy(log.weights).double() if self.config.weighted else None
        counted = torch.bincount(rows, weights, minlength=self.n_items)
        self.counts.copy_(counted.clamp(min=0))
        return {"interactions": float(len(rows))}

    @torch.inference_mode()
    def encode(self, histories: Histories) -> Tensor:
        return torch.ones(len(histories), 1, 1, device=self.counts.device)

    def reasons(self, history: Histories, row: int) -> Reasons:
        count = float(self.counts[row])
        return Reasons.of(count, count, np.empty(0), np.empty(0))

    def item_vectors(self) -> Tensor:
        return self.counts.unsqueeze(1)

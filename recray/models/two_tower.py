"""Two towers: a vector of the user and a vector of the item, each from all that is known of it.

    x_i = E[i] + sum_f C_f[category_f(i)] + W numbers_i                 an item's id and its features
    q_i = norm(x_i + MLP(x_i))                                         the item tower
    p_u = sum_k a_k x_k,  a = softmax_k(<w, tanh(A x_k)> + g[age_k])   attention over the history
    score(i) = <norm(p_u + MLP([p_u; log(1 + n_u)])), q_i> / temperature

With `pooling=mean` the first term is left out, so that only the learned g of an item's age weighs it; with
`history=half`, where ages mean nothing, g is left out, and without both p_u is the plain mean.

Covington et al. 2016 (YouTube) for the user as her pooled history, Yi et al. 2019 ("Sampling-bias-
corrected neural modeling for large corpus item recommendations") for the item tower, for negatives
from the batch with the log-Q correction and for normalized vectors with a temperature. The item tower is
worked out ahead: `item_vectors()` is what an index holds.

In training a target's history is what came `before` it, or, where a log has no order that means anything,
a random `half` of the user's window, which tells all of it, as in a denoising autoencoder (Liang et al. 2018,
arXiv 1802.05814).

Shapes: B users, L items of a history, T targets of a window, D dims, F category columns, G numbers,
S negatives, P positions, N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from recray.data.batches import Sampling, SequenceBatch
from recray.data.item_features import item_features, vocabulary_of
from recray.data.sequences import PAD
from recray.errors import ConfigError
from recray.models.base import Catalogue
from recray.models.embeddings import DenseTable
from recray.models.losses import full_softmax
from recray.models.sequential import Encoder, Sequential

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

_BLOCK = 1 << 16  # items whose tower is worked out at a time


class Residual(nn.Module):
    """x + MLP([x; extra]), which starts as x."""

    def __init__(self, dim: int, extra: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim + extra, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        """[..., D] and, where there are any, [..., extra] -> [..., D]"""
        added: Tensor = self.down(torch.relu(self.up(torch.cat([x, *extra], dim=-1))))
        return x + added


class UserTower(Encoder):
    """A history's item vectors -> the user's vector, divided by the temperature."""

    def __init__(self, c: TwoTower.Config) -> None:
        super().__init__()
        self.dropout, self.temperature, self.ordered = c.dropout, c.temperature, c.history == "before"
        self.attention = (
            nn.Sequential(nn.Linear(c.dim, c.dim), nn.Tanh(), nn.Linear(c.dim, 1, bias=False))
            if c.pooling == "attention"
            else None
        )
        self.log_ages = nn.Parameter(torch.zeros(c.max_len, 1))
        self.mlp = Residual(c.dim, 1, c.units)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        ends_1T = torch.arange(x_BLD.shape[1], device=x_BLD.device).unsqueeze(0)
        return self.prefixes(x_BLD, ends_1T)

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """x float32[B, L, D] item vectors oldest first, lengths int64[B] -> queries float32[B, 1, D].

        A user of length 0 gets zeros. L is at least 1 and at most max_len.
        """
        query_B1D = self.prefixes(x_BLD, lengths_B.unsqueeze(1) - 1)
        return query_B1D * (lengths_B > 0).to(query_B1D.dtype).view(-1, 1, 1)

    def prefixes(self, x_BLD: Tensor, ends_BT: Tensor) -> Tensor:
        """The users [B, T, D] of the histories x[:, : end + 1]."""
        ages_BTL = ends_BT.unsqueeze(2) - torch.arange(x_BLD.shape[1], device=x_BLD.device)
        at_BTL = ages_BTL.clamp(0, len(self.log_ages) - 1)
        logits_BTL = nn.functional.embedding(at_BTL, self.log_ages).squeeze(3)
        return self.users(x_BLD, ages_BTL >= 0, logits_BTL if self.ordered else None)

    def users(self, x_BLD: Tensor, mask_BTL: Tensor, logits_BTL: Tensor | None = None) -> Tensor:
        """The users [B, T, D] whose histories are what the mask leaves of x."""
        x_BLD = nn.functional.dropout(x_BLD, self.dropout, self.training)
        if logits_BTL is None:
            logits_BTL = x_BLD.new_zeros(())
        if self.attention is not None:
            logits_BTL = logits_BTL + self.attention(x_BLD).transpose(1, 2)
        seen_BTL = mask_BTL.expand(len(x_BLD), -1, -1).to(x_BLD.dtype)
        weights_BTL = (logits_BTL + (seen_BTL - 1) * 1e9).softmax(dim=2) * seen_BTL
        user_BTD = self.mlp(weights_BTL @ x_BLD, seen_BTL.sum(dim=2, keepdim=True).log1p())
        return nn.functional.normalize(user_BTD, dim=2) / self.temperature


class TwoTower(Sequential):
    """A user tower over the history and an item tower over id and features."""

    name = "two-tower"

    @dataclass(frozen=True, kw_only=True)
    class Config(Sequential.Config):
        loss: Literal["softmax", "sampled"] = "sampled"
        sampling: Sampling = "in-batch"
        negatives: int = 1024
        uniform_share: float = 0.2
        history: Literal["before", "half"] = "before"  # what a target is told from in training
        pooling: Literal["mean", "attention"] = "attention"  # mean: weighed by age alone, see above
        units: int = 128  # of both MLPs
        temperature: float = 0.1

    config: TwoTower.Config
    network: UserTower
    value_rows: Tensor  # int32[N, F] rows of the table of all categories' values, -1 for none
    numbers: Tensor  # float32[N, G]

    def __init__(self, catalogue: Catalogue, config: TwoTower.Config) -> None:
        if config.units < 1 or not config.temperature > 0:
            raise ConfigError("units must be at least 1 and temperature above 0", where="options")
        super().__init__(catalogue, config)
        self.ordered = config.history == "before"
        n, names = catalogue.n_items, sorted(catalogue.item_values)
        self.starts: dict[str, int] = {}  # vocabulary -> the first of its rows
        rows = 0
        for name in names:
            if vocabulary_of(name) not in self.starts:
                self.starts[vocabulary_of(name)] = rows
                rows += catalogue.item_values[name]
        if rows:
            self.tables["value"] = DenseTable(rows, config.dim, std=0.02)
        self.register_buffer("value_rows", torch.full((n, len(names)), PAD, dtype=torch.int32))
        self.register_buffer("numbers", torch.zeros(n, catalogue.item_numbers))
        self.of_numbers = nn.Parameter(torch.zeros(catalogue.item_numbers, config.dim))  # W
        self.item_tower = Residual(config.dim, 0, config.units)
        self.network = UserTower(config)

    def see(self, data: Dataset) -> None:
        """Take the items' categories and numbers into the buffers."""
        if not (self.catalogue.item_values or self.catalogue.item_numbers):
            return
        found = item_features(data)
        for column, name in enumerate(found.names):
            rows = torch.from_numpy(found.categories[:, column])
            first = self.starts[vocabulary_of(name)]
            self.value_rows[:, column] = torch.where(rows > 0, rows + first, PAD)
        self.numbers.copy_(torch.from_numpy(found.numbers))

    # -- what goes into the towers, and what comes out of the item's -----------------------------
    def embedded(self, rows: Tensor) -> Tensor:
        """x of items, float32[..., D], zeros for PAD."""
        found: Tensor = self.tables["item"](rows)
        return found + self._content(rows)

    def _content(self, rows: Tensor) -> Tensor:
        """What an item's features add to its id, float32[..., D]; zeros for PAD."""
        at, real = rows.clamp(min=0), (rows >= 0).unsqueeze(-1)
        added: Tensor = (self.numbers[at] * real) @ self.of_numbers
        if "value" in self.tables:
            added = added + self.tables["value"](torch.where(real, self.value_rows[at].long(), PAD)).sum(-2)
        return added

    def _tower(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.item_tower(x), dim=-1)

    def vectors(self, rows: Tensor) -> Tensor:
        return self._tower(self.embedded(rows))

    def item_vectors(self) -> Tensor:
        """float32[N, D]: the item tower of every item."""
        ids_ND: Tensor = self.tables["item"].dense()  # type: ignore[operator]
        rows_N = torch.arange(self.n_items, device=ids_ND.device)
        parts = zip(torch.split(ids_ND, _BLOCK), torch.split(rows_N, _BLOCK))
        return torch.cat([self._tower(ids + self._content(rows)) for ids, rows in parts])

    # -- training --------------------------------------------------------------------------------
    def part_states(self, batch: SequenceBatch, x_BLD: Tensor) -> Tensor:
        if self.ordered:
            return super().part_states(batch, x_BLD)
        read_B1L = (torch.from_numpy(batch.inputs).to(self.device) >= 0).unsqueeze(1)
        return self.network.users(x_BLD, read_B1L).squeeze(1)

    def full_softmax(self, states: Tensor, targets_P: Tensor) -> Tensor:
        return full_softmax(states, self.item_vectors(), targets_P)

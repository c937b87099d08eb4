"""Deep learning recommendation model (Naumov et al. 2019, arXiv 1906.00091).

Every feature is a vector of D floats; numbers become one through a bottom MLP. What is learned of two
features is their dot product, and a top MLP makes a score of all of them. With e_i the vectors:

    score = MLP_top([bottom; <e_i, e_j> for i < j])          bottom = MLP_bottom(numbers), one of the e_i

The dots of the user's own vectors are computed once a user, and so is their part of the first layer.

Shapes: B users, C candidates, D dims, U vectors of a user, R of a candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recray.models.base import Catalogue
from recray.models.features import FeatureRanker
from recray.models.fields import Fields, layers


class Crossed(nn.Module):
    """Dots of all pairs of vectors, then the top MLP."""

    def __init__(self, c: FeatureRanker.Config, numbers: int, users: int, rest: int) -> None:
        super().__init__()
        self.fields = Fields(c, numbers, users, rest)
        self.from_user = nn.Linear(users * (users - 1) // 2, c.hidden[0]) if users > 1 else None
        pairs = users * rest + rest * (rest - 1) // 2
        self.from_pair = nn.Linear(pairs + (c.dim if numbers else 0), c.hidden[0])
        self.top = nn.Sequential(*layers((*c.hidden, 1), c.dropout))

    def forward(
        self,
        history_BLD: Tensor,
        mask_BL: Tensor,
        context_BXD: Tensor,
        items_BCID: Tensor,
        numbers_BCG: Tensor,
    ) -> Tensor:
        """Scores float32[B, C]."""
        user_BUD, rest_BCRD = self.fields(history_BLD, mask_BL, context_BXD, items_BCID, numbers_BCG)
        mixed = (rest_BCRD @ user_BUD.transpose(1, 2).unsqueeze(1)).flatten(2)  # [B, C, R * U]
        found = [mixed, below(rest_BCRD)]
        if self.fields.bottom is not None:
            found.append(rest_BCRD[:, :, -1])
        hidden_BCH = self.from_pair(torch.cat(found, dim=2))
        if self.from_user is not None:
            hidden_BCH = hidden_BCH + self.from_user(below(user_BUD)).unsqueeze(1)
        scores: Tensor = self.top(hidden_BCH).squeeze(-1)
        return scores


def below(x: Tensor) -> Tensor:
    """The dots of each two of n vectors, [..., n, D] -> [..., n (n - 1) / 2]."""
    dots = x @ x.transpose(-1, -2)
    lines = [dots[..., i, :i] for i in range(1, dots.shape[-1])]
    return torch.cat(lines, dim=-1) if lines else dots[..., 0, :0]


class DLRM(FeatureRanker):
    """Pairwise dots of mixed features and a top MLP."""

    name = "dlrm"

    @dataclass(frozen=True, kw_only=True)
    class Config(FeatureRanker.Config):
        pass

    network: Crossed

    def __init__(self, catalogue: Catalogue, config: DLRM.Config) -> None:
        super().__init__(catalogue, config)
        self.network = Crossed(config, catalogue.item_numbers, *self.widths)

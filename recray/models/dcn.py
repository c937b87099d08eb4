"""Deep and cross network, second version (Wang et al. 2021, arXiv 2008.13535).

All features of a pair of user and candidate are one vector x_0. Each cross layer multiplies it with a
linear map of what the layers before found, so that l of them make polynomials of degree l + 1 (eq. 1):

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l             with `rank` r: W_l = U_l V_l, U [E, r], V [r, E] (eq. 3)
    parallel: score = w . [x_l; MLP(x_0)]             stacked: score = w . MLP(x_l)        (figure 1)

Shapes: B users, C candidates, D dims, U vectors of a user, R of a candidate, E = (U + R) D.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recray.errors import ConfigError
from recray.models.base import Catalogue
from recray.models.features import FeatureRanker
from recray.models.fields import Fields, layers


class CrossNetwork(nn.Module):
    """Cross layers and a deep net over all vectors of a pair."""

    def __init__(self, c: DCN.Config, numbers: int, users: int, rest: int) -> None:
        super().__init__()
        self.fields, self.parallel = Fields(c, numbers, users, rest), c.structure == "parallel"
        wide = (users + rest) * c.dim
        self.crosses = nn.ModuleList(_map(wide, c.rank) for _ in range(c.crosses))
        self.deep = nn.Sequential(nn.Linear(wide, c.hidden[0]), *layers(c.hidden, c.dropout), nn.ReLU())
        self.out = nn.Linear(c.hidden[-1] + (wide if self.parallel else 0), 1)

    def forward(
        self,
        history_BLD: Tensor,
        mask_BL: Tensor,
        context_BXD: Tensor,
        items_BCID: Tensor,
        numbers_BCG: Tensor,
    ) -> Tensor:
        """Scores float32[B, C]."""
        user_BUD, rest_BCRD, scale_BC1 = self.fields(
            history_BLD, mask_BL, context_BXD, items_BCID, numbers_BCG
        )
        rest_BCE = rest_BCRD.flatten(2)
        user_BCE = user_BUD.flatten(1).unsqueeze(1).expand(-1, rest_BCE.shape[1], -1)
        first_BCE = torch.cat([user_BCE, rest_BCE], dim=2)
        x_BCE = first_BCE = first_BCE if scale_BC1 is None else first_BCE * scale_BC1
        for cross in self.crosses:
            x_BCE = first_BCE * cross(x_BCE) + x_BCE
        if self.parallel:
            found = torch.cat([x_BCE, self.deep(first_BCE)], dim=2)
        else:
            found = self.deep(x_BCE)
        scores: Tensor = self.out(found).squeeze(-1)
        return scores


def _map(wide: int, rank: int) -> nn.Module:
    """W x + b, of full or of low rank."""
    if not rank:
        return nn.Linear(wide, wide)
    return nn.Sequential(nn.Linear(wide, rank, bias=False), nn.Linear(rank, wide))


class DCN(FeatureRanker):
    """Explicit crosses of mixed features beside a deep net."""

    name = "dcn"

    @dataclass(frozen=True, kw_only=True)
    class Config(FeatureRanker.Config):
        dim: int = 16
        crosses: int = 2
        rank: int = 32  # of the cross layers' matrices; 0 = full
        structure: Literal["parallel", "stacked"] = "parallel"

    config: DCN.Config
    network: CrossNetwork

    def __init__(self, catalogue: Catalogue, config: DCN.Config) -> None:
        super().__init__(catalogue, config)
        if config.crosses < 0 or config.rank < 0:
            raise ConfigError("crosses and rank must be at least 0", where="options")
        self.network = CrossNetwork(config, catalogue.item_numbers, *self.widths)

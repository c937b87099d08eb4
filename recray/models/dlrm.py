"""Deep learning recommendation model (Naumov et al. 2019, arXiv 1906.00091).

Every feature is a vector of D floats; numbers become one through a bottom MLP. What is learned of two
features is their dot product, and a top MLP makes a score of all of them. With e_i the vectors:

    score = MLP_top([bottom; <e_i, e_j> for i < j])          bottom = MLP_bottom(numbers), one of the e_i

With `interaction="cat"`, the other choice of the paper's reference code, the top MLP is given the vectors.
The dots of the user's own vectors are computed once a user, and so is their part of the first layer.

Shapes: B users, C candidates, D dims, U vectors of a user, R of a candidate, P pairs of vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recray.models.base import Catalogue
from recray.models.features import FeatureRanker
from recray.models.fields import Fields, layers


class Crossed(nn.Module):
    """Dots of all pairs of vectors, or the vectors themselves, then the top MLP."""

    def __init__(self, c: DLRM.Config, numbers: int, users: int, rest: int) -> None:
        super().__init__()
        self.fields, self.dots = Fields(c, numbers, users, rest), c.interaction == "dot"
        if self.dots:
            own, pairs = users * (users - 1) // 2, users * rest + rest * (rest - 1) // 2
            pairs += c.dim if numbers else 0
        else:
            own, pairs = users * c.dim, rest * c.dim
        self.from_user = nn.Linear(own, c.hidden[0]) if own else None
        self.from_pair = nn.Linear(pairs, c.hidden[0])
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
        user_BUD, rest_BCRD, scale_BC1 = self.fields(
            history_BLD, mask_BL, context_BXD, items_BCID, numbers_BCG
        )
        own, pairs = self._dots(user_BUD, rest_BCRD) if self.dots else (user_BUD.flatten(1), rest_BCRD)
        own, pairs = own.unsqueeze(1), pairs.flatten(2)  # the user's own is one for all candidates
        if scale_BC1 is not None:
            factor_BC1 = scale_BC1.square() if self.dots else scale_BC1
            own, pairs = own * factor_BC1, pairs * factor_BC1
        if self.dots and self.fields.bottom is not None:
            bottom_BCD = rest_BCRD[:, :, -1]
            pairs = torch.cat([pairs, bottom_BCD if scale_BC1 is None else bottom_BCD * scale_BC1], dim=2)
        hidden_BCH = self.from_pair(pairs)
        if self.from_user is not None:
            hidden_BCH = hidden_BCH + self.from_user(own)
        scores: Tensor = self.top(hidden_BCH).squeeze(-1)
        return scores

    def _dots(self, user_BUD: Tensor, rest_BCRD: Tensor) -> tuple[Tensor, Tensor]:
        """Of the user's own vectors [B, U (U - 1) / 2]; with a candidate's and of those [B, C, P]."""
        mixed = (rest_BCRD @ user_BUD.transpose(1, 2).unsqueeze(1)).flatten(2)  # [B, C, R * U]
        return below(user_BUD), torch.cat([mixed, below(rest_BCRD)], dim=2)


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
        interaction: Literal["dot", "cat"] = "dot"  # what the top MLP is given

    config: DLRM.Config
    network: Crossed

    def __init__(self, catalogue: Catalogue, config: DLRM.Config) -> None:
        super().__init__(catalogue, config)
        self.network = Crossed(config, catalogue.item_numbers, *self.widths)

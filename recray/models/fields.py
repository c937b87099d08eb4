"""A history as vectors that can be crossed with a candidate's: pooled by age, and by attention.

With x_l the history's vectors, newest first, and q the candidate's:

    pooled[g] = p_0[g] + sum_l exp(a[g, l]) x_l[g] / (sum_l exp(a[g, l]))^(1/2)     learned forgetting
    attended  = sum_l w_l x_l,  w_l = exp(s_l) / (1 + sum_m exp(s_m)),  s_l = <W_q q, W_k x_l> / sqrt(d) + b_l

`attended` is target attention as in DIN (Zhou et al. 2018, arXiv 1706.06978): where nothing of the history
has to do with the candidate it is near 0, and not a mean. b_l is learned by age; d dims a head.

Shapes: B users, L history items, C candidates, D dims, G groups of them, H heads, T positions of a
sequence, X context columns, I vectors of an item, U of a user, R of a candidate.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from recray.models.features import FeatureRanker

FORGET = (0.0, 0.03, 0.1, 0.5)  # first rates of the groups: from all of the history to the newest few
GROUPS = len(FORGET)


class Pool(nn.Module):
    """Weighted sum of a history, by the age of its interactions, in G groups of dimensions."""

    def __init__(self, dim: int, max_len: int, *, fading: bool = True, empty: float = 1.0) -> None:
        """fading: whether the age of an interaction says anything; without, all weigh the same."""
        super().__init__()
        self.max_len = max_len
        rates = -np.outer(FORGET, np.arange(max_len)).astype(np.float32) * fading
        self.log_weights = nn.Parameter(torch.from_numpy(rates), requires_grad=fading)  # [G, max_len]
        self.empty = nn.Parameter(torch.full((dim,), empty))  # of 1: an item's bias is learned fast

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """x newest first, mask 1.0 where real -> [B, D]."""
        # a weight for each of the D floats, so that a graph has no shapes to find out
        length, dim = x_BLD.shape[1:]
        weights_LD = self.log_weights.exp().repeat_interleave(dim // GROUPS, dim=0).T[:length]
        weights_BLD = mask_BL.unsqueeze(2) * weights_LD
        total_BD = weights_BLD.sum(dim=1).clamp(min=1e-6)
        return self.empty + (x_BLD * weights_BLD).sum(dim=1) / total_BD.sqrt()

    def prefixes(self, x_BTD: Tensor) -> Tensor:
        """What `forward` gives for every prefix x[:, : t + 1] (oldest first), [B, T, D]."""
        b, length, dim = x_BTD.shape
        steps = torch.arange(length, device=x_BTD.device)
        age_TT = steps.unsqueeze(1) - steps.unsqueeze(0)
        weights_GTT = self.log_weights.exp()[:, age_TT.clamp(min=0)] * (age_TT >= 0)
        x_BGTd = x_BTD.reshape(b, length, GROUPS, dim // GROUPS).transpose(1, 2)
        summed_BGTd = weights_GTT @ x_BGTd / weights_GTT.sum(dim=2, keepdim=True).sqrt()
        return self.empty + summed_BGTd.transpose(1, 2).reshape(b, length, dim)


class Attention(nn.Module):
    """Weighted sums of a history, by what each candidate has to do with it."""

    def __init__(self, dim: int, heads: int, max_len: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.ages = nn.Parameter(torch.zeros(max_len, heads))

    def forward(self, query_BCD: Tensor, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """x newest first, mask 1.0 where real -> [B, C, D], head by head."""
        b, c, dim = query_BCD.shape
        part = dim // self.heads
        x_BLD, mask_BL = nn.functional.pad(x_BLD, (0, 0, 1, 0)), nn.functional.pad(mask_BL, (1, 0), value=1.0)
        length = x_BLD.shape[1]  # one more in front: zeros, of logit 0, which stand for "nothing"
        q_BHCd = self.query(query_BCD).reshape(b, c, self.heads, part).transpose(1, 2)
        k_BHLd = (self.key(x_BLD) * part**-0.5).reshape(b, length, self.heads, part).transpose(1, 2)
        x_BHLd = x_BLD.reshape(b, length, self.heads, part).transpose(1, 2)
        ages = torch.arange(length - 1, device=x_BLD.device)
        ages_HL = nn.functional.pad(nn.functional.embedding(ages, self.ages).T, (1, 0))
        added_BH1L = ages_HL.unsqueeze(1) + (mask_BL[:, None, None] - 1.0) * 1e9
        weights = torch.softmax(q_BHCd @ k_BHLd.transpose(2, 3) + added_BH1L, dim=3)
        attended: Tensor = (weights @ x_BHLd).transpose(1, 2).reshape(b, c, dim)
        return attended


class Fields(nn.Module):
    """The vectors that are crossed: the user's U, and each candidate's R.

    Norm "each" brings each to mean 0 and deviation 1 over its D floats (Ba et al. 2016), times a factor
    that is learned for each: products of first vectors near 0 are then learned as soon as others. Norm "pair"
    brings all vectors of a user and a candidate to a root mean square of 1 together (Zhang & Sennrich 2019):
    what a penalty has kept near zero then stays small beside the rest.
    """

    def __init__(self, c: FeatureRanker.Config, numbers: int, users: int, rest: int) -> None:
        super().__init__()
        self.norm = c.norm
        if c.norm == "each":
            self.of_user, self.of_rest = nn.Parameter(torch.ones(users, 1)), nn.Parameter(torch.ones(rest, 1))
        # beside others it must not be so large that nothing else is seen after the common norm
        self.pool = Pool(c.dim, c.max_len, empty=c.init if c.norm == "pair" else 1.0)
        self.drop = nn.Dropout(c.dropout)
        self.attention = Attention(c.dim, c.heads, c.max_len) if c.history == "attention" else None
        self.bottom = None
        if numbers:
            self.bottom = nn.Sequential(nn.Linear(numbers, c.dim), *layers((c.dim, c.dim), 0.0))

    def forward(
        self,
        history_BLD: Tensor,
        mask_BL: Tensor,
        context_BXD: Tensor,
        items_BCID: Tensor,
        numbers_BCG: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """([B, U, D] contexts and the pooled history, [B, C, R, D] items, attended history, numbers, and
        [B, C, 1] what both are still to be multiplied with for each candidate, None for 1)."""
        history_BLD = history_BLD * self.drop(mask_BL.unsqueeze(2))  # whole items of it
        rest = [items_BCID]
        if self.attention is not None:
            rest.append(self.attention(items_BCID.sum(dim=2), history_BLD, mask_BL).unsqueeze(2))
        if self.bottom is not None:
            rest.append(self.bottom(numbers_BCG).unsqueeze(2))
        pooled_B1D = self.pool(history_BLD, mask_BL).unsqueeze(1)
        user_BUD, rest_BCRD = torch.cat([context_BXD, pooled_B1D], dim=1), torch.cat(rest, dim=2)
        if self.norm == "each":
            return _normal(user_BUD) * self.of_user, _normal(rest_BCRD) * self.of_rest, None
        if self.norm == "off":
            return user_BUD, rest_BCRD, None
        squares_BC = user_BUD.square().sum((1, 2)).unsqueeze(1) + rest_BCRD.square().sum((2, 3))
        floats = (user_BUD.shape[1] + rest_BCRD.shape[2]) * user_BUD.shape[2]
        return user_BUD, rest_BCRD, (squares_BC / floats + 1e-12).rsqrt().unsqueeze(2)


def _normal(x: Tensor) -> Tensor:
    """Over the last dimension; a vector of zeros stays one."""
    return nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


class Drop(nn.Module):
    """Dropout of [B, C, ...] that is alike for all candidates of a user: drawn once for them."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x
        return x * nn.functional.dropout(x.new_ones(x.shape[0], 1, *x.shape[2:]), self.share)


def layers(sizes: tuple[int, ...], dropout: float) -> list[nn.Module]:
    """ReLU, dropout and a linear layer from each size to the next: what follows a first linear layer."""
    return [part for a, b in pairwise(sizes) for part in (nn.ReLU(), Drop(dropout), nn.Linear(a, b))]

"""MIND: several interests a user, found by dynamic routing (Li et al. 2019, arXiv 1904.08030).

The n behaviours of a history are routed to K(n) interests by one shared map S ("B2I routing", equations
3-8). From first logits b_ik, `iterations` times:

    w_i  = softmax_k(h b_ik)             z_k = sum_i w_ik S x_i
    u_k  = squash(z_k) = |z_k|^2 / (1 + |z_k|^2) z_k / |z_k|
    b_ik = b_ik + <u_k, S x_i>           K(n) = max(1, min(K, floor(log2 n)))
    v_k  = norm(u_k + FFN(u_k));         score(i) = max_k <v_k, E[i]> + c_k

In training a target e is answered by label-aware attention, s = sum_k softmax_k(p s_k) s_k over its K
scores s_k; the paper writes pow(s_k, p), which does not keep the order of negative numbers. Negatives are
scored as they are served, by the best interest: otherwise nothing tells the interests not to shout each
other down. No gradient goes through the routing, as usual.

Four choices are ours, since interests drift and a history has an order:
- the first logits are <r_k, x_i> / |x_i| with fixed random r_k, and not drawn for each behaviour: like
  behaviours start together, and an answer depends on the history alone;
- an interest has a clock of its own, which ticks when something is routed to it: in the last round
  behaviour i counts exp(-f t) in z_k, t = sum of w_jk over the later j;
- c_k = a log(m_k / sum m), m_k = sum_i w_ik g[age_i], says how much the user is at interest k just now.
  It is one more dimension, in which all items are 1. f, g, a and the hardness h are learned;
- with `whole` the first interest is not routed to: it has all of the history (w_i1 = 1, c_1 is learned).
  One vector can be the sum of several interests, and where that is the better answer it wins.

Every position of a training sequence is routed by its own past. Served as K queries a user whose answers
are merged; where K(n) < K the first is repeated.

Shapes: B users, L behaviours, T prefixes of a history, K interests, D dims, P positions, S negatives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recray.errors import ConfigError
from recray.models.base import Catalogue
from recray.models.embeddings import normal
from recray.models.losses import others_of_best
from recray.models.sequential import Encoder, Sequential

_FIRST_FADING = -0.3  # of log g with the age
_ABSENT = -1e9  # an interest's offset, or a behaviour's logit, where there is no such interest


class Routing(Encoder):
    """Behaviours -> interests, for one prefix or for all."""

    directions: Tensor  # float32[K, D], the r_k

    def __init__(self, c: MIND.Config) -> None:
        super().__init__()
        self.scale, self.dropout = c.dim**0.5, c.dropout
        self.interests, self.iterations, self.whole = c.interests, c.iterations, c.whole
        self.log_hardness = nn.Parameter(torch.full((1,), float(c.hardness)).log())  # log h
        self.bilinear = nn.Linear(c.dim, c.dim, bias=False)
        self.register_buffer("directions", normal(c.interests, c.dim, std=1.0).detach())
        self.log_fading = nn.Parameter(torch.zeros(1))  # log f
        self.log_ages = nn.Parameter(_FIRST_FADING * torch.arange(c.max_len).float().unsqueeze(1))  # log g
        self.offsets = nn.Parameter(torch.tensor([1.0, 0.0]))  # a, c_1
        self.up, self.down = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)
        self.norm = nn.LayerNorm(c.dim)

    def states(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """The interests after every behaviour, [B, L, K, D + 1]; one that is not there is far below all."""
        ends_1T = torch.arange(x_BLD.shape[1], device=x_BLD.device).unsqueeze(0)
        states_BTKE, _ = self.routed(x_BLD, ends_1T)
        return states_BTKE

    def forward(self, x_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        """x float32[B, L, D] item vectors oldest first, lengths int64[B] -> queries float32[B, K, D + 1].

        A user of length 0 gets zeros. L is at least 1 and at most max_len.
        """
        states_BTKE, there_BTK = self.routed(x_BLD, lengths_B.unsqueeze(1) - 1)
        states_BKE = torch.where(there_BTK[:, 0].unsqueeze(2), states_BTKE[:, 0], states_BTKE[:, 0, :1])
        return states_BKE * (lengths_B > 0).to(states_BKE.dtype).view(-1, 1, 1)

    def routed(self, x_BLD: Tensor, ends_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(interests with offsets [B, T, K, D + 1], which there are bool[B, T, K]) of x[:, : end + 1]."""
        x_BLD = nn.functional.dropout(x_BLD * self.scale, self.dropout, self.training)
        e_BLD = self.bilinear(x_BLD)
        ages_BT1L = (ends_BT.unsqueeze(2) - torch.arange(x_BLD.shape[1], device=x_BLD.device)).unsqueeze(2)
        seen_BT1L = ages_BT1L >= 0
        least_K = 2 ** torch.arange(1, self.interests + 1, device=x_BLD.device)  # so many behaviours
        there_BTK = ((ends_BT.unsqueeze(2) + 1) >= least_K) | (least_K == 2)
        w_BTKL = self._weights(x_BLD.detach(), e_BLD.detach(), seen_BT1L, there_BTK)
        later_BTKL = w_BTKL.sum(dim=3, keepdim=True) - w_BTKL.cumsum(dim=3)
        u_BTKD = squash(pooled(w_BTKL * (-self.log_fading.exp() * later_BTKL).exp(), e_BLD))
        v_BTKD = self.norm(u_BTKD + self.down(torch.relu(self.up(u_BTKD))))
        at_BT1L = ages_BT1L.clamp(0, len(self.log_ages) - 1)
        g_BT1L = nn.functional.embedding(at_BT1L, self.log_ages).squeeze(4).exp()
        mass_BTK = (w_BTKL * g_BT1L).sum(dim=3).masked_fill(self._all(), 0.0)
        share_BTK = mass_BTK / mass_BTK.sum(dim=2, keepdim=True).clamp(min=1e-6)
        activity, overall = self.offsets.unbind()
        offset_BTK = torch.where(self._all(), overall, activity * (share_BTK + 1e-4).log())
        offset_BTK = offset_BTK.masked_fill(~there_BTK, _ABSENT)
        return torch.cat([v_BTKD, offset_BTK.unsqueeze(3)], dim=3), there_BTK

    def _weights(self, x_BLD: Tensor, e_BLD: Tensor, seen_BT1L: Tensor, there_BTK: Tensor) -> Tensor:
        """w [B, T, K, L]: how much of each behaviour goes to each interest."""
        first_BKL = self.directions @ nn.functional.normalize(x_BLD, dim=2).transpose(1, 2)
        several_BT1 = there_BTK.sum(dim=2, keepdim=True) > 1
        shut_BTK = ~there_BTK | (self._all() & several_BT1)
        logits_BTKL = first_BKL.unsqueeze(1).masked_fill(shut_BTK.unsqueeze(3), _ABSENT)
        hardness = self.log_hardness.exp()
        for _ in range(self.iterations - 1):
            w_BTKL = (hardness.detach() * logits_BTKL).softmax(dim=2) * seen_BT1L
            u_BTKD = squash(pooled(w_BTKL, e_BLD))
            agreed_BXL = u_BTKD.flatten(1, 2) @ e_BLD.transpose(1, 2)  # X: prefixes by interests
            logits_BTKL = logits_BTKL + agreed_BXL.view(w_BTKL.shape)
        w_BTKL = (hardness * logits_BTKL).softmax(dim=2)
        return torch.where(self._all().unsqueeze(1), 1.0, w_BTKL) * seen_BT1L

    def _all(self) -> Tensor:
        """bool[K]: which interest is all of the history."""
        return torch.arange(self.interests, device=self.offsets.device) == (0 if self.whole else -1)


def pooled(w_BTKL: Tensor, e_BLD: Tensor) -> Tensor:
    """z [B, T, K, D], the weighted sums."""
    b, t, k, _ = w_BTKL.shape
    return (w_BTKL.flatten(1, 2) @ e_BLD).view(b, t, k, e_BLD.shape[2])


def squash(z: Tensor) -> Tensor:
    """Each vector [..., D] to a length in [0, 1), its direction kept."""
    squared = (z * z).sum(dim=-1, keepdim=True)
    return z * ((squared + 1e-12).sqrt() / (1 + squared))


class MIND(Sequential):
    """Several queries a user."""

    name = "mind"
    reads_targets = True

    @dataclass(frozen=True, kw_only=True)
    class Config(Sequential.Config):
        interests: int = 4
        iterations: int = 3
        hardness: float = 1.0  # of the routing, at first
        whole: bool = True  # whether the first interest is all of the history
        sharpness: float = 4.0  # p of the label-aware attention

    config: MIND.Config

    def __init__(self, catalogue: Catalogue, config: MIND.Config) -> None:
        if min(config.interests, config.iterations) < 1:
            raise ConfigError("interests and iterations must be at least 1", where="options")
        if not (config.hardness > 0 and config.sharpness >= 0):
            raise ConfigError("hardness must be above 0 and sharpness not below", where="options")
        super().__init__(catalogue, config)
        self.network = Routing(config)

    def scores(
        self, states: Tensor, told_P: Tensor | slice, targets_P: Tensor, negatives_S: Tensor
    ) -> tuple[Tensor, Tensor]:
        best_RS = (states @ self.vectors(negatives_S).T).amax(dim=1)
        return self._of_targets(states[told_P], targets_P), best_RS

    def full_softmax(self, states: Tensor, targets_P: Tensor) -> Tensor:
        others_P = others_of_best(states, self.item_vectors(), targets_P)
        return nn.functional.softplus(others_P - self._of_targets(states, targets_P)).sum()

    def _of_targets(self, states: Tensor, targets_P: Tensor) -> Tensor:
        """Label-aware attention: the score of each target by mostly its own interest, [P]."""
        scores_PK = (states @ self.vectors(targets_P).unsqueeze(2)).squeeze(2)
        absent_PK = states[..., -1] < _ABSENT / 2  # however blunt the attention, they take no part
        logits_PK = (scores_PK * self.config.sharpness).masked_fill(absent_PK, -torch.inf)
        return (logits_PK.softmax(dim=1) * scores_PK).sum(dim=1)

    def vectors(self, rows: Tensor) -> Tensor:
        return nn.functional.pad(super().vectors(rows), (0, 1), value=1.0)

    def item_vectors(self) -> Tensor:
        """float32[N, D + 1]: the table, and the dimension of the offsets."""
        return nn.functional.pad(super().item_vectors(), (0, 1), value=1.0)

"""Losses over next-item positions, each a small function that returns a scalar.

Shapes: P positions, D dims, N items, S sampled negatives, K states a position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LOGITS = 1 << 22  # logits in memory at a time


Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(log-sum-exp [C] over the rows at hand, target's logit [C] or 0) -> the same over all rows."""


def softmax_slopes(
    states_PD: Tensor,
    items_ND: Tensor,
    targets_P: Tensor,
    dtype: torch.dtype,
    combine: Combine | None = None,
    width: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [P], d sum / d states [P, D], d sum / d items [N, D]) of the softmax over all items.

    Chunk by chunk, so that the [P, N] logits never exist as a whole and are computed once. A target of
    -1 is not among these items; `combine` then brings in what the others hold. `width` is the largest
    N of those who combine, so that all have the same chunks.
    """
    grad_states = torch.empty_like(states_PD)
    grad_items = torch.zeros_like(items_ND, dtype=torch.float32)
    losses = states_PD.new_empty(len(states_PD))
    chunk = max(1, _LOGITS // max(1, width or len(items_ND)))
    items = items_ND.to(dtype)
    some, zero = len(items_ND) > 0, torch.zeros_like(losses)  # of a small table a rank may hold nothing
    for start in range(0, len(states_PD), chunk):
        part = slice(start, start + chunk)
        states, targets = states_PD[part].to(dtype), targets_P[part].unsqueeze(1)
        here = targets >= 0
        logits = (states @ items.T).float()
        log_z = logits.logsumexp(1)
        target = (logits.gather(1, targets.clamp(min=0)) * here).squeeze(1) if some else zero[part]
        if combine is not None:
            log_z, target = combine(log_z, target)
        losses[part] = log_z - target
        slope = logits.sub_(log_z.unsqueeze(1)).exp_()  # d loss / d logits = softmax - one hot
        if some:
            slope.scatter_add_(1, targets.clamp(min=0), -here.to(slope.dtype))
        slope = slope.to(dtype)
        grad_states[part] = (slope @ items).to(grad_states.dtype)
        grad_items += (slope.T @ states).to(grad_items.dtype)
    return losses, grad_states, grad_items


class _FullSoftmax(torch.autograd.Function):
    """Sum of cross-entropies over all items; the gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, states_PD: Tensor, items_ND: Tensor, targets_P: Tensor, dtype: torch.dtype
    ) -> Tensor:
        losses, grad_states, grad_items = softmax_slopes(states_PD, items_ND, targets_P, dtype)
        ctx.save_for_backward(grad_states, grad_items)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_states, grad_items = ctx.saved_tensors
        return grad_states * grads[0], grad_items * grads[0], None, None


def full_softmax(states_PD: Tensor, items_ND: Tensor, targets_P: Tensor) -> Tensor:
    """Summed cross-entropy of each position's target against the whole catalogue.

    Under autocast the products run in its type, the log-sum-exp in float32.
    """
    kind = states_PD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    summed: Tensor = _FullSoftmax.apply(states_PD.float(), items_ND, targets_P, dtype)  # type: ignore[no-untyped-call]
    return summed


def others_of_best(states_PKD: Tensor, items_ND: Tensor, targets_P: Tensor) -> Tensor:
    """log of sum over items i, the target left out, of exp(max_k <state_k, item_i>), float32[P].

    Chunk by chunk, the logits of each made once more in the backward pass and never kept.
    """
    chunk = max(1, _LOGITS // (states_PKD.shape[1] * len(items_ND)))
    parts = [
        checkpoint(_others_of_best, states, items_ND, targets, use_reentrant=False)
        for states, targets in zip(torch.split(states_PKD, chunk), torch.split(targets_P, chunk))
    ]
    return torch.cat(parts)


def _others_of_best(states_PKD: Tensor, items_ND: Tensor, targets_P: Tensor) -> Tensor:
    best_PN = (states_PKD @ items_ND.T).amax(dim=1).float()
    return best_PN.scatter(1, targets_P.unsqueeze(1), -torch.inf).logsumexp(dim=1)


def window_softmax(own_BL: Tensor, negative_BS: Tensor) -> Tensor:
    """-log of each one's share in the softmax over a window's own items and others, float32[B, L].

    own: scores of the items that are to be told, -inf where there is none; negative: of drawn items less
    log(S q_j), -inf where the window holds them. Its own are summed as they are and the rest is estimated:
    with all items drawn once it is the multinomial likelihood of Liang et al. 2018, arXiv 1802.05814.
    """
    return torch.cat([own_BL, negative_BS], dim=1).float().logsumexp(1, keepdim=True) - own_BL


def sampled_softmax(
    positive_P: Tensor, negative_PS: Tensor, targets_P: Tensor, negatives_S: Tensor, log_q_S: Tensor
) -> Tensor:
    """Summed softmax loss against shared negatives with the log-Q correction.

    The partition function is estimated by `exp(s_t) + sum_j exp(s_j) / (S q_j)` over the draws j that
    are not the target; `log_q_S` is log(S q_j). It converges to the full softmax as S grows (Bengio
    and Senecal 2008; Yi et al. 2019 for in-batch negatives).
    """
    summed: Tensor = _SampledSoftmax.apply(positive_P, negative_PS, targets_P, negatives_S, log_q_S)  # type: ignore[no-untyped-call]
    return summed


class _SampledSoftmax(torch.autograd.Function):
    """The sum; its gradients are made in the forward pass, in the memory of the corrected logits."""

    @staticmethod
    def forward(
        ctx: Any,
        positive_P: Tensor,
        negative_PS: Tensor,
        targets_P: Tensor,
        negatives_S: Tensor,
        log_q_S: Tensor,
    ) -> Tensor:
        corrected = (negative_PS - log_q_S).float()
        corrected.masked_fill_(targets_P.unsqueeze(1) == negatives_S, -torch.inf)
        log_z = torch.logaddexp(corrected.logsumexp(1), positive_P.float())
        slope = corrected.sub_(log_z.unsqueeze(1)).exp_()
        own = (positive_P - log_z).exp_() - 1
        ctx.save_for_backward(own.to(positive_P.dtype), slope.to(negative_PS.dtype))
        return (log_z - positive_P).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        own, slope = ctx.saved_tensors
        return own * grads[0], slope * grads[0], None, None, None

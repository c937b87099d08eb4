"""The losses against plain torch, their gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from recray.models import losses

torch.set_num_threads(1)


def case(p: int = 40, n: int = 17, d: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(0)
    states = torch.randn(p, d, generator=made, requires_grad=True)
    items = torch.randn(n, d, generator=made, requires_grad=True)
    return states, items, torch.randint(n, (p,), generator=made)


@pytest.mark.parametrize("room", [1 << 22, 17 * 7, 1])
def test_full_softmax_is_cross_entropy_whatever_the_chunk(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_LOGITS", room)
    states, items, targets = case()
    ours = losses.full_softmax(states, items, targets)
    plain = nn.functional.cross_entropy(states @ items.T, targets, reduction="sum")
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, [states, items]), torch.autograd.grad(3 * plain, [states, items])
    ):
        torch.testing.assert_close(mine, theirs)


def test_full_softmax_under_autocast_is_near() -> None:
    states, items, targets = case()
    plain = losses.full_softmax(states, items, targets).item()
    with torch.autocast("cpu", torch.bfloat16):
        low = losses.full_softmax(states, items, targets)
    assert low.dtype == torch.float32
    assert low.item() != plain
    assert low.item() == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("skewed", [False, True])
def test_sampled_softmax_goes_to_the_full_one(skewed: bool) -> None:
    states, items, targets = case()
    q = torch.arange(1, 18).float() ** 2 if skewed else torch.ones(17)
    q = q / q.sum()
    count = 200_000
    drawn = torch.multinomial(q, count, replacement=True, generator=torch.Generator().manual_seed(1))
    log_q = (q[drawn] * count).log()
    positive = (states * items[targets]).sum(1)
    sampled = losses.sampled_softmax(positive, states @ items[drawn].T, targets, drawn, log_q)
    full = losses.full_softmax(states, items, targets)
    assert sampled.item() == pytest.approx(full.item(), rel=0.01)


def test_sampled_softmax_has_the_gradient_of_its_formula() -> None:
    states, items, targets = case()
    drawn = torch.randint(17, (60,), generator=torch.Generator().manual_seed(2))
    log_q = torch.linspace(-1, 1, 60)

    def parts() -> tuple[Tensor, Tensor]:
        return (states * items[targets]).sum(1), states @ items[drawn].T

    positive, negative = parts()
    kept = (targets.unsqueeze(1) != drawn).float()
    others = ((negative - log_q).exp() * kept).sum(1)
    plain = ((positive.exp() + others).log() - positive).sum()
    ours = losses.sampled_softmax(*parts(), targets, drawn, log_q)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, [states, items]), torch.autograd.grad(3 * plain, [states, items])
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_target_drawn_as_negative_does_not_count() -> None:
    positive, negative = torch.tensor([1.0]), torch.tensor([[5.0, 2.0]])
    targets, drawn = torch.tensor([3]), torch.tensor([3, 4])
    only = torch.tensor([1.0, 2.0])
    got = losses.sampled_softmax(positive, negative, targets, drawn, torch.zeros(2))
    assert got.item() == pytest.approx((only.logsumexp(0) - 1).item())

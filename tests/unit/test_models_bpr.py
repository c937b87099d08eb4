"""BPR: learns an order, and folds a history in to where the loss of a user is least."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.bpr import Pairs, Rows, step
from recray.recipes import recipe

torch.set_num_threads(1)

ITEMS = 40


class Data:
    """Two kinds of users: each takes ten of the twenty items of its kind, popular ones more often."""

    n_items, n_users = ITEMS, 120

    def histories(self, split: str = "train") -> Histories:
        rng = np.random.default_rng(0)
        chance = 1 / np.arange(1, 21)
        rows = [rng.choice(20, 10, False, chance / chance.sum()) + 20 * (u % 2) for u in range(self.n_users)]
        return Histories.of(rows)


def model_of(**changes: Any) -> Any:
    options = {"dim": 6, "epochs": 40, "batch": 64, **changes}
    return build_model("bpr", Catalogue(ITEMS, {}), options)


@cache
def fitted(draws: int = 1) -> Any:
    model = model_of(draws=draws)
    told = model.fit(Data(), seed=3)
    assert told["pairs"] == 1200
    assert 0 < told["loss"] < np.log(2)
    return model.eval()


def loss_of(model: Any, history: list[int], w: NDArray[Any]) -> float:
    """The docstring's loss of one user, its items distinct, negatives alike over all others."""
    table = model.tables["item"].weight.detach().double().numpy()
    scores = table[:, :-1] @ w + table[:, -1]
    taken = sorted(set(history))
    others = [j for j in range(ITEMS) if j not in taken]
    wrong = np.logaddexp(0, scores[others] - scores[taken][:, None]).sum() / ITEMS
    return float(wrong + model.config.reg / 2 * len(taken) * w @ w)


@pytest.mark.parametrize("draws", [1, 4])
def test_items_of_ones_own_kind_come_first(draws: int) -> None:
    known = Data().histories().take(slice(20))
    found = fitted(draws).score(Histories.of([known[u][:6] for u in range(20)])).view(20, 2, 20)
    kind = torch.arange(20) % 2
    own, other = found[torch.arange(20), kind], found[torch.arange(20), 1 - kind]
    assert (own.unsqueeze(2) > other.unsqueeze(1)).float().mean() > 0.9


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=15))
def test_folding_in_finds_the_least_loss(history: list[int]) -> None:
    model = fitted()
    best = minimize(lambda w: loss_of(model, history, w), np.zeros(6), method="BFGS")
    model.config = type(model.config)(dim=6, steps=200)
    try:
        w = model.encode(Histories.of([history]))[0, 0].double().numpy()
    finally:
        model.config = type(model.config)(dim=6)
    assert w[-1] == 1
    assert loss_of(model, history, w[:-1]) < best.fun + 1e-4 * abs(best.fun) + 1e-5


def test_each_step_of_folding_in_lowers_the_loss() -> None:
    model, history = fitted(), [0, 1, 2, 25]
    losses = [loss_of(model, history, np.zeros(6))]
    for steps in range(1, 8):
        model.config = type(model.config)(dim=6, steps=steps)
        losses.append(loss_of(model, history, model.encode(Histories.of([history]))[0, 0, :-1].numpy()))
    model.config = type(model.config)(dim=6)
    assert all(a >= b - 1e-6 for a, b in pairwise(losses))
    assert losses[1] - losses[-1] < 0.3 * (losses[0] - losses[-1])  # the first step is most of the way


def test_an_empty_history_is_shown_what_is_popular() -> None:
    found = fitted().encode(Histories.of([[]]))[0, 0]
    assert found[-1] == 1
    assert not found[:-1].any()
    scores = fitted().score(Histories.of([[]]))[0]
    counts = np.bincount(Data().histories().items, minlength=ITEMS)
    assert np.corrcoef(scores.numpy(), counts)[0, 1] > 0.7


def test_a_repeated_item_counts_once_and_order_does_not() -> None:
    model = fitted()
    found = model.encode(Histories.of([[3, 5, 5, 3, 9], [9, 5, 3]]))
    torch.testing.assert_close(found[0], found[1])


def pairwise_loss(w: torch.Tensor, h: torch.Tensor, taken: NDArray[Any]) -> torch.Tensor:
    """Of user 0 and what it took, beside item 3."""
    return torch.nn.functional.softplus(-(w[0] @ (h[taken] - h[3]).T)).sum()


@pytest.mark.parametrize("adversarial", [0.0, 0.2])
def test_a_step_follows_the_gradient(adversarial: float) -> None:
    """The first AdaGrad step of a row is lr times its gradient over the gradient's size, all by autograd."""
    c = model_of(dim=3, reg=0.05, lr=0.01, adversarial=adversarial).config
    rng = np.random.default_rng(0)
    users, items = (Rows(rng.normal(size=(n, 4)).astype(np.float32), c) for n in (2, 5))
    users.values[:, -1] = 1
    pairs = Pairs(Histories.of([[0, 1, 2, 4], [2]]), 5)
    w = torch.tensor(users.values, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(items.values, dtype=torch.float64, requires_grad=True)
    some = np.array([0, 1, 2])  # user 0's: only item 3 is left for a negative
    taken = pairs.items[some]
    total = pairwise_loss(w, h, taken)
    if adversarial:
        by_w, by_h = torch.autograd.grad(total, (w, h), retain_graph=True)
        by_w[:, -1] = 0
        far_w, far_h = w.detach().clone(), h.detach().clone()
        for far, by in ((far_w[:1, :-1], by_w[:1, :-1]), (far_h[:5], by_h[:5])):
            far += adversarial * far.norm(dim=1, keepdim=True) * by.sign() / far.shape[1] ** 0.5
        total = (total + pairwise_loss(w + (far_w - w).detach(), h + (far_h - h).detach(), taken)) / 2
    for i in taken:
        total = total + 0.025 * (w[0, :-1].square().sum() + h[i].square().sum() + h[3].square().sum())
    total.backward()  # type: ignore[no-untyped-call]
    assert w.grad is not None
    assert h.grad is not None
    w.grad[:, -1] = 0
    before = users.values.copy(), items.values.copy()
    step(users, items, pairs, some, 200, np.random.default_rng(1))
    for rows, start, grad in zip((users, items), before, (w.grad.numpy(), h.grad.numpy())):
        size = np.sqrt((grad**2).mean(1, keepdims=True))
        wanted = start - 0.01 * np.divide(grad, size, out=np.zeros_like(grad), where=size > 0)
        np.testing.assert_allclose(rows.values, wanted, atol=1e-5)


def test_what_was_taken_is_no_negative() -> None:
    pairs = Pairs(Histories.of([[3, 1, 3], [], [0]]), 4)
    users, items = np.meshgrid(np.arange(3), np.arange(4), indexing="ij")
    wanted = [[False, True, False, True], [False] * 4, [True, False, False, False]]
    assert pairs.taken(users, items).tolist() == wanted
    assert len(pairs) == 3
    everything = Pairs(Histories.of([[0, 1]]), 2)  # nothing is left to draw
    c = model_of(dim=3).config
    rows = [Rows(np.ones((n, 4), np.float32), c) for n in (1, 2)]
    assert step(*rows, everything, np.array([0, 1]), 3, np.random.default_rng(0)) == 0.0
    assert np.isfinite(rows[1].values).all()


@given(st.lists(st.sets(st.integers(0, 300)), min_size=1, max_size=8))
def test_pairs_of_the_log_are_told_from_all_others(histories: list[set[int]]) -> None:
    pairs = Pairs(Histories.of([sorted(history) for history in histories]), 301)
    users, items = np.meshgrid(np.arange(len(histories)), np.arange(301), indexing="ij")
    wanted = [[item in history for item in range(301)] for history in histories]
    assert pairs.taken(users, items).tolist() == wanted


def test_the_hardest_of_several_draws_is_weighed_as_often_as_it_is_drawn() -> None:
    model = model_of(draws=3)
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.9, 0.0]])
    drawn = np.random.default_rng(0).integers(5, size=(40_000, 3))
    hardest = drawn[np.arange(len(drawn)), scores[0].numpy()[drawn].argmax(1)]
    wanted = np.bincount(hardest, minlength=5) / len(drawn)
    np.testing.assert_allclose(model.chances(scores)[0].numpy(), wanted, atol=0.01)
    torch.testing.assert_close(model_of().chances(scores), torch.full((1, 5), 0.2))


@pytest.mark.parametrize(
    "changes", [{"dim": 0}, {"epochs": 0}, {"reg": 0.0}, {"lr": 0.0}, {"std": -1.0}, {"adversarial": -1.0}]
)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        model_of(**changes)


def test_the_recipe_names_options_the_model_knows() -> None:
    build_model("bpr", Catalogue(5, {}), recipe("bpr").options)

"""MIND: routing against plain numpy, interests that part, a softmax over the best of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from recray.data.sequences import Histories
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.losses import others_of_best
from recray.models.mind import squash
from recray.recommender import Recommender
from tests.models_data import SmallData

torch.set_num_threads(1)


def small(n_items: int = 30, **changes: Any) -> Any:
    options = {"dim": 8, "max_len": 12, "dropout": 0.0, **changes}
    return build_model("mind", Catalogue(n_items, {}), options).eval()


def softmax(x: NDArray[Any], axis: int) -> NDArray[Any]:
    shifted = np.exp(x - x.max(axis, keepdims=True))
    return shifted / shifted.sum(axis, keepdims=True)


def by_hand(model: Any, rows: list[int]) -> NDArray[Any]:
    """The interests of one history [K(n), D + 1], step by step as the docstring says."""
    c, net = model.config, model.network
    weight = {name: value.detach().double().numpy() for name, value in net.state_dict().items()}
    x = model.tables["item"].weight.detach().double().numpy()[rows] * c.dim**0.5
    e = x @ weight["bilinear.weight"].T
    n, k = len(rows), max(1, min(c.interests, int(np.log2(len(rows)))))
    b = x / np.linalg.norm(x, axis=1, keepdims=True) @ weight["directions"][:k].T
    all_of_it = c.whole and k > 1
    if all_of_it:
        b[:, 0] = -np.inf
    hardness = np.exp(weight["log_hardness"])
    for _ in range(c.iterations - 1):
        z = softmax(hardness * b, 1).T @ e
        squared = (z**2).sum(1, keepdims=True)
        b = b + e @ (squared / (1 + squared) * z / np.sqrt(np.maximum(squared, 1e-12))).T
    w = softmax(hardness * b, 1)
    if c.whole:
        w[:, 0] = 1
    later = np.array([w[i + 1 :].sum(0) for i in range(n)])
    z = (w * np.exp(-np.exp(weight["log_fading"]) * later)).T @ e
    squared = (z**2).sum(1, keepdims=True)
    u = squared / (1 + squared) * z / np.sqrt(squared)
    hidden = np.maximum(u @ weight["up.weight"].T + weight["up.bias"], 0)
    v = u + hidden @ weight["down.weight"].T + weight["down.bias"]
    v = (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)
    v = v * weight["norm.weight"] + weight["norm.bias"]
    mass = (w * np.exp(weight["log_ages"][:n][::-1])).sum(0)
    if c.whole:
        mass[0] = 0
    offset = weight["offsets"][0] * np.log(mass / max(mass.sum(), 1e-6) + 1e-4)
    if c.whole:
        offset[0] = weight["offsets"][1]
    return np.concatenate([v, offset[:, None]], 1)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 29), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 4), st.booleans()
)
def test_routing_is_what_the_docstring_says(
    rows: list[int], interests: int, iterations: int, whole: bool
) -> None:
    model = small(interests=interests, iterations=iterations, whole=whole)
    torch.manual_seed(len(rows))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    wanted = by_hand(model, rows)
    found = model.encode(Histories.of([rows]))[0].numpy()
    assert found.shape == (interests, 9)
    np.testing.assert_allclose(found[: len(wanted)], wanted, atol=2e-4)
    for repeated in found[len(wanted) :]:
        np.testing.assert_allclose(repeated, wanted[0], atol=2e-4)


@pytest.mark.parametrize(("n", "wanted"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 2), (8, 3), (12, 3)])
def test_as_many_interests_as_the_logarithm_of_a_history(n: int, wanted: int) -> None:
    model = small(interests=5, whole=False)
    queries = model.encode(Histories.of([list(range(n))]))[0]
    assert len(queries.unique(dim=0)) == wanted


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_squashed_vectors_are_shorter_than_one(values: list[float]) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    found, length = squash(z), z.norm()
    assert found.norm() < 1
    torch.testing.assert_close(found * (1 + length**2), z * length, atol=1e-4, rtol=1e-4)


def test_a_zero_vector_has_a_finite_gradient() -> None:
    z = torch.zeros(3, requires_grad=True)
    squash(z).sum().backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_others_of_best_is_the_whole_sum_and_its_gradient() -> None:
    torch.manual_seed(0)
    states = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    items = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3, 3, 1])

    def naive() -> torch.Tensor:
        scores = torch.einsum("pkd,nd->pkn", states, items).amax(1)
        kept = torch.ones_like(scores).scatter(1, targets.unsqueeze(1), 0)
        return (scores.exp() * kept).sum(1).log()

    torch.testing.assert_close(others_of_best(states, items, targets), naive().float())
    weights = torch.arange(5.0)
    found = torch.autograd.grad((others_of_best(states, items, targets) * weights).sum(), (states, items))
    wanted = torch.autograd.grad((naive() * weights).sum(), (states, items))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_target_is_answered_by_its_own_interest() -> None:
    """With great sharpness its score is the best interest's, with none the mean of all."""
    model = small(interests=3, sharpness=1000.0)
    states = torch.randn(6, 3, 9)
    rows = torch.arange(6)
    each = torch.einsum("pkd,pd->pk", states, model.vectors(rows))
    found, _ = model.scores(states, slice(None), rows, torch.arange(4))
    torch.testing.assert_close(found, each.amax(1), atol=1e-3, rtol=1e-3)
    flat, _ = small(interests=3, sharpness=0.0).scores(states, slice(None), rows, torch.arange(4))
    other = torch.einsum("pkd,pd->pk", states, small(interests=3).vectors(rows))
    torch.testing.assert_close(flat, other.mean(1))


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
@pytest.mark.parametrize("sharpness", [0.0, 1e-9, 0.1])
def test_interests_that_are_not_there_take_no_part(loss: str, sharpness: float) -> None:
    model = small(loss=loss, sharpness=sharpness, negatives=10)
    (batch,) = model.batches(
        SmallData(30, two_chains(20, 2)), batch_size=20, epoch=1, seed=0, rank=0, world=1
    )
    value = model.loss(batch)
    value.backward()
    assert 0 < float(value.detach()) < 20
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    states = model.states(batch)
    targets = torch.from_numpy(batch.targets[batch.targets >= 0])
    found, _ = model.scores(states, slice(None), targets, torch.arange(4))
    each = torch.einsum("pkd,pd->pk", states, model.vectors(targets))
    for score, own, state in zip(found, each, states):
        real = own[state[:, -1] > -1e8]
        torch.testing.assert_close(score, ((sharpness * real).softmax(0) * real).sum())


def two_chains(users: int, seed: int) -> Histories:
    """Items 0-14 and 15-29 are two rings; a user walks on both, now a step here, now there."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(users):
        at = rng.integers(0, 15, 2)
        walk = []
        for ring in rng.integers(0, 2, 10):
            walk.append(int(15 * ring + at[ring] % 15))
            at[ring] += 1
        rows.append(walk)
    return Histories.of(rows)


class Data:
    """Histories alone."""

    n_items = 30

    def histories(self, split: str = "train") -> Histories:
        return two_chains(400, 0)


def next_of_both(model: Any) -> float:
    """How often the next items of both chains are the first two answers."""
    asked = two_chains(100, 1)
    top = Recommender(model).recommend(asked, 2).rows
    right = 0
    for b in range(len(asked)):
        last = [[i for i in asked[b] if i // 15 == ring] for ring in range(2)]
        wanted = {(walk[-1] + 1) % 15 + 15 * ring for ring, walk in enumerate(last) if walk}
        right += wanted <= set(top[b].tolist())
    return right / len(asked)


def test_each_interest_goes_on_in_its_own_chain() -> None:
    """Where dimensions are few: of many, one query can be the sum of several interests."""
    shares = {}
    for interests in (1, 2):
        model = small(interests=interests, whole=False).train()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for epoch in range(20):
            for batch in model.batches(Data(), batch_size=64, epoch=epoch, seed=0, rank=0, world=1):
                optimizer.zero_grad()
                model.loss(batch).backward()
                optimizer.step()
        shares[interests] = next_of_both(model.eval())
    assert shares[2] > 0.4
    assert shares[2] > shares[1] + 0.1

"""The second pass of adversarial training against autograd, and the attack that measures it."""

from __future__ import annotations

from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue, Model, Retriever
from recray.models.fgsm import fgsm
from recray.training.adversarial import attacked, perturbed
from recray.training.row_update import RowOptimizer
from recray.training.tables import shard
from recray.training.wire import AloneWire
from tests.models_data import ring

DATA = ring(60, 23)
SAMPLED = {
    "dim": 8,
    "blocks": 1,
    "heads": 1,
    "max_len": 6,
    "dropout": 0.0,
    "loss": "sampled",
    "negatives": 10,
}
SIZE = 0.3


def fresh(**options: Any) -> Model:
    return build_model("sasrec", Catalogue(23, {}), {**SAMPLED, **options}, seed=0)


def batch_of(model: Model) -> Any:
    return next(
        islice(model.batches(DATA, batch_size=16, epoch=1, seed=0, rank=0, world=1), 1)  # type: ignore[arg-type]
    )


def test_a_perturbation_is_as_long_as_it_should_be_and_goes_up() -> None:
    rows, grads = torch.randn(5, 8), torch.randn(5, 8)
    grads[3] = 0
    grads[4, 2:] = 0  # what has no gradient stays
    moved = fgsm(rows, grads, SIZE)
    lengths = (moved - rows).norm(dim=1) / torch.stack([*rows[:4].norm(dim=1), rows[4, :2].norm()])
    torch.testing.assert_close(lengths, torch.tensor([SIZE, SIZE, SIZE, 0, SIZE]))
    assert (((moved - rows) * grads).sum(1) >= 0).all()
    assert torch.equal((moved - rows).sign()[:3], grads.sign()[:3])


def test_both_passes_give_the_gradients_that_autograd_gives() -> None:
    plain, model = fresh(), fresh()
    batch = batch_of(plain)
    weight = plain.tables["item"].weight
    plain.loss(batch).backward()  # type: ignore[no-untyped-call]
    first = weight.grad.clone()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(fgsm(before, first, SIZE))
    plain.loss(batch).backward()  # type: ignore[no-untyped-call]
    both = weight.grad

    (table,) = shard(model, AloneWire(), RowOptimizer("sgd")).values()
    table.take(table.route(model.lookups(batch)["item"]))
    model.loss(batch).backward()  # type: ignore[no-untyped-call]
    with perturbed([table], SIZE):
        model.loss(batch).backward()  # type: ignore[no-untyped-call]
    table.step(1.0)
    torch.testing.assert_close(before - table.dense().detach(), both, rtol=1e-4, atol=1e-6)
    for name, parameter in model.network.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(parameter.grad, plain.network.get_parameter(name).grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
def test_rows_are_what_they_were_after_it_and_the_loss_was_higher(loss: str) -> None:
    model = fresh(loss=loss)
    batch = batch_of(model)
    (table,) = shard(model, AloneWire(), RowOptimizer("sgd")).values()
    before, first = table.weight.clone(), model.loss(batch)
    first.backward()  # type: ignore[no-untyped-call]
    with perturbed([table], SIZE):
        assert model.loss(batch) > first
    assert torch.equal(table.weight, before)
    table.forget()
    assert torch.equal(model.loss(batch), first)


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
def test_a_batch_is_perturbed_by_its_own_gradients(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by those of the batches before it in its step."""
    told: list[list[torch.Tensor]] = []

    def spied(rows: torch.Tensor, grads: torch.Tensor, size: float) -> torch.Tensor:
        told[-1].append(grads.clone())
        return fgsm(rows, grads, size)

    monkeypatch.setattr("recray.training.adversarial.fgsm", spied)
    for skipped in (1, 0):
        model = fresh(loss=loss)
        drawn = model.batches(DATA, batch_size=16, epoch=1, seed=0, rank=0, world=1)  # type: ignore[arg-type]
        (table,) = shard(model, AloneWire(), RowOptimizer("sgd")).values()
        told.append([])
        for batch in list(islice(drawn, 2))[skipped:]:
            told[-1].clear()
            model.loss(batch).backward()  # type: ignore[no-untyped-call]
            with perturbed([table], SIZE):
                model.loss(batch).backward()  # type: ignore[no-untyped-call]
            table.send_back()
    for alone, behind in zip(*told, strict=True):
        torch.testing.assert_close(alone, behind)


def noisy(rows: torch.Tensor, size: float) -> torch.Tensor:
    """Moved as far as an attack moves them, anywhere."""
    away = torch.nn.functional.normalize(torch.randn(rows.shape, generator=torch.manual_seed(1)), dim=1)
    return rows + size * rows.norm(dim=1, keepdim=True) * away


def test_an_attack_moves_a_copy_as_far_as_it_says_and_hurts_more_than_noise() -> None:
    model = fresh(loss="softmax").eval()
    hurt = attacked(model, DATA, SIZE, batch_size=16)
    rows, moved = model.tables["item"].weight, hurt.tables["item"].weight
    torch.testing.assert_close((moved - rows).norm(dim=1), SIZE * rows.norm(dim=1))
    batch, noise = batch_of(model), fresh(loss="softmax").eval()
    noise.tables["item"].weight.data = noisy(rows.detach(), SIZE)
    assert hurt.loss(batch) > noise.loss(batch)
    assert hurt.loss(batch) > model.loss(batch)
    assert moved.grad is None


@cache
def factors() -> Any:
    """BPR, fitted."""
    model = build_model("bpr", Catalogue(23, {}), {"dim": 6, "epochs": 40, "batch": 64, "anchors": 7})
    model.fit(DATA, seed=0)
    return model.eval()


def test_the_gradients_of_served_factors_are_those_of_autograd() -> None:
    model = factors()
    known = DATA.histories()
    users = model.encode(known)[:, 0]
    w = users.clone().requires_grad_()
    h = model.item_vectors().detach().clone().requires_grad_()
    loss = torch.zeros(())
    for u in range(len(known)):
        taken = sorted(set(known[u].tolist()))
        others = [j for j in range(23) if j not in taken]
        s = h @ w[u]
        loss = loss + torch.nn.functional.softplus(s[others] - s[taken].unsqueeze(1)).sum() / 23
    loss.backward()  # type: ignore[no-untyped-call]
    by_user, by_item = model.gradients(known, users)
    assert w.grad is not None
    assert not by_user[:, -1].any()
    torch.testing.assert_close(by_user[:, :-1], w.grad[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_item, h.grad, rtol=1e-4, atol=1e-5)


def test_an_attack_on_served_factors_moves_users_and_items_and_hurts_more_than_noise() -> None:
    model, known = factors(), DATA.histories()
    assert torch.equal(served(attacked(model, DATA, 0.0)).score(known), model.score(known))
    hurt = served(attacked(model, DATA, SIZE))
    users, items = model.encode(known)[:, 0], model.item_vectors().detach()
    moved_users, moved_items = hurt.encode(known)[:, 0], hurt.item_vectors()
    torch.testing.assert_close((moved_items - items).norm(dim=1), SIZE * items.norm(dim=1))
    vectors = users[:, :-1]
    torch.testing.assert_close((moved_users - users).norm(dim=1), SIZE * vectors.norm(dim=1))
    assert torch.equal(hurt.encode(Histories.of([[]])), model.encode(Histories.of([[]])))
    noisy_users = torch.cat([noisy(vectors, SIZE), users[:, -1:]], 1)
    clean, noise, attack = (
        loss_of(scores, known)
        for scores in (users @ items.T, noisy_users @ noisy(items, SIZE).T, hurt.score(known))
    )
    assert attack - clean > 2 * abs(noise - clean)


def served(model: Model) -> Retriever:
    assert isinstance(model, Retriever)
    return model


def loss_of(scores: torch.Tensor, known: Histories) -> float:
    """Mean loss of pairs of what was taken and what was not."""
    taken = torch.from_numpy(known.to_csr(23).toarray() > 0)
    each = [torch.nn.functional.softplus(s[~t] - s[t].unsqueeze(1)).sum() for s, t in zip(scores, taken)]
    return float(torch.stack(each).sum() / taken.sum())


def test_without_the_option_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*asked: Any) -> None:
        raise AssertionError("moved")

    monkeypatch.setattr("recray.models.bpr.fgsm", never)
    options = {"dim": 6, "epochs": 2, "batch": 64}
    plain = build_model("bpr", Catalogue(23, {}), options)
    plain.fit(DATA, seed=0)
    with pytest.raises(AssertionError, match="moved"):
        build_model("bpr", Catalogue(23, {}), {**options, "adversarial": 0.1}).fit(DATA, seed=0)


def test_factors_trained_under_attack_lose_less_by_it() -> None:
    plain = factors()
    options = {"dim": 6, "epochs": 40, "batch": 64, "anchors": 7, "adversarial": 0.3}
    hardened = build_model("bpr", Catalogue(23, {}), options)
    hardened.fit(DATA, seed=0)
    lost = []
    for model in (plain, hardened.eval()):
        known = DATA.histories()
        before = loss_of(served(model).score(known), known)
        lost.append(loss_of(served(attacked(model, DATA, SIZE)).score(known), known) / before - 1)
    assert lost[1] < 0.7 * lost[0]


def test_a_model_without_a_loss_cannot_be_attacked() -> None:
    with pytest.raises(ConfigError, match="popularity has no loss"):
        attacked(build_model("popularity", Catalogue(23, {}), {}), DATA, SIZE)  # type: ignore[arg-type]

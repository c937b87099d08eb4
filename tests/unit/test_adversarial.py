"""The second pass of adversarial training against autograd, and the attack that measures it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue, Model
from recray.training.adversarial import attacked, perturbed, worse
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
    moved = worse(rows, grads, SIZE)
    lengths = (moved - rows).norm(dim=1) / rows.norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([SIZE, SIZE, SIZE, 0, SIZE]))
    assert ((moved - rows) * grads).sum() > 0


def test_both_passes_give_the_gradients_that_autograd_gives() -> None:
    plain, model = fresh(), fresh()
    batch = batch_of(plain)
    weight = plain.tables["item"].weight
    plain.loss(batch).backward()  # type: ignore[no-untyped-call]
    first = weight.grad.clone()
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(worse(before, first, SIZE))
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


def test_an_attack_moves_a_copy_as_far_as_it_says_and_hurts() -> None:
    model = fresh(loss="softmax").eval()
    hurt = attacked(model, DATA, SIZE, batch_size=16)
    rows, moved = model.tables["item"].weight, hurt.tables["item"].weight
    torch.testing.assert_close((moved - rows).norm(dim=1), SIZE * rows.norm(dim=1))
    batch = batch_of(model)
    assert hurt.loss(batch) > model.loss(batch)
    assert moved.grad is None


def test_a_model_without_a_loss_cannot_be_attacked() -> None:
    with pytest.raises(ConfigError, match="popularity has no loss"):
        attacked(build_model("popularity", Catalogue(23, {}), {}), DATA, SIZE)  # type: ignore[arg-type]

"""Optimizers of rows: what bfloat16 rounds away has mean zero, and only the rows that are named move."""

from __future__ import annotations

import pytest
import torch

from recray.training.row_update import Noise, RowOptimizer, rounded


def test_rounding_is_right_in_the_mean_and_depends_on_row_and_step_alone() -> None:
    rows = torch.full((4096, 16), 1.0 + 1 / 1024)  # an eighth of the way between two numbers of bfloat16
    places = torch.arange(4096)
    made = rounded(rows.clone(), places, Noise(3, 100))
    assert set(made.float().unique().tolist()) == {1.0, 1.0 + 1 / 128}
    assert abs(made.double().mean().item() - rows.double().mean().item()) < 1e-4
    again = rounded(rows[50:60].clone(), places[:10], Noise(3, 150))
    assert torch.equal(made[50:60].view(torch.int16), again.view(torch.int16)), "the same row of another rank"
    assert not torch.equal(made.view(torch.int16), rounded(rows, places, Noise(4, 100)).view(torch.int16))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf")])
def test_what_bfloat16_can_say_stays_as_it_is(value: float) -> None:
    rows = torch.full((64, 8), value)
    made = rounded(rows.clone(), torch.arange(64), Noise(1))
    assert torch.equal(made.float(), rows)


def test_what_is_no_number_stays_none() -> None:
    made = rounded(torch.full((64, 8), float("nan")), torch.arange(64), Noise(1))
    assert made.isnan().all()


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    weight = torch.ones(8, 32, dtype=torch.bfloat16)
    sgd = RowOptimizer("sgd")
    for step in range(1000):
        sgd.step(weight, {}, torch.arange(8), torch.ones(8, 32), lr=1e-4, noise=Noise(step))
    assert abs(weight.float().mean().item() - 0.9) < 0.01, "plain rounding would have stayed at 1"


@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
def test_a_penalty_is_its_gradient_added(kind: str) -> None:
    rows, grad = torch.randn(5, 4), torch.randn(5, 4)
    made = []
    for optimizer, given in (
        (RowOptimizer(kind, l2=0.2), grad),  # type: ignore[arg-type]
        (RowOptimizer(kind), grad + 0.4 * rows),  # type: ignore[arg-type]
    ):
        weight = rows.clone()
        slots = {name: torch.zeros(5, *shape) for name, shape in optimizer.slots(4).items()}
        optimizer.step_all(weight, slots, given, lr=0.1, scale=0.5)
        made.append(weight)
    torch.testing.assert_close(made[0], made[1])


@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_touched_rows_move_and_all_rows_at_once_are_the_same(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, 4, generator=generator).to(dtype)
    grad = torch.randn(20, 4, generator=generator)
    optimizer = RowOptimizer(kind, weight_decay=0.1)  # type: ignore[arg-type]
    some, whole = start.clone(), start.clone()
    shapes = optimizer.slots(4)
    slots = [{name: torch.zeros(20, *shape) for name, shape in shapes.items()} for _ in range(2)]
    touched = torch.tensor([3, 4, 17])
    optimizer.step(some, slots[0], touched, grad[touched], lr=0.1, scale=0.5)
    optimizer.step_all(whole, slots[1], grad, lr=0.1, scale=0.5)
    others = torch.ones(20, dtype=torch.bool)
    others[touched] = False
    assert torch.equal(some[others], start[others])
    torch.testing.assert_close(some[touched], whole[touched])
    assert (whole != start).any(dim=1).all()
    for name, slot in slots[0].items():
        torch.testing.assert_close(slot[touched], slots[1][name][touched])
        assert not slot[others].any()

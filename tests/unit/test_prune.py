"""Pruning finds what is dead, leaves out what it says, and without dead parts nothing changes."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from recray.compression.prune import Measure, dense_parameters, importance, pruned
from recray.compression.units import groups, sizes
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue, Model, Ranker
from tests.models_data import ring

torch.set_num_threads(1)

COLUMNS = ("day", "hour")
DATA = ring(40, columns=COLUMNS)
CATALOGUE = Catalogue(DATA.n_items, DATA.context_sizes)
SASREC: dict[str, Any] = {"dim": 16, "blocks": 3, "heads": 4, "max_len": 10, "ffn_width": 12}
SHELF: list[tuple[str, dict[str, Any]]] = [
    ("sasrec", SASREC),
    ("sasrec", {**SASREC, "ffn": "gated", "gates": True, "loss": "sampled", "negatives": 16}),
    ("neumf", {"dim": 8, "hidden": (12, 10, 8), "negatives": 16}),
    ("neumf", {"dim": 8, "hidden": (12,), "negatives": 16, "hard": 0}),
    ("dlrm", {"dim": 8, "hidden": (12, 8), "negatives": 16}),
    ("dcn", {"dim": 8, "hidden": (12, 8), "rank": 6, "negatives": 16}),
    ("dcn", {"dim": 8, "hidden": (12,), "rank": 6, "structure": "stacked", "negatives": 16}),
]
every = pytest.mark.parametrize(("name", "options"), SHELF, ids=str)
DEAD = (1, 3)  # units of every group that are planted to do nothing


def model_of(name: str, options: dict[str, Any]) -> Model:
    """A model whose parameters are all drawn anew, so that none is 0 or 1 by chance of its start."""
    model = build_model(name, CATALOGUE, options, seed=3).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return model


def some_batches(model: Model) -> list[Any]:
    return list(islice(model.batches(DATA, batch_size=16, epoch=1, seed=0, rank=0, world=1), 3))


def scores(model: Any) -> torch.Tensor:
    asked = Histories.of([[1, 2, 3], [], [5, 9, 2, 7], list(range(20))])
    if isinstance(model, Ranker):
        context = {name: np.int32([0, 1, 2, 3]) for name in COLUMNS}
        return model.score(asked, np.array([[0, 5, 22, 3]] * 4), context)
    found: torch.Tensor = model.score(asked)
    return found


def kill(model: Model, units: tuple[int, ...]) -> None:
    """What writes these units writes zeros: their rows are 0, biases too."""
    state = model.state_dict()
    for group in groups(model):
        for cut in group.cuts:
            if cut.axis == 0:
                for unit in units:
                    first = cut.start + unit * group.width
                    state[cut.tensor][first : first + group.width] = 0.0


@every
@pytest.mark.parametrize("measure", ["taylor", "activation"])
def test_dead_units_are_found_and_are_no_loss(name: str, options: dict[str, Any], measure: Measure) -> None:
    model = model_of(name, options)
    kill(model, DEAD)
    before, parameters = scores(model), dense_parameters(model)
    found = importance(model, some_batches(model), measure=measure)
    keep = {}
    for group in groups(model):
        keep[group.size] = group.count - len(DEAD)
        for line in found[group.size]:
            assert line.shape == (group.count,)
            assert set(torch.nonzero(line == 0)[:, 0].tolist()) >= set(DEAD)
    small = pruned(model, keep, found)
    assert sizes(small) == sizes(model) | keep
    torch.testing.assert_close(scores(small), before, atol=1e-5, rtol=1e-5)
    assert dense_parameters(small) < parameters
    assert type(small) is type(model)
    again = build_model(name, CATALOGUE, vars(small.config))
    again.load_state_dict(small.state_dict())
    assert torch.equal(scores(again.eval()), scores(small))


@every
def test_the_model_is_left_as_it_was(name: str, options: dict[str, Any]) -> None:
    model = model_of(name, options).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    importance(model, some_batches(model))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_units_that_matter_are_kept() -> None:
    model = model_of("sasrec", SASREC)
    for block in model.network.blocks:  # type: ignore[union-attr]
        for layer in (block.down, block.out):  # type: ignore[union-attr]
            layer.weight.data *= 0.01  # type: ignore[union-attr, operator]
        block.down.weight.data[:, 5] *= 1000  # type: ignore[union-attr, index, operator]
        block.out.weight.data[:, 8:12] *= 1000  # type: ignore[union-attr, index, operator]
    for measure in ("taylor", "activation"):
        found = importance(model, some_batches(model), measure=measure)  # type: ignore[arg-type]
        assert found["ffn_width"].argmax(1).tolist() == [5, 5, 5]
        assert found["heads"].argmax(1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("gates", [True, False])
def test_a_block_that_adds_nothing_is_left_out(gates: bool) -> None:
    model = model_of("sasrec", {**SASREC, "gates": gates})
    idle: Any = model.network.blocks[1]  # type: ignore[union-attr, index]
    if not gates:  # then it gives on the normed input, which the next one norms anyhow
        for norm in (idle.norm_attention, idle.norm_ffn):
            norm.weight.data.fill_(1.0)
            norm.bias.data.zero_()
    for layer in (idle.down, idle.out):
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    before = scores(model)
    found = importance(model, some_batches(model))
    assert found["blocks"].shape == (1, 3)
    assert found["blocks"][0].argmin() == 1
    small = pruned(model, {"blocks": 2}, found)
    near = 1e-5 if gates else 1e-3  # a norm of a norm differs by its epsilon
    torch.testing.assert_close(scores(small), before, atol=near, rtol=near)


def test_dimensions_are_left_out_everywhere() -> None:
    model = model_of("sasrec", {**SASREC, "ffn": "gated", "gates": True})
    gone = [2, 7, 11, 15]
    state = model.state_dict()
    for key, tensor in state.items():
        if key.startswith("tables.") or key == "network.positions":
            tensor[:, gone] = 0.0
        elif "norm" in key or ".down." in key or ".out." in key:
            tensor[gone] = 0.0
    found = importance(model, some_batches(model))
    small: Any = pruned(model, {"dim": 12}, found)
    kept = [d for d in range(16) if d not in gone]
    assert torch.equal(small.tables["item"].weight, state["tables.item.weight"][:, kept])
    assert small.config.dim == 12
    assert small.config.head_dim == 4
    assert torch.isfinite(scores(small)).all()
    # the stream is the same up to its length: sqrt(12 / 16) of what it was
    rows = torch.tensor([[1, 2, 3]])
    streams = []
    for each in (model, small):
        x, _ = each.network._placed(each.tables["item"](rows), torch.tensor([3]))
        streams.append(x)
    torch.testing.assert_close(streams[1], streams[0][..., kept] * (12 / 16) ** 0.5)


def test_all_at_once_is_a_model_that_answers() -> None:
    model = model_of("sasrec", SASREC)
    found = importance(model, some_batches(model))
    small = pruned(model, {"dim": 8, "blocks": 2, "heads": 1, "ffn_width": 3}, found)
    assert sizes(small) == {"heads": 1, "ffn_width": 3, "blocks": 2, "dim": 8}
    assert torch.isfinite(scores(small)).all()
    assert dense_parameters(small) == sum(p.numel() for p in small.network.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("keep", "said"), [({"wings": 2}, "wings"), ({"heads": 0}, "heads"), ({"heads": 9}, "within 1 and 4")]
)
def test_what_cannot_be_kept_is_said(keep: dict[str, int], said: str) -> None:
    model = model_of("sasrec", SASREC)
    with pytest.raises(ConfigError, match=said):
        pruned(model, keep, importance(model, some_batches(model)))


def test_a_model_without_known_units_and_no_batches() -> None:
    with pytest.raises(ConfigError, match="popularity"):
        groups(build_model("popularity", CATALOGUE, {}))
    with pytest.raises(ConfigError, match="batch"):
        importance(model_of("sasrec", SASREC), [])

"""Training for few bits: the same rounding as the graph's, straight gradients, and less lost by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recray.compression.graph import OnnxNetwork, export_onnx
from recray.compression.quantize import quantize_weights
from recray.compression.rounding import learn_rounded, rounded, rounding, settle
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("inputs", [1, 32, 45])
def test_rounded_weights_are_near_few_and_stay(bits: int, inputs: int) -> None:
    weight = torch.randn(7, inputs, generator=torch.Generator().manual_seed(1))
    made = rounded(weight, bits)
    assert made.shape == weight.shape
    for start in range(0, inputs, 32):
        block, found = weight[:, start : start + 32], made[:, start : start + 32]
        top = block.abs().amax(dim=1, keepdim=True)
        # one step away at the end that has a level less, half a step elsewhere
        assert bool(((found - block).abs() <= top / (1 << (bits - 1)) + 1e-6).all())
        assert all(len(np.unique(row.numpy().round(5))) <= 1 << bits for row in found)
        torch.testing.assert_close(found.abs().amax(dim=1, keepdim=True), top)
    torch.testing.assert_close(rounded(made, bits), made)


def test_zeros_stay_zeros() -> None:
    assert not rounded(torch.zeros(3, 40)).any()


def test_gradients_pass_straight_through() -> None:
    network, x = net(), torch.randn(16, 48)
    with rounding(network):
        network(x).square().sum().backward()
    given = [layer.weight.grad for layer in (network[0], network[2])]
    plain = net()
    settle(plain)
    plain(x).square().sum().backward()
    for ours, theirs in zip(given, (plain[0].weight.grad, plain[2].weight.grad)):
        torch.testing.assert_close(ours, theirs)


def test_outside_of_the_block_nothing_is_rounded() -> None:
    network, x = net(), torch.randn(4, 48)
    before, state = network(x), {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), rounding(network):
        assert not torch.equal(network(x), before)
        assert list(network.state_dict()) == list(state)
        raise RuntimeError("stop")
    assert torch.equal(network(x), before)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


class Wide(nn.Module):
    """Products that an int4 graph rounds: of three dimensions, no bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(64, 96, bias=False), nn.Linear(96, 32, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        found: Tensor = self.second(torch.relu(self.first(x_BLD)))
        return found


def test_an_int4_graph_computes_what_training_saw(tmp_path: Path) -> None:
    network = Wide().eval()
    examples = [(torch.randn(b, length, 64),) for b, length in ((2, 3), (5, 4))]
    export_onnx(network, examples, tmp_path / "whole.onnx")
    quantize_weights(tmp_path / "whole.onnx", tmp_path / "int4.onnx")
    graph = OnnxNetwork(tmp_path / "int4.onnx", threads=1)
    with torch.no_grad():
        bare = network(*examples[1])
        with rounding(network):
            wanted = network(*examples[1])
    off = float((graph(*examples[1]) - wanted).abs().max() / wanted.abs().max())
    plain = float((bare - wanted).abs().max() / wanted.abs().max())
    assert off < 1e-3
    assert plain > 0.02


def test_training_on_recovers_what_rounding_lost() -> None:
    teacher, draw = net(5), torch.Generator().manual_seed(3)
    x = torch.randn(512, 48, generator=draw)
    y = teacher(x).detach()

    def off(network: nn.Module) -> float:
        with torch.no_grad(), rounding(network, 2):
            return float((network(x) - y).square().mean())

    student = net(5)
    before = off(student)
    optimizer = torch.optim.Adam(student.parameters(), 0.003)
    for _ in range(150):
        optimizer.zero_grad()
        with rounding(student, 2):
            (student(x) - y).square().mean().backward()
        optimizer.step()
    assert off(student) < 0.7 * before


def test_a_models_loss_becomes_that_of_its_rounded_network() -> None:
    model: Any = build_model(
        "sasrec", Catalogue(30, {}), {"dim": 16, "blocks": 1, "max_len": 8, "dropout": 0.0}
    )
    seen = []
    model.loss = lambda batch: seen.append(model.network.blocks[0].qkv.weight) or torch.zeros(())
    learn_rounded(model, 2)
    model.loss(None)
    own = model.network.blocks[0].qkv.weight
    torch.testing.assert_close(seen[0], rounded(own, 2))
    assert not torch.equal(seen[0], own)


def test_what_cannot_be_rounded_is_refused() -> None:
    bare: Any = build_model("popularity", Catalogue(30, {}), {})
    with pytest.raises(ConfigError, match="no network"):
        learn_rounded(bare)
    with pytest.raises(ConfigError, match="2 to 8"):
        learn_rounded(bare, 1)

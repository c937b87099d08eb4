"""Unstructured pruning: the smallest weights go, zeros hold in training, files are exact and small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recray.compression.magnitude import (
    learn_masked,
    load_sparse,
    magnitude,
    save_sparse,
    sparse_bytes,
    zero,
)
from recray.errors import ArtefactError, ConfigError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    with torch.no_grad():
        made[2].weight.mul_(3)
    return made


@pytest.mark.parametrize("share", [0.0, 0.5, 0.7])
def test_the_smallest_of_all_layers_go(share: float) -> None:
    network = net()
    masks = magnitude(network, share)
    every = torch.cat([layer.weight.detach().abs().flatten() for layer in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert int((~kept).sum()) == int(share * 900)
    if share:
        assert every[~kept].max() <= every[kept].min()
        assert (~masks[network[0]]).float().mean() > (~masks[network[2]]).float().mean()
    zero(masks)
    assert sum(int((layer.weight == 0).sum()) for layer in masks) == int(share * 900)


def test_a_layer_keeps_at_least_one() -> None:
    network = net()
    with torch.no_grad():
        network[0].weight.mul_(1e-6)
    masks = magnitude(network, 0.99)
    assert int(masks[network[0]].sum()) == 1


def test_training_on_holds_the_zeros_and_recovers() -> None:
    teacher, student = net(), net()
    x = torch.randn(256, 20, generator=torch.Generator().manual_seed(1))
    y = teacher(x).detach()

    class Model:
        network = student

        def loss(self, batch: Any) -> torch.Tensor:
            return (self.network(batch) - y).square().mean()

    model: Any = Model()
    masks = magnitude(student, 0.7)
    learn_masked(model, masks)
    first = float(model.loss(x).detach())
    optimizer = torch.optim.Adam(student.parameters(), 0.01)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
    assert all(not bool(layer.weight[~mask].any()) for layer, mask in masks.items())
    off = float((student(x) - y).square().mean().detach())
    assert off == pytest.approx(float(model.loss(x).detach()), rel=1e-4)
    assert off < 0.6 * first


def test_masks_follow_a_model_that_moves() -> None:
    class Model:
        network = net()

        def loss(self, batch: Any) -> torch.Tensor:
            return self.network(batch).sum()  # type: ignore[no-any-return]

    model: Any = Model()
    learn_masked(model, magnitude(model.network, 0.5))
    assert model.loss(torch.ones(2, 20)).device.type == "cpu"
    model.network.to("meta")
    for _ in range(2):
        assert model.loss(torch.ones(2, 20, device="meta")).device.type == "meta"


@settings(max_examples=40, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    shape=st.sampled_from([(), (0, 3), (1,), (7, 9), (3, 4, 5)]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_files_are_exact(
    tmp_path_factory: pytest.TempPathFactory, share: float, shape: tuple[int, ...], dtype: Any, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    value = (torch.randn(shape, generator=draw) * (torch.rand(shape, generator=draw) >= share) * 9).to(dtype)
    state = {"a.weight": value, "b": -torch.zeros(2), "rows": torch.arange(3)}
    path = tmp_path_factory.mktemp("sparse") / "weights.safetensors"
    save_sparse(state, path)
    back = load_sparse(path)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
        if tensor.is_floating_point():
            assert torch.equal(torch.signbit(back[name]), torch.signbit(tensor))
    assert sparse_bytes(state) <= sum(t.numel() * t.element_size() for t in state.values())


def test_bytes_are_as_claimed(tmp_path: Path) -> None:
    network = nn.Linear(256, 512)
    zero(magnitude(network, 0.8))
    state = network.state_dict()
    stands = 256 * 512 - int(0.8 * 256 * 512)
    assert sparse_bytes(state) == 256 * 512 // 8 + 4 * stands + 4 * 512
    save_sparse(state, tmp_path / "w")
    assert sparse_bytes(state) < (tmp_path / "w").stat().st_size < sparse_bytes(state) + 600


def test_what_is_no_such_file_or_share_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"nothing of the kind")
    with pytest.raises(ArtefactError):
        load_sparse(tmp_path / "w")
    with pytest.raises(ConfigError, match="below 1"):
        magnitude(net(), 1.0)
    with pytest.raises(ConfigError, match="no linear"):
        magnitude(nn.ReLU(), 0.5)

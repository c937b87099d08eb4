"""Quantized graphs: scales are what they should be, answers stay near and do not depend on neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recray.bundles.build import sample_inputs
from recray.bundles.stage import ALLOWED, example_inputs, write_graph
from recray.compression.fastest import Form, fastest
from recray.compression.graph import GraphError, OnnxNetwork, export_onnx, parity
from recray.compression.quantize import activation_scale, quantize_static, quantize_weights, weight_scales
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from tests.models_data import ring

torch.set_num_threads(1)

DATA = ring(40, columns=("weather",))
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"dim": 32, "blocks": 2, "max_len": 12, "ffn": "gated", "gates": True},
    "neumf": {"dim": 32, "hidden": (64, 32)},
    "dlrm": {"dim": 32, "hidden": (64, 32)},
    "dcn": {"dim": 32, "rank": 32, "hidden": (64, 32)},
}


def model_of(name: str) -> Any:
    """Larger than it starts out to be, so that outputs are not near 0."""
    model = build_model(name, Catalogue(DATA.n_items, {"weather": 5}), MODELS[name]).eval()
    for name, tensor in model.state_dict().items():
        if name.startswith("tables."):
            tensor *= 10
    return model


@given(st.integers(0, 2**31), st.floats(1e-3, 1e3))
@settings(max_examples=30, deadline=None)
def test_weights_are_off_by_half_a_step_at_most(seed: int, size: float) -> None:
    weight = (np.random.default_rng(seed).normal(size=(7, 5)) * size).astype(np.float32)
    q, scale = weight_scales(weight)
    assert q.dtype == np.int8
    assert (np.abs(q * scale - weight) <= scale / 2 + 1e-6 * size).all()
    assert (np.abs(q).max(axis=0) == 127).all()


@given(st.integers(0, 2**31), st.floats(-3, 3), st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_activations_have_zero_exactly_and_are_off_by_a_step(seed: int, shift: float, size: float) -> None:
    values = ((np.random.default_rng(seed).random(500) + shift) * size).astype(np.float32)
    scale, zero = activation_scale(values)
    q = np.clip(np.rint(values / scale) + zero, 0, 255)
    assert np.abs((q - zero) * scale - values).mean() <= 0.5 * scale
    assert 0 <= zero <= 255


def test_a_lonely_outlier_is_clipped() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    whole, _ = activation_scale(values)
    with_one, _ = activation_scale(np.append(values, np.float32(8)))
    assert with_one < 0.8 * (8 + 4.5) / 255
    assert whole < with_one
    assert activation_scale(np.zeros(3, np.float32))[0] > 0


@pytest.fixture(scope="module", params=MODELS)
def graphs(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and a folder with its graphs, each by its name."""
    model, folder = model_of(request.param), tmp_path_factory.mktemp(request.param)
    for graph in ("onnx", "onnx-static", "onnx-int4"):
        write_graph(
            folder / graph, model, graph, exported=folder / "kept", samples=lambda: sample_inputs(model, DATA)
        )
    return model, folder


def test_products_are_in_int8_and_answers_near(graphs: tuple[Any, Path]) -> None:
    model, folder = graphs
    found = [node.op_type for node in onnx.load(str(folder / "onnx-static")).graph.node]
    assert found.count("MatMulIntegerToFloat") >= 2
    assert found.count("QuantizeLinear") <= found.count("MatMulIntegerToFloat")
    onnx.checker.check_model(str(folder / "onnx"))
    samples = sample_inputs(model, DATA)
    scale = max(float(model.network(*each).detach().abs().max()) for each in samples)
    assert parity(model.network, OnnxNetwork(folder / "onnx"), samples) < 1e-4 * scale
    assert 0 < parity(model.network, OnnxNetwork(folder / "onnx-static"), samples) < 0.1 * scale
    assert 0 < parity(model.network, OnnxNetwork(folder / "onnx-int4"), samples) < 0.4 * scale


def test_fewer_bytes(graphs: tuple[Any, Path]) -> None:
    sizes = {name: (graphs[1] / name).stat().st_size for name in ("onnx", "onnx-static", "onnx-int4")}
    if sizes["onnx"] > 60_000:  # of a smaller one most is not weights
        assert sizes["onnx-static"] < 0.6 * sizes["onnx"]
        assert sizes["onnx-int4"] < 0.6 * sizes["onnx"]


def test_an_answer_does_not_depend_on_who_else_is_asked(graphs: tuple[Any, Path]) -> None:
    model, folder = graphs
    network = OnnxNetwork(folder / "onnx-static")
    assert not network.alone
    many = example_inputs(model)[-1]
    loud = tuple(torch.cat([t[:-1], t[-1:] * 50]) if t.is_floating_point() else t for t in many)
    together = network(*many)[0]
    torch.testing.assert_close(network(*loud)[0], together)
    torch.testing.assert_close(network(*(t[:1] for t in many))[0], together)


class Plain(nn.Module):
    """Products of all kinds: with a bias and without, read twice, too small, by no learned matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 48), nn.Linear(64, 48, bias=False)
        self.small, self.flat = nn.Linear(48, 2), nn.Linear(64, 48)

    def forward(self, x_BTE: Tensor, y_BE: Tensor) -> Tensor:
        mixed = self.a(x_BTE) * self.b(x_BTE) + self.flat(y_BE).unsqueeze(1)
        found: Tensor = self.small(mixed) @ x_BTE[:, :2, :2]
        return found


def test_what_is_replaced_and_what_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Plain().eval()
    asked = [(torch.randn(b, t, 64), torch.randn(b, 64)) for b, t in ((2, 3), (3, 5), (6, 9))]
    export_onnx(network, asked[:2], tmp_path / "whole")
    quantize_static(tmp_path / "whole", tmp_path / "small", asked)
    found = onnx.load(str(tmp_path / "small")).graph
    kinds = [node.op_type for node in found.node]
    assert kinds.count("MatMulIntegerToFloat") == 3
    assert kinds.count("QuantizeLinear") == 2, "x is read twice and quantized once"
    scale = max(float(network(*each).detach().abs().max()) for each in asked)
    assert parity(network, OnnxNetwork(tmp_path / "small"), asked) < 0.05 * scale
    assert sum(each.data_type == onnx.TensorProto.INT8 for each in found.initializer) == 3


def test_what_cannot_be_quantized_is_said(tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"no graph at all")
    export_onnx(nn.ReLU(), [(torch.ones(2, 3),), (torch.ones(3, 3),)], tmp_path / "relu")
    with pytest.raises(GraphError, match="no product"):
        quantize_static(tmp_path / "relu", tmp_path / "out", [(torch.ones(2, 3),)])
    with pytest.raises(GraphError, match="no samples"):
        quantize_static(tmp_path / "relu", tmp_path / "out", [])
    for quantize in (lambda p, q: quantize_static(p, q, [(torch.ones(2, 3),)]), quantize_weights):
        with pytest.raises(GraphError, match="cannot be quantized"):
            quantize(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_computes_something_else_does_not_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("neumf")
    monkeypatch.setitem(ALLOWED, "onnx-int4", 1e-6)
    with pytest.raises(GraphError, match="differs"):
        write_graph(tmp_path / "graph", model, "onnx-int4")


def test_the_fastest_within_the_bound_is_kept() -> None:
    forms = [
        Form("whole", {1: 4.0, 64: 90.0}, 0.0, 100),
        Form("small", {1: 1.0, 64: 40.0}, 0.004, 25),
        Form("same", {1: 1.0, 64: 30.0}, -0.01, 50),
        Form("tiny", {1: 0.1, 64: 1.0}, 0.2, 3),
    ]
    assert fastest(forms, users=1, bound=0.005).name == "small"
    assert fastest(forms, users=64, bound=0.005).name == "same"
    assert fastest(forms, users=64, bound=0.5).name == "tiny"
    with pytest.raises(ConfigError, match="tiny, 20"):
        fastest(forms[3:], users=1, bound=0.1)
    with pytest.raises(ConfigError, match="measured"):
        fastest([], users=1, bound=0.1)

"""Graphs take every size a request can have, and say by name what cannot become one."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from recray.bundles.stage import example_inputs, write_graph
from recray.compression.graph import SLOW, GraphError, OnnxNetwork, export_onnx, parity, quantize_dynamic
from recray.data.sequences import Histories
from recray.errors import ArtefactError
from recray.models import build_model
from recray.models.base import Catalogue

N = 90
MODELS: dict[str, dict[str, Any]] = {
    "sasrec": {"dim": 16, "blocks": 1, "max_len": 12},
    "neumf": {"dim": 8},
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return build_model(name, Catalogue(N, {"weather": 4}), MODELS[name]).eval()


def inputs_of(model: Any, users: int, length: int, wide: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(users)
    histories = Histories.of(torch.randint(0, N, (users, length), generator=draw).tolist())
    if model.stage == "retriever":
        made: tuple[Tensor, ...] = model.inputs(histories)
        return made
    candidates = torch.randint(0, N, (users, wide), generator=draw).numpy()
    ranked: tuple[Tensor, ...] = model.inputs(histories, candidates, None)
    return ranked


@pytest.fixture(scope="module", params=MODELS)
def exported(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model and the folder with its two graphs."""
    model, folder = model_of(request.param), tmp_path_factory.mktemp(request.param)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_graph(folder / "small", model, "onnx-int8", exported=folder / "kept")
    write_graph(folder / "whole", model, "onnx", exported=folder / "kept")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not isinstance(model.network, OnnxNetwork)
    return model, folder


@pytest.mark.parametrize("users", [1, 7, 64])
@pytest.mark.parametrize(("length", "wide"), [(1, 1), (5, 200), (30, 37)])
def test_any_batch_length_and_candidates(
    exported: tuple[Any, Path], users: int, length: int, wide: int
) -> None:
    model, folder = exported
    given = inputs_of(model, users, length, wide)
    assert parity(model.network, OnnxNetwork(folder / "whole"), [given]) < 1e-4
    scale = float(model.network(*given).detach().abs().max())
    assert parity(model.network, OnnxNetwork(folder / "small"), [given]) < 0.1 * scale


def test_quantized_is_smaller_and_marked(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    learned = sum(p.numel() * 4 for p in model.network.parameters())
    assert (folder / "whole").stat().st_size < learned + 25_000
    assert str(Path.cwd()).encode() not in (folder / "whole").read_bytes()
    assert (folder / "small").stat().st_size < (folder / "whole").stat().st_size
    assert OnnxNetwork(folder / "small").alone
    assert not OnnxNetwork(folder / "whole").alone


def test_additions_before_a_norm_stay_apart_since_the_fused_kernel_is_slow(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.norm(a + b)  # type: ignore[no-any-return]

    examples = [tuple(torch.randn(users, 4, 8) for _ in range(2)) for users in (2, 3)]
    export_onnx(Normed(), examples, tmp_path / "normed")
    kinds = []
    for off in ([], SLOW):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "made")
        onnxruntime.InferenceSession(
            tmp_path / "normed", options, providers=["CPUExecutionProvider"], disabled_optimizers=off
        )
        kinds.append({node.op_type for node in onnx.load(str(tmp_path / "made")).graph.node})
    assert kinds == [{"SkipLayerNormalization"}, {"Add", "LayerNormalization"}]
    assert parity(Normed(), OnnxNetwork(tmp_path / "normed"), examples) < 1e-5


def test_from_bytes_and_from_several_threads(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    graph = OnnxNetwork((folder / "whole").read_bytes(), threads=1)
    given = inputs_of(model, 3, 4, 5)
    wanted, found = graph(*given), []
    threads = [threading.Thread(target=lambda: found.append(graph(*given))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(wanted, one) for one in found)


class Determinant(nn.Module):
    """An operator that ONNX has no translation for here."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(x)


class Fixed(nn.Module):
    """A network that only takes batches of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 2 else x.nonzero().float()


def test_an_operator_without_a_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="matrix_exp") as caught:
        export_onnx(
            Determinant(), [(torch.eye(3).repeat(2, 1, 1),), (torch.eye(3).repeat(5, 1, 1),)], tmp_path / "g"
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "g").exists()


def test_a_size_that_does_not_stay_free_is_said(tmp_path: Path) -> None:
    with pytest.raises(GraphError):
        export_onnx(Fixed(), [(torch.ones(2, 3),), (torch.ones(3, 3),)], tmp_path / "g")


def test_parity_sees_a_difference_and_a_shape() -> None:
    double, given = nn.Linear(3, 2), torch.ones(2, 3)
    other = nn.Linear(3, 2)
    assert parity(double, double, [(given,)]) == 0.0
    assert parity(double, other, [(given,)]) > 0
    with pytest.raises(GraphError, match="shape"):
        parity(double, nn.Linear(3, 1), [(given,)])


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(b"no graph at all")
    with pytest.raises(ArtefactError):
        OnnxNetwork(tmp_path / "g")
    with pytest.raises(GraphError):
        quantize_dynamic(tmp_path / "g", tmp_path / "q")


def test_examples_differ_in_every_free_size() -> None:
    first, second = example_inputs(model_of("neumf"))[:2]
    assert [a.shape[0] for a in first] == [2] * len(first)
    assert [b.shape[0] for b in second] == [3] * len(second)
    assert first[0].shape[1] != second[0].shape[1]
    assert first[3].shape[1] != second[3].shape[1]

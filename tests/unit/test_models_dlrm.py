"""DLRM against the paper's equations, one pair at a time; its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recray.bundles.stage import example_inputs
from recray.compression.graph import OnnxNetwork, export_onnx, parity
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.dlrm import below
from tests.models_data import ring

torch.set_num_threads(1)

MIXED = Catalogue(23, {"day": 4, "place": 3}, {"kind": 5, "tags": 4, "tags#2": 4}, 3)


def mixed(name: str, **changes: Any) -> Any:
    made = build_model(name, MIXED, {"dim": 8, "hidden": (12, 6), "max_len": 7, **changes}).eval()
    draw = np.random.default_rng(0)
    made.item_rows.copy_(torch.from_numpy(draw.integers(-1, 9, (23, 3))))
    made.item_numbers.copy_(torch.from_numpy(draw.normal(size=(23, 3))))
    return made


@pytest.mark.parametrize("norm", ["off", "pair"])
def test_the_score_is_the_top_of_all_dots(norm: str) -> None:
    model = mixed("dlrm", norm=norm)
    net = model.network
    candidates = np.array([[3, 9]])
    inputs = model.inputs(Histories.of([[1, 2, 2]]), candidates, {"day": np.int32([2])})
    scores = model.score(Histories.of([[1, 2, 2]]), candidates, {"day": np.int32([2])})
    with torch.no_grad():
        user, rest, scale = net.fields(*inputs)
        assert (scale is None) == (norm == "off")
        assert (user.shape[1], rest.shape[2]) == model.widths == (3, 5)
        for c in range(2):
            u, r = user[0], rest[0, c]
            assert torch.allclose(r[-1], net.fields.bottom(inputs[4][0, c]))
            if norm == "pair":
                together = torch.cat([u, r]).square().mean().sqrt()
                u, r = u / together, r / together
            mixed_dots = [r[i] @ u[j] for i in range(5) for j in range(3)]
            own_dots = [r[i] @ r[j] for i in range(5) for j in range(i)]
            users_dots = [u[i] @ u[j] for i in range(3) for j in range(i)]
            hidden = net.from_pair(torch.cat([torch.stack(mixed_dots + own_dots), r[-1]]))
            hidden = hidden + net.from_user(torch.stack(users_dots))
            torch.testing.assert_close(net.top(hidden[None, None])[0, 0, 0], scores[0, c])


@pytest.mark.parametrize("norm", ["off", "pair"])
def test_the_score_is_the_top_of_the_vectors_where_none_are_multiplied(norm: str) -> None:
    model = mixed("dlrm", norm=norm, interaction="cat")
    net, candidates = model.network, np.array([[3, 9]])
    asked = (Histories.of([[1, 2, 2]]), candidates, {"day": np.int32([2])})
    scores = model.score(*asked)
    with torch.no_grad():
        user, rest, _ = net.fields(*model.inputs(*asked))
        for c in range(2):
            x = torch.cat([user[0], rest[0, c]])
            x = x / x.square().mean().sqrt() if norm == "pair" else x
            hidden = net.from_user(x[: user.shape[1]].flatten()) + net.from_pair(x[user.shape[1] :].flatten())
            torch.testing.assert_close(net.top(hidden[None, None])[0, 0, 0], scores[0, c])


def test_with_norm_no_vector_is_larger_than_another() -> None:
    model = mixed("dlrm")
    model.item_rows.clamp_(min=0)  # an item without a value has zeros there, and keeps them
    net = model.network
    assert net.fields.of_user.shape == (3, 1)
    assert net.fields.of_rest.shape == (5, 1)
    inputs = model.inputs(Histories.of([[1, 2, 2]]), np.array([[3, 9]]), {"day": np.int32([2])})
    with torch.no_grad():
        user, rest, _ = net.fields(*inputs)
        net.fields.of_user[1] = 3.0
        larger, _, _ = net.fields(*inputs)
    for vectors in (user, rest):
        torch.testing.assert_close(vectors.mean(-1), torch.zeros(vectors.shape[:-1]), atol=1e-5, rtol=0)
        torch.testing.assert_close((vectors**2).mean(-1), torch.ones(vectors.shape[:-1]), atol=0.02, rtol=0)
    torch.testing.assert_close(larger[:, 1], 3 * user[:, 1])
    torch.testing.assert_close(larger[:, 2], user[:, 2])


def test_below_is_each_pair_once() -> None:
    x = torch.randn(2, 4, 3)
    want = torch.stack([(x[:, i] * x[:, j]).sum(-1) for i in range(4) for j in range(i)], 1)
    torch.testing.assert_close(below(x), want)
    assert below(x[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("history", ["attention", "pool", "off"])
def test_the_next_of_the_ring_is_learned_where_the_history_is_seen(history: str) -> None:
    model = build_model("dlrm", Catalogue(23, {}), {"dim": 16, "hidden": (16,), "history": history})
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for epoch in range(6):
        for batch in model.batches(ring(100), batch_size=16, epoch=epoch, seed=0, rank=0, world=1):
            optimizer.zero_grad()
            model.loss(batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    asked = Histories.of([[(i + s) % 23 for i in range(5)] for s in range(23)])
    scores = model.eval().score(asked, np.tile(np.arange(23), (23, 1)))  # type: ignore[operator]
    above = (scores > scores[torch.arange(23), (torch.arange(23) + 5) % 23].unsqueeze(1)).sum(1)
    found = float(above.float().mean())  # of 22; by chance 11
    assert found < 4 if history != "off" else found > 7


@pytest.mark.parametrize("changes", [{"dim": 6}, {"heads": 3}, {"hidden": ()}, {"negatives": 0}], ids=str)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        mixed("dlrm", **changes)


@pytest.mark.parametrize(("name", "plain"), [("dlrm", False), ("dlrm", True), ("dcn", False)])
def test_the_graph_agrees_for_any_batch_length_and_candidates(name: str, plain: bool, tmp_path: Path) -> None:
    model = build_model(name, Catalogue(23, {}), {"history": "off"}).eval() if plain else mixed(name)
    examples = example_inputs(model)
    export_onnx(model.network, examples[:2], tmp_path / "graph.onnx")  # type: ignore[arg-type]
    assert parity(model.network, OnnxNetwork(tmp_path / "graph.onnx"), examples) < 1e-4  # type: ignore[arg-type]

"""SASRec: causal, counted from the newest, learns a ring, exports to a graph that agrees."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.sequential import AT_ONCE, Encoder
from recray.recipes import recipe
from tests.models_data import fitted, ring

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"dim": 16, "max_len": 8, "heads": 2, "dropout": 0.1}


def small(**changes: Any) -> Any:
    return build_model("sasrec", Catalogue(23, {}), {**SMALL, **changes}).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ffn": "gated"},
        *({"loss": "sampled", "negatives": 64, "sampling": s} for s in ("uniform", "popularity", "in-batch")),
    ],
    ids=str,
)
def test_the_next_of_the_ring_is_learned(changes: dict[str, Any]) -> None:
    model = fitted(small(**changes), ring(200), 10)
    asked = Histories.of([[(i + s) % 23 for i in range(5)] for s in range(23)])
    found = model.score(asked).argmax(1)
    right = sum(int(found[s]) == (s + 5) % 23 for s in range(23))
    assert right >= 20


def test_a_state_sees_nothing_that_comes_after_it() -> None:
    model = small()
    with torch.inference_mode():
        x = torch.randn(1, 6, 16)
        lengths = torch.tensor([6])
        before = model.network.states(x, lengths)
        x[:, 4:] *= -1
        after = model.network.states(x, lengths)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_only_the_newest_max_len_items_matter_and_padding_does_not() -> None:
    model = small()
    newest = list(range(8))
    torch.testing.assert_close(
        model.encode(Histories.of([[20, 21, 22, *newest]])), model.encode(Histories.of([newest]))
    )
    both = model.encode(Histories.of([newest, [3, 4], []]))
    torch.testing.assert_close(both[1:2], model.encode(Histories.of([[3, 4]])), atol=1e-5, rtol=1e-5)
    assert not both[2].any()
    reordered = model.encode(Histories.of([newest[::-1]]))
    assert not torch.allclose(both[0], reordered[0], atol=1e-3)


def test_ranks_together_make_the_step_of_one() -> None:
    data = ring()
    model = small(dropout=0.0)

    def gradient(rank: int, world: int) -> torch.Tensor:
        model.zero_grad()
        first = next(model.batches(data, batch_size=8, epoch=3, seed=1, rank=rank, world=world))
        model.loss(first).backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    apart = (gradient(0, 2) + gradient(1, 2)) / 2
    torch.testing.assert_close(apart, gradient(0, 1), atol=1e-6, rtol=1e-4)


def test_a_step_can_be_repeated_whatever_torch_drew_before() -> None:
    model = small(dropout=0.5).train()
    batch = next(model.batches(ring(), batch_size=8, epoch=0, seed=0, rank=0, world=1))
    first = model.loss(batch).item()
    torch.rand(7)
    state = torch.get_rng_state()
    assert model.loss(batch).item() == first
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("changes", [{"dim": 15}, {"max_len": 0}, {"negatives": 0}, {"heads": 0}], ids=str)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        small(**changes)


def test_the_graph_agrees_for_any_batch_and_length(tmp_path: Path) -> None:
    import onnxruntime

    model = small(ffn="gated")
    batch, length = torch.export.Dim("batch", min=1, max=4096), torch.export.Dim("length", min=1, max=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        graph = torch.onnx.export(
            model.network,
            model.inputs(Histories.of([[1, 2, 3], [4, 5]])),
            dynamo=True,
            dynamic_shapes=({0: batch, 1: length}, {0: batch}),
            verbose=False,
        )
    assert graph is not None
    graph.save(tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    for rows in ([[1]], [[]], [list(range(20)), [3]], [[], [1, 2], [5] * 9]):
        inputs = model.inputs(Histories.of(rows))
        fed = {a.name: t.detach().numpy() for a, t in zip(session.get_inputs(), inputs)}
        ours = model.encode(Histories.of(rows)).numpy()
        np.testing.assert_allclose(session.run(None, fed)[0], ours, atol=1e-4)


def test_the_recipe_names_options_the_model_knows() -> None:
    made = recipe("sasrec", ["options.loss=sampled", "options.sampling=in-batch"])
    model: Any = build_model(made.model, Catalogue(5, {}), made.options)
    assert (model.config.loss, model.config.sampling) == ("sampled", "in-batch")


@pytest.mark.parametrize(
    "changes", [{}, {"ffn": "gated", "gates": True}, {"blocks": 0}, {"blocks": 1}], ids=str
)
def test_what_is_left_out_of_an_answer_makes_no_difference(changes: dict[str, Any]) -> None:
    model = small(**changes)
    asked = Histories.of([[1, 2, 3], [5], [], list(range(8))])
    with torch.inference_mode():
        whole = Encoder.forward(model.network, *model.inputs(asked))
    torch.testing.assert_close(model.encode(asked), whole, atol=1e-6, rtol=1e-5)


def test_many_are_answered_in_their_own_order() -> None:
    model, draw = small(), np.random.default_rng(0)
    asked = Histories.of([draw.integers(0, 23, n).tolist() for n in draw.integers(0, 12, 2 * AT_ONCE + 3)])
    alone = torch.cat([model.encode(asked.take([b])) for b in range(len(asked))])
    torch.testing.assert_close(model.encode(asked), alone, atol=1e-5, rtol=1e-5)


def test_heads_and_neurons_can_be_fewer_than_usual() -> None:
    model = small(heads=1, head_dim=4, ffn_width=3)
    block = model.network.blocks[0]
    assert block.qkv.weight.shape == (12, 16)
    assert block.up.weight.shape == (3, 16)
    assert torch.isfinite(model.encode(Histories.of([[1, 2]]))).all()
    for wrong in ({"head_dim": -1}, {"ffn_width": -1}):
        with pytest.raises(ConfigError, match="as usual"):
            small(**wrong)

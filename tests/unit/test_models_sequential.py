"""What every model over sequences keeps: causal, padding is nothing, learns a ring, has a graph."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.bundles.stage import example_inputs, read_stage, write_stage
from recray.compression.graph import OnnxNetwork, parity
from recray.data.batches import Negatives, sequence_batches
from recray.data.sequences import PAD, Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.recipes import recipe
from tests.models_data import fitted, ring

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"dim": 16, "max_len": 8, "dropout": 0.1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gates": ("sasrec", {"ffn": "gated", "gates": True}),
    "gru4rec": ("gru4rec", {"units": 24, "layers": 2}),
    "caser": ("caser", {"window": 3, "filters": 8, "units": 32}),
    "mind": ("mind", {"interests": 3}),
    "two-tower": ("two-tower", {"units": 32, "negatives": 64}),
}
every = pytest.mark.parametrize("kind", KINDS)


def small(kind: str, **changes: Any) -> Any:
    name, options = KINDS[kind]
    return build_model(name, Catalogue(23, {}), {**SMALL, **options, **changes}).eval()


@cache
def on_a_ring(kind: str, loss: str) -> Any:
    options = {"loss": loss, "dropout": 0.0}
    if loss == "sampled":
        options |= {"negatives": 64, "sampling": "in-batch", "uniform_share": 0.3}
    return fitted(small(kind, **options), ring(150), 12)


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
@every
def test_what_follows_on_the_ring_is_learned(kind: str, loss: str) -> None:
    """The next item first; of two towers, whose items look alike in both directions, among the first two."""
    model = on_a_ring(kind, loss)
    asked = Histories.of([[(i + s) % 23 for i in range(5)] for s in range(23)])
    best = model.score(asked).topk(3, dim=1).indices
    near = 3 if kind == "two-tower" else 1
    right = sum((s + 5) % 23 in best[s, :near].tolist() for s in range(23))
    assert right >= 20


@every
def test_a_state_sees_nothing_that_comes_after_it(kind: str) -> None:
    model = small(kind)
    with torch.inference_mode():
        x = torch.randn(2, 6, 16)
        lengths = torch.tensor([6, 6])
        before = model.network.states(x, lengths)
        x[:, 4:] = torch.randn(2, 2, 16)
        after = model.network.states(x, lengths)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gates"])
def test_a_query_is_the_state_after_the_last_item(kind: str) -> None:
    """What was trained is what answers: the states after each item are the queries of the prefixes.

    Not so of SASRec, whose positions are counted from a window's end.
    """
    model = small(kind)
    rows = np.random.default_rng(0).integers(0, 23, (3, 8))
    with torch.inference_mode():
        x = model.inputs(Histories.of(rows.tolist()))[0]
        states = model.network.states(x, torch.full((3,), 8))
        for n in (1, 3, 8):
            queries = model.encode(Histories.of(rows[:, :n].tolist()))
            wanted = states[:, n - 1].view(3, -1, queries.shape[2])
            if kind == "mind":  # an interest that is not there is repeated in an answer, shut out in training
                queries, wanted = queries[:, :1], wanted[:, :1]
            torch.testing.assert_close(queries, wanted, atol=1e-5, rtol=1e-4)


@every
def test_only_the_newest_max_len_items_matter_and_padding_does_not(kind: str) -> None:
    model = on_a_ring(kind, "softmax")
    newest = list(range(8))
    asked = [[20, 21, 22, *newest], newest, [3, 4], [], [PAD, 3, PAD, 4]]
    found = model.encode(Histories.of(asked))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], model.encode(Histories.of([[3, 4]]))[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[4], found[2])
    assert not found[3].any()
    assert not torch.allclose(found[0], model.encode(Histories.of([newest[::-1]]))[0], atol=1e-3)


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
@every
def test_ranks_together_make_the_step_of_one(kind: str, loss: str) -> None:
    data, model = ring(), small(kind, dropout=0.0, loss=loss)

    def gradient(rank: int, world: int) -> torch.Tensor:
        model.zero_grad()
        first = next(model.batches(data, batch_size=8, epoch=3, seed=1, rank=rank, world=world))
        model.loss(first).backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])

    apart = (gradient(0, 2) + gradient(1, 2)) / 2
    torch.testing.assert_close(apart, gradient(0, 1), atol=1e-6, rtol=1e-4)


@every
def test_a_step_can_be_repeated_whatever_torch_drew_before(kind: str) -> None:
    model = small(kind, dropout=0.5).train()
    batch = next(model.batches(ring(), batch_size=8, epoch=0, seed=0, rank=0, world=1))
    first = model.loss(batch).item()
    torch.rand(7)
    state = torch.get_rng_state()
    assert model.loss(batch).item() == first
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("loss", ["softmax", "sampled"])
@every
def test_what_is_looked_up_was_told(kind: str, loss: str) -> None:
    """`lookups` names the item table's reads one by one: the sharded table matches them by their rows."""
    model = small(kind, loss=loss)
    batch = next(model.batches(ring(), batch_size=8, epoch=0, seed=0, rank=0, world=1))
    told = [rows.tolist() for rows in model.lookups(batch)["item"]]
    read: list[Any] = []
    model.tables["item"].register_forward_hook(lambda module, args, out: read.append(args[0].tolist()))
    model.loss(batch)
    assert sorted(map(str, told)) == sorted(map(str, read))


@every
def test_the_graph_agrees_for_any_batch_and_length(kind: str, tmp_path: Path) -> None:
    model = on_a_ring(kind, "softmax")
    assert write_stage(tmp_path / "graph", model, "f32", "onnx")["parity"] < 1e-4
    graph = OnnxNetwork(tmp_path / "graph" / "network.onnx")
    lists = ([[1]], [[]], [list(range(20)), [3]], [[], [1, 2], [5] * 9], [[7, 8, 9]] * 33)
    given = [model.inputs(Histories.of(rows)) for rows in lists]
    assert parity(model.network, graph, [*given, *example_inputs(model)]) < 1e-4
    served = read_stage(tmp_path / "graph")
    asked = Histories.of([[1, 2, 3], [], [4] * 30])
    torch.testing.assert_close(served.score(asked), model.score(asked), atol=1e-4, rtol=1e-4)


@every
def test_a_bundle_holds_all_of_it(kind: str, tmp_path: Path) -> None:
    model = on_a_ring(kind, "softmax")
    write_stage(tmp_path / "whole", model, "f32", "eager")
    served: Any = read_stage(tmp_path / "whole")
    asked = Histories.of([[1, 2, 3], [], [4] * 30])
    torch.testing.assert_close(served.score(asked), model.score(asked), atol=1e-5, rtol=1e-5)


@every
def test_half_precision_trains(kind: str) -> None:
    model = small(kind).train()
    batch = next(model.batches(ring(), batch_size=32, epoch=0, seed=0, rank=0, world=1))
    whole = model.loss(batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        half = model.loss(batch)
    half.backward()
    assert half.item() == pytest.approx(whole, rel=0.05)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gru4rec", {"layers": 0}),
        ("caser", {"window": 0}),
        ("mind", {"interests": 0}),
        ("mind", {"hardness": 0.0}),
        ("two-tower", {"temperature": 0.0}),
        ("two-tower", {"units": 0}),
        *((kind, {"uniform_share": 1.5}) for kind in KINDS),
        *((kind, {"dropout": 1.0}) for kind in KINDS),
        *((kind, {"power": -0.5}) for kind in KINDS),
        *((kind, {"max_len": 0}) for kind in KINDS),
    ],
    ids=str,
)
def test_numbers_that_make_no_model_are_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        small(kind, **changes)


def test_the_recipes_name_what_the_models_know() -> None:
    for name in ("esasrec", "gru4rec", "caser", "mind", "two-tower"):
        made = recipe(name)
        build_model(made.model, Catalogue(5, {}), made.options)
    gated: Any = build_model("sasrec", Catalogue(5, {}), recipe("esasrec").options)
    assert gated.config.gates
    assert gated.config.uniform_share > 0


# -- Caser and GRU4Rec against their formulas --------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.integers(0, 99))
def test_caser_is_a_window_through_its_formulas(length: int, window: int, seed: int) -> None:
    torch.manual_seed(seed)
    net: Any = small("caser", window=window).network
    x = torch.randn(1, length, 16)
    with torch.inference_mode():
        states = net.states(x, torch.tensor([length]))[0]
        for t in range(length):
            cells = torch.zeros(window, 16)
            newest = x[0, max(0, t + 1 - window) : t + 1] * 4.0
            cells[window - len(newest) :] = newest
            found = []
            for filters in net.horizontal:
                h = filters.weight.shape[2]
                slid = [
                    (filters.weight * cells[at : at + h].T).sum((1, 2)) + filters.bias
                    for at in range(window - h + 1)
                ]
                found.append(torch.stack(slid).relu().amax(0))
            vertical = (net.vertical.weight @ cells).T.reshape(-1)
            hidden = net.hidden(torch.cat([*found, vertical])).relu()
            wanted = net.out(torch.cat([hidden, x[0, : t + 1].mean(0) * 4.0]))
            torch.testing.assert_close(states[t], wanted, atol=1e-4, rtol=1e-4)


def test_gru4rec_is_its_recurrence() -> None:
    net: Any = small("gru4rec", layers=1).network
    x = torch.randn(2, 5, 16)
    gru = net.gru
    with torch.inference_mode():
        h = torch.zeros(2, 24)
        for t in range(5):
            given_r, given_z, given_n = (
                x[:, t] * 4 @ gru.weight_ih_l0.T + gru.bias_ih_l0
            ).chunk(3, 1)  # fmt: skip
            held_r, held_z, held_n = (h @ gru.weight_hh_l0.T + gru.bias_hh_l0).chunk(3, 1)
            r, z = torch.sigmoid(given_r + held_r), torch.sigmoid(given_z + held_z)
            h = z * h + (1 - z) * torch.tanh(given_n + r * held_n)
            torch.testing.assert_close(
                net.states(x, torch.tensor([5, 5]))[:, t], net.out(h), atol=1e-5, rtol=1e-4
            )


# -- mixed negatives ---------------------------------------------------------------------------------
@pytest.mark.parametrize("sampling", ["popularity", "in-batch"])
def test_mixed_negatives_are_drawn_as_often_as_is_said(sampling: Any) -> None:
    """Over an epoch an item comes as often as exp(log_q) says, those of no history too."""
    histories = Histories.of([[0, 1, 2, 1, 0, 1], [1, 0, 1, 1, 2, 0], [2, 1, 0, 1]] * 400)
    how = Negatives(5, sampling, uniform_share=0.25)
    seen, said = np.zeros(6), np.zeros(6)
    steps = 0
    for n in range(4):
        for batch in sequence_batches(histories, 6, max_len=3, batch_size=4, epoch=n, seed=0, negatives=how):
            np.add.at(seen, batch.negatives, 1)
            said[batch.negatives] = np.exp(batch.log_q)
            steps += 1
    assert said[5] == pytest.approx(5 * 0.25 / 6, rel=1e-5)
    np.testing.assert_allclose(seen / steps, said, rtol=0.15)

"""NeuMF: trained on prefixes exactly as it is asked later; context counts; the graph agrees."""

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
from tests.models_data import SmallData, fitted, ring

torch.set_num_threads(1)

SMALL: dict[str, Any] = {"dim": 16, "max_len": 12, "hidden": (16,), "dropout": 0.0, "negatives": 32}


def small(context: dict[str, int] | None = None, **changes: Any) -> Any:
    return build_model("neumf", Catalogue(23, context or {}), {**SMALL, **changes}).eval()


@pytest.mark.parametrize("loss", ["sampled", "bce", "bpr"])
def test_the_next_of_the_ring_is_learned(loss: str) -> None:
    model = fitted(small(loss=loss), ring(200), 10)
    asked = Histories.of([[(i + s) % 23 for i in range(5)] for s in range(23)])
    everything = np.tile(np.arange(23), (23, 1))
    scores = model.score(asked, everything)
    above = (scores > scores[torch.arange(23), (torch.arange(23) + 5) % 23].unsqueeze(1)).sum(1)
    assert above.float().mean() < 3  # of 22; by chance 11


def test_training_pools_what_asking_pools() -> None:
    model = small()
    pool = model.network.pool_gmf
    rows = [4, 9, 2, 7, 7]
    x = model.tables["history_gmf"](torch.tensor([rows]))
    with torch.inference_mode():
        prefixes = pool.prefixes(x)
        for t in range(5):
            history, _, mask, *_ = model.inputs(Histories.of([rows[: t + 1]]), np.zeros((1, 1), np.int64))
            torch.testing.assert_close(pool(history, mask), prefixes[:, t])


@pytest.mark.parametrize("context", [{}, {"day": 4}], ids=["by window", "by target"])
def test_without_an_order_half_of_a_window_tells_all_of_it(context: dict[str, int]) -> None:
    """The loss by hand, from scores as they are asked for: log softmax over all items, each target's."""
    data = SmallData(
        23, Histories.of([[1, 2, 3, 9], [4, 5], [6, 7, 8]]), context, {c: np.zeros(9, "i4") for c in context}
    )
    model = small(context, history="half", negatives=23)
    assert model.by_window == (not context)
    assert not model.network.pool_gmf.log_weights.requires_grad, "no age says anything"
    ((batch, given),) = model.batches(data, batch_size=4, epoch=0, seed=0, rank=0, world=1)
    told = [[int(i) for i in row if i >= 0] for row in batch.inputs]
    wanted = [[int(i) for i in row if i >= 0] for row in batch.targets]
    assert all(set(a) <= set(b) for a, b in zip(told, wanted))
    scores = model.score(Histories.of(told), np.tile(np.arange(23), (3, 1))).log_softmax(1)
    by_hand = -sum(scores[u, i] for u, row in enumerate(wanted) for i in row) / 9
    torch.testing.assert_close(model.loss((batch, given)), by_hand)
    model.loss((batch, given)).backward()
    touched = model.tables["history_gmf"].weight.grad.abs().sum(1) > 0
    assert touched.nonzero().squeeze(1).tolist() == sorted(i for row in told for i in row)


def test_a_user_who_has_every_negative_breaks_nothing() -> None:
    model = small(history="half", negatives=40, max_len=30)
    data = SmallData(23, Histories.of([list(range(23)), [1, 2]]))
    (batch,) = model.batches(data, batch_size=4, epoch=0, seed=0, rank=0, world=1)
    loss = model.loss(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_gmf_is_trained_alone_for_the_epochs_asked_for() -> None:
    data = SmallData(23, Histories.of([[1, 2, 3, 9], [4, 5], [6, 7, 8]]))
    model = small(pretrain=2).train()
    for epoch, deep in ((1, False), (2, False), (3, True)):
        model.zero_grad()
        for batch in model.batches(data, batch_size=4, epoch=epoch, seed=0, rank=0, world=1):
            model.loss(batch).backward()
        learned = {name: p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters()}
        assert learned["tables.item_gmf.weight"]
        assert learned["tables.item_mlp.weight"] == learned["network.out.weight"] == deep
    with pytest.raises(ConfigError, match="pretrain"):
        small(pretrain=-1)


def test_a_target_is_not_in_its_own_history() -> None:
    model = small()
    (batch, _), *_ = model.batches(
        SmallData(23, Histories.of([[1, 2, 3]])), batch_size=4, epoch=0, seed=0, rank=0, world=1
    )
    model.loss((batch, np.zeros((1, 2, 0), np.int64))).backward()
    touched = model.tables["history_gmf"].weight.grad.abs().sum(1) > 0
    assert touched.nonzero().squeeze(1).tolist() == [1, 2]  # 3 is only ever a target


def test_context_is_learned_and_unknown_values_are_answered() -> None:
    rng = np.random.default_rng(0)
    day = rng.integers(1, 4, 3000).astype(np.int32)
    items = np.where(rng.random(3000) < 0.9, day * 5, rng.integers(0, 23, 3000)).astype(np.int32)
    histories = Histories(items, np.arange(0, 3001, 10, dtype=np.int64))
    data = SmallData(23, histories, {"day": 4}, {"day": day})
    model = fitted(small(data.context_sizes, hidden=(32,)), data, 20)
    asked, everything = Histories.of([[1, 2]] * 5), np.tile(np.arange(23), (5, 1))
    found = model.score(asked, everything, {"day": np.int32([1, 2, 3, 0, 99])})
    assert found.argmax(1)[:3].tolist() == [5, 10, 15]
    torch.testing.assert_close(found[3], found[4])  # a value it never saw is unknown
    torch.testing.assert_close(found[3], model.score(asked, everything)[0])


def test_columns_keep_their_tables_in_any_order() -> None:
    left, right = small({"b.c": 3, "a b": 4}), small({"a b": 4, "b.c": 3})
    right.load_state_dict(left.state_dict())
    given = {"b.c": np.int32([2]), "a b": np.int32([3])}
    one, all_items = Histories.of([[1]]), np.arange(23)[None]
    torch.testing.assert_close(left.score(one, all_items, given), right.score(one, all_items, given))


@pytest.mark.parametrize(
    "changes", [{"dim": 6}, {"hidden": ()}, {"negatives": 0}, {"dropout": 1.0}, {"power": -0.5}], ids=str
)
def test_numbers_that_make_no_model_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        small(**changes)


@pytest.mark.parametrize("context", [{}, {"day": 4}], ids=["plain", "context"])
def test_the_graph_agrees_for_any_batch_length_and_candidates(
    context: dict[str, int], tmp_path: Path
) -> None:
    import onnxruntime

    model = small(context)
    sizes = [torch.export.Dim(name, min=1, max=top) for name, top in (("b", 4096), ("l", 12), ("c", 10**6))]
    b, length, c = sizes
    shapes = (
        {0: b, 1: length},
        {0: b, 1: length},
        {0: b, 1: length},
        {0: b, 1: c},
        {0: b, 1: c},
        {0: b},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        example = model.inputs(Histories.of([[1, 2, 3], [4, 5]]), np.arange(8).reshape(2, 4))
        names = ["history_gmf", "history_mlp", "mask", "item_gmf", "item_mlp", "context"]
        graph = torch.onnx.export(
            model.network, example, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False
        )
    assert graph is not None
    graph.save(tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx")
    wanted = {a.name for a in session.get_inputs()}
    for rows, count in (([[1]], 1), ([[]], 5), ([list(range(20)), [3]], 7)):
        candidates = np.random.default_rng(0).integers(0, 23, (len(rows), count))
        inputs = model.inputs(Histories.of(rows), candidates)
        fed = {name: t.detach().numpy() for name, t in zip(names, inputs) if name in wanted}
        ours = model.score(Histories.of(rows), candidates).numpy()
        np.testing.assert_allclose(session.run(None, fed)[0], ours, atol=1e-4)

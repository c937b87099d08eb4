"""Two towers: features speak for items nobody took, a target is not told to itself, attention picks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn.functional import normalize

from recray.bundles.stage import read_stage, write_stage
from recray.data.item_features import features_of, item_features
from recray.data.sequences import PAD, Histories
from recray.models import build_model
from recray.models.base import Catalogue
from tests.models_data import fitted

torch.set_num_threads(1)

ITEMS = 60
COLD = range(48, 60)  # items that nobody took


def items() -> Any:
    """Six kinds in turn, tags of two words, a price by kind."""
    return pa.table(
        {
            "kind": [f"kind {i % 6}" for i in range(ITEMS)],
            "tags": [f"tag {i % 6}|tag {i % 3}" if i % 7 else "" for i in range(ITEMS)],
            "price": [1.0 + i % 6 + 0.01 * i for i in range(ITEMS)],
        }
    )


@dataclass(frozen=True, eq=False)
class Data:
    """Users who stay with one kind of item."""

    item_features: Any = field(default_factory=items)
    n_items: int = ITEMS
    n_users: int = 240
    context_sizes: dict[str, int] = field(default_factory=dict)

    def histories(self, split: str = "train") -> Histories:
        rng = np.random.default_rng(1)
        kinds = np.arange(self.n_users) % 6
        return Histories.of([6 * rng.choice(8, 6, False) + kind for kind in kinds])


def model_of(data: Any, **changes: Any) -> Any:
    options = {"dim": 16, "max_len": 8, "dropout": 0.0, "units": 32, "negatives": 64, **changes}
    model = build_model("two-tower", Catalogue.of(data), options)
    model.see(data)
    return model


trained = partial(fitted, batch_size=48)


def test_an_item_nobody_took_is_found_by_its_features() -> None:
    data = Data()
    model = trained(model_of(data), data, 6)
    scores = model.score(Histories.of([[kind, kind + 6, kind + 12] for kind in range(6)]))
    best = scores[:, list(COLD)].topk(2, dim=1).indices + COLD[0]
    assert (best % 6 == torch.arange(6).unsqueeze(1)).float().mean() > 0.9
    blind = trained(model_of(Data(item_features=None)), Data(item_features=None), 6)
    guessed = blind.score(Histories.of([[kind, kind + 6] for kind in range(6)]))[:, list(COLD)].argmax(1)
    assert (guessed % 6 == torch.arange(6)).float().mean() < 0.6


def test_an_item_is_its_id_and_its_features() -> None:
    """x by hand: the id's row, one row a value that is known, and the numbers times W."""
    data = Data()
    model = model_of(data)
    torch.nn.init.normal_(model.of_numbers)
    found = item_features(data)
    sizes = {"kind": 7, "tags": 7}
    assert {name: model.catalogue.item_values[name] for name in sizes} == sizes
    assert model.tables["value"].num_rows == 14  # both places of a tag share their rows
    for row in (0, 7, 8, 33):
        wanted = model.tables["item"].weight[row] + torch.from_numpy(found.numbers[row]) @ model.of_numbers
        for column, name in enumerate(found.names):
            value = found.categories[row, column]
            if value:
                wanted = wanted + model.tables["value"].weight[{"k": 0, "t": 7}[name[0]] + value]
        torch.testing.assert_close(model.embedded(torch.tensor([row]))[0], wanted)
    assert not model.embedded(torch.tensor([PAD])).any()


def test_item_vectors_are_the_item_tower_of_every_item() -> None:
    data = Data()
    model = trained(model_of(data), data, 2)
    vectors = model.item_vectors()
    torch.testing.assert_close(vectors, model.vectors(torch.arange(ITEMS)))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(ITEMS))
    queries = model.encode(Histories.of([[1], [2, 3]]))
    torch.testing.assert_close(queries.norm(dim=2), torch.full((2, 1), 10.0), atol=1e-4, rtol=1e-4)


def test_features_travel_with_the_state(tmp_path: Path) -> None:
    """Who loads the model has no dataset to see."""
    data = Data()
    model = trained(model_of(data), data, 2)
    other = build_model("two-tower", model.catalogue, {"dim": 16, "max_len": 8, "units": 32}).eval()
    other.load_state_dict(model.state_dict())
    asked = Histories.of([[1, 2], []])
    assert torch.equal(other.score(asked), model.score(asked))
    write_stage(tmp_path / "stage", model, "f32", "eager")
    served: Any = read_stage(tmp_path / "stage")
    torch.testing.assert_close(served.score(asked), model.score(asked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loss", ["sampled", "softmax"])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_without_an_order_half_of_a_window_tells_all_of_it(pooling: str, loss: str) -> None:
    """The loss by hand, of users as they are encoded when they ask: log softmax over all items."""
    data = Data(item_features=None)
    options = {"history": "half", "pooling": pooling, "loss": loss, "negatives": ITEMS}
    model = trained(model_of(data, **options), data, 2)
    batch = next(model.batches(data, batch_size=4, epoch=0, seed=0, rank=0, world=1))
    told = Histories.of([[int(i) for i in row if i != PAD] for row in batch.inputs])
    assert 0 < len(told.items) < (batch.targets >= 0).sum()
    with torch.inference_mode():
        scores = model.score(told).log_softmax(1)
        by_hand = -scores.gather(1, torch.from_numpy(batch.targets)).mean()
        torch.testing.assert_close(model.loss(batch), by_hand, atol=1e-4, rtol=1e-4)


def test_the_mean_is_the_mean() -> None:
    data = Data(item_features=None)
    model = model_of(data, pooling="mean", history="half").eval()
    rows = [3, 9, 9, 27]
    pooled = model.tables["item"].weight[rows].mean(0)
    wanted = normalize(pooled, dim=0) / 0.1  # an MLP that has learned nothing adds nothing
    torch.testing.assert_close(model.encode(Histories.of([rows]))[0, 0], wanted, atol=1e-4, rtol=1e-4)


def test_the_order_counts_before_and_not_in_a_half() -> None:
    data = Data(item_features=None)
    rows, turned = Histories.of([[1, 7, 13, 20]]), Histories.of([[20, 13, 7, 1]])
    unordered = trained(model_of(data, history="half"), data, 2)
    torch.testing.assert_close(unordered.encode(rows), unordered.encode(turned), atol=1e-4, rtol=1e-4)
    ordered = trained(model_of(data), data, 2)
    assert not torch.allclose(ordered.encode(rows), ordered.encode(turned), atol=1e-3)


def test_the_full_softmax_is_over_the_item_towers() -> None:
    data = Data()
    model = trained(model_of(data, loss="softmax"), data, 1)
    states, targets = torch.randn(5, 16), torch.tensor([0, 59, 3, 3, 8])
    wanted = torch.nn.functional.cross_entropy(states @ model.item_vectors().T, targets, reduction="sum")
    torch.testing.assert_close(model.full_softmax(states, targets), wanted)


def test_an_items_table_without_anything_to_learn_is_none() -> None:
    names = pa.table({"title": [f"a title of its own {i}" for i in range(ITEMS)]})
    assert not features_of(names, ITEMS).names
    model = model_of(Data(item_features=names))
    assert "value" not in model.tables
    assert model.value_rows.shape == (ITEMS, 0)

"""What a step of a recipe asks: its tables, the lookups in them, and how many of these are distinct."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recray.data.dataset import Dataset
from recray.data.sequences import Histories
from recray.errors import ConfigError
from recray.models import build_model
from recray.models.base import Catalogue
from recray.recipes import recipe
from recray.training.plan import Machine, make_plan
from recray.training.work import dataset_work, distinct_share, recipe_work
from tests.models_data import SmallData, ring_dataset


@given(st.integers(1, 10**9), st.floats(0.1, 1e6))
def test_the_share_of_distinct_ids_is_a_share(rows: int, lookups: float) -> None:
    share = distinct_share(rows, lookups)
    assert 0 < share <= 1
    assert share * lookups <= rows * (1 + 1e-9) or lookups <= 1


def test_the_share_of_distinct_ids_is_what_draws_show() -> None:
    rng = np.random.default_rng(0)
    counts = np.floor(1e6 / np.arange(1, 20_001)).astype(np.int64)
    for known, p in ((20_000, None), (counts, counts / counts.sum())):
        drawn = [len(np.unique(rng.choice(20_000, 5000, p=p))) for _ in range(20)]
        assert distinct_share(known, 5000) * 5000 == pytest.approx(np.mean(drawn), rel=0.01)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ring_dataset(tmp_path_factory.mktemp("planned"), days=True)


def test_a_recipe_says_what_its_step_asks(ring: Dataset) -> None:
    upper = recipe_work(recipe("sasrec"), Catalogue(10**6, {}))
    (table,) = upper.tables
    assert (table.name, table.rows, table.dim, table.optimizer) == ("item", 10**6, 64, "adam")
    assert recipe_work(recipe("sasrec", ["train.table_l2=0.1"]), Catalogue(9, {})).tables[0].penalized
    assert table.lookups == table.scored == 64 * 50
    assert upper.largest == 1
    known = dataset_work(recipe("sasrec"), ring)
    targets = sum(1 + u % 5 for u in range(60)) / 60  # leave-one-out took two of every history
    assert known.tables[0].lookups == pytest.approx(64 * targets)
    assert known.tables[0].distinct * known.tables[0].lookups <= 20
    assert known.largest == pytest.approx(50 / targets)
    words = ["options.loss=sampled", "train.table_dtype=bf16", "train.wire=bf16", "train.accumulate=2"]
    sampled = recipe_work(recipe("sasrec", words), Catalogue(10**6, {}), ranks=2)
    assert sampled.tables[0].lookups == 2 * 64 * 50 + 2 * 256
    assert (sampled.tables[0].scored, sampled.tables[0].dtype) == (0, "bf16")
    assert (sampled.wire, sampled.accumulate) == ("bf16", 2)


def test_every_table_of_a_ranker_is_in_the_plan(ring: Dataset) -> None:
    work = dataset_work(recipe("neumf"), ring)
    names = {table.name for table in work.tables}
    assert names == {"history_gmf", "item_gmf", "history_mlp", "item_mlp", "context_0"}
    by_name = {table.name: table for table in work.tables}
    assert by_name["context_0"].rows == 4
    drawn = ring.n_items  # of the 256 asked for
    assert by_name["item_gmf"].lookups == by_name["history_gmf"].lookups + drawn
    assert work.dense > 1000


def test_a_labelled_example_is_one_item_its_history_and_its_contexts() -> None:
    catalogue = Catalogue(1000, {"day": 7, "place": 9}, {"kind": 5, "maker": 4})
    work = recipe_work(recipe("dlrm", ["options.loss=labels", "train.batch_size=512"]), catalogue, ranks=2)
    asked = {table.name: table.lookups / 512 for table in work.tables}
    assert asked == {"item": 1, "history": 50, "context": 2, "value": 2}
    assert work.largest == 1
    other = recipe_work(
        recipe("dlrm", ["options.loss=labels", "train.batch_size=512", "options.negatives=999"]), catalogue
    )
    assert other == recipe_work(recipe("dlrm", ["options.loss=labels", "train.batch_size=512"]), catalogue)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mind", ["options.max_len=150", "options.negatives=16"]),
        ("mind", ["options.max_len=40", "options.interests=8", "options.negatives=512"]),
        ("two-tower", ["options.max_len=300", "options.negatives=16"]),
        ("two-tower", ["options.max_len=60", "options.pooling=mean", "options.negatives=512"]),
        ("gru4rec", ["options.max_len=60", "options.negatives=512"]),
    ],
)
def test_what_a_step_keeps_is_not_more_than_planned(name: str, words: list[str]) -> None:
    chosen = recipe(name, [*words, "options.loss=sampled", "options.dim=16", "train.batch_size=8"])
    length = int(chosen.options["max_len"])
    rows = np.random.default_rng(0).integers(0, 700, (8, length + 1))
    model = build_model(name, Catalogue(700, {}), chosen.options).train()
    data: Any = SmallData(700, Histories.of([*rows]))
    (batch,) = model.batches(data, batch_size=8, epoch=1, seed=0, rank=0, world=1)  # type: ignore[operator]
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.loss(batch)  # type: ignore[operator]
    assert loss.isfinite()
    plan = make_plan(recipe_work(chosen, Catalogue(700, {})), 1, Machine(memory=1 << 40))
    assert sum(kept.values()) < plan.memory["step"]


def test_what_has_no_steps_has_no_plan() -> None:
    with pytest.raises(ConfigError, match="ials is fitted in closed form"):
        recipe_work(recipe("ials"), Catalogue(10, {}))

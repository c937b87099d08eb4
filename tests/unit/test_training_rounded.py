"""`train.sparse` and `train.bits`: what is trained on is what will be stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recray.bundles.stage import read_stage, write_stage
from recray.data.dataset import Dataset
from recray.errors import ConfigError
from recray.models.saved import load_model
from recray.recipes import recipe
from recray.training import beginning
from recray.training.run import train
from tests.models_data import ring_dataset

WORDS = ["train.threads=1", "train.batch_size=32", "train.epochs=2", "options.dim=16", "options.max_len=8"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ring_dataset(tmp_path_factory.mktemp("log"))


def test_weights_that_went_stay_away_and_cost_a_bundle_nothing(data: Dataset, tmp_path: Path) -> None:
    plain = train(data, recipe("sasrec", WORDS), out=tmp_path / "plain")
    words = [*WORDS, f"train.start={plain.place.uri}", "train.sparse=0.9"]
    sparse = train(data, recipe("sasrec", words), out=tmp_path / "sparse")
    sizes = []
    for made in (plain, sparse):
        model = load_model(made)
        folder = tmp_path / f"{made.place.local.name}-stage"
        write_stage(folder, model, "f32", "eager")
        sizes.append((folder / "weights.safetensors").stat().st_size)
        again = read_stage(folder).state_dict()
        own = {name: value for name, value in model.state_dict().items() if name.startswith("network.")}
        assert all(torch.equal(value, again[name]) for name, value in own.items())
    weights = [m.weight for m in model.network.modules() if isinstance(m, torch.nn.Linear)]  # type: ignore[union-attr]
    gone, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
    assert 0.9 * total - 8 < gone <= 0.9 * total, "a layer keeps at least one"
    assert sizes[1] < 0.5 * sizes[0]


def test_a_network_learns_under_the_rounding_it_will_have(data: Dataset, tmp_path: Path) -> None:
    made = train(data, recipe("sasrec", [*WORDS, "train.bits=4"]), out=tmp_path / "four")
    assert made.manifest.recipe["train"]["bits"] == 4
    words = [*WORDS, f"train.start={made.place.uri}"]
    model = beginning.begun(recipe("sasrec", [*words, "train.bits=4"]), data)
    bare = beginning.begun(recipe("sasrec", words), data)
    batch = next(iter(model.batches(data, batch_size=8, epoch=0, seed=0, rank=0, world=1)))
    with torch.no_grad():
        assert float(model.eval().loss(batch)) != float(bare.eval().loss(batch))


@pytest.mark.parametrize("word", ["train.bits=1", "train.bits=9", "train.sparse=1", "train.sparse=-0.1"])
def test_numbers_that_cannot_be_are_told(word: str, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        train(data, recipe("sasrec", [*WORDS, word]), out=tmp_path / "none")

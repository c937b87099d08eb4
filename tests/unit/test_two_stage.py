"""A ranker behind a retriever: what it learns from, what the two are worth together, and that it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recray
from recray.data.dataset import Dataset
from recray.data.sequences import Histories
from recray.data.synthetic import World, WorldConfig, make, write_world
from recray.errors import ConfigError
from recray.evaluation import evaluate, model_top_k, recommender_top_k
from recray.manifest import Artefact
from recray.models.base import Ranker
from recray.models.saved import load_model
from recray.recommender import Recommender
from recray.storage import place
from recray.training import two_stages
from recray.training.run import run_places

RANKER = ("options.dim=16", "train.epochs=6", "train.lr=0.01", "train.threads=1", "train.candidates=40")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("world")
    write_world(make(WorldConfig(n_users=800, n_items=250, mean_length=24)), folder)
    return recray.prepare(
        folder / "log.parquet",
        items=folder / "items.parquet",
        context=("weekday", "weather"),
        out=folder / "data",
    )


@pytest.fixture(scope="module")
def retriever(data: Dataset) -> Artefact:
    out = data.artefact.place.local.parent / "ials"
    return recray.train(data, recipe="ials", set=("options.dim=16",), out=out)


@pytest.fixture(scope="module")
def ranker(data: Dataset, retriever: Artefact) -> Artefact:
    out = data.artefact.place.local.parent / "neumf"
    return recray.train(data, recipe="neumf", retriever=retriever, set=RANKER, out=out)


def test_candidates_are_what_the_retriever_would_serve_less_what_was_taken(
    data: Dataset, retriever: Artefact, tmp_path: Path
) -> None:
    model: Any = load_model(retriever)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_stages, "_ITEMS", 500)  # in many pieces
        patch.setattr(two_stages, "NEWEST", 5)
        mined = two_stages.mine(model, data, 12, tmp_path)
    log, alone = data.histories("train"), Recommender(model)
    assert (mined.shape, mined.dtype) == ((len(log.items), 12), np.int32)
    for u in np.random.default_rng(0).choice(len(log), 40, replace=False):
        mine, first, last = log[u], log.offsets[u], log.offsets[u + 1]
        for at in range(first, last):
            if at == first or at < last - 5:
                assert not mined[at].any()
                continue
            want = alone.retrieve(Histories.of([mine[: at - first]]), 12, exclude=Histories.of([mine]))
            assert mined[at].tolist() == (want.rows[0] + 1).tolist()
            assert not set(mined[at] - 1) & set(mine)
    before = (tmp_path / "mined.npy").stat().st_mtime_ns
    again = two_stages.mine(model, data, 12, tmp_path)
    assert np.array_equal(again, mined)
    assert (tmp_path / "mined.npy").stat().st_mtime_ns == before, "what is there is not made again"


def test_together_they_are_better_than_the_retriever_alone(
    data: Dataset, retriever: Artefact, ranker: Artefact
) -> None:
    """As they are served: from a bundle, on the test split, the interval of the paired difference above 0."""
    folder = data.artefact.place.local.parent
    alone = recray.bundle(retriever, data=data, out=folder / "alone")
    both = recray.bundle(retriever, ranker=ranker, data=data, out=folder / "both")
    told = ranker.manifest.report["two_stages"]
    assert (both.plan.candidates, both.plan.blend) == (40, told["blend"])
    assert told["valid"][f"{told['blend']:g}"] == max(told["valid"].values())
    assert ranker.manifest.parents["retriever"]["hash"] == retriever.hash
    assert not run_places(place(ranker.place.uri))[0].exists()
    report = recray.evaluate(both, data=data, baseline=alone)
    gain = report.differences["ndcg@10"]
    assert gain.low > 0
    assert gain.mean > 0.1 * report.means["ndcg@10"]


def test_the_share_of_the_retriever_is_the_best_of_those_tried(data: Dataset, retriever: Artefact) -> None:
    class Echo(Ranker):
        """Scores at random: the retriever alone is best."""

        name = "echo"

        def inputs(self, *asked: Any) -> Any:
            raise NotImplementedError

        def score(self, histories: Histories, candidates: Any, context: Any = None) -> Any:
            import torch

            noise = np.random.default_rng(0).normal(size=candidates.shape).astype(np.float32)
            return torch.from_numpy(np.where(candidates < 0, -np.inf, noise).astype(np.float32))

    first: Any = load_model(retriever)
    train = recray.recipes.Train(valid_users=300)
    told = two_stages.choose_share(first, Echo(first.catalogue, first.config), data, 40, train)
    assert told["blend"] >= 0.8
    cases = data.cases("valid", 300, 0)
    alone = evaluate(recommender_top_k(Recommender(first)), cases, ks=(10,)).means["ndcg@10"]
    assert told["valid"]["1"] == pytest.approx(alone, abs=1e-6)


def test_a_ranker_of_another_retriever_is_bundled_as_usual(
    data: Dataset, ranker: Artefact, tmp_path: Path
) -> None:
    other = recray.train(data, recipe="ials", set=("options.dim=8",), out=tmp_path / "other")
    both = recray.bundle(other, ranker=ranker, data=data, out=tmp_path / "both")
    assert (both.plan.candidates, both.plan.blend) == (200, 0.8)


def test_with_propensities_the_lists_are_nearer_to_what_people_want(tmp_path: Path) -> None:
    """By the world's own truth, not by a log that is as biased as the one that was learned from."""
    world = make(WorldConfig(n_users=600, n_items=125, mean_length=20, position_bias=1.5))
    log = write_world(world, tmp_path) / "log.parquet"
    weighed = (
        *RANKER,
        "train.valid_users=0",
        "options.max_len=15",
        "options.negatives=32",
        "options.propensity=propensity",
    )
    found = {}
    for context, changes in (((), weighed[:-1]), (("propensity",), weighed)):
        data = recray.prepare(log, context=context, out=tmp_path / f"data{len(context)}")
        made: Any = load_model(
            recray.train(data, recipe="dlrm", set=changes, out=tmp_path / f"dlrm{len(context)}")
        )
        assert made.columns == []
        assert len(made.tables) == 2  # of items and histories
        found[len(context)] = wanted(world, data, made)
    assert found[1] > 1.02 * found[0]


def wanted(world: World, data: Dataset, ranker: Ranker) -> float:
    """Mean discounted chance that the user truly wants what the ranker's ten best are."""
    cases = data.cases("test")
    users = {user: row for row, user in enumerate(world.users.column("user").to_pylist())}
    items = {item: row for row, item in enumerate(world.items.column("item").to_pylist())}
    truth = world.affinity(np.array([users[u] for u in data.users.ids_of(cases.user_rows)]))
    truth = truth[:, [items[i] for i in data.items.ids_of(np.arange(data.n_items))]]
    top = model_top_k(ranker)(cases, 10)
    return float((np.take_along_axis(truth, top, 1) / np.log2(np.arange(2, 12))).sum(1).mean())


def test_what_does_not_fit_is_refused(
    data: Dataset, retriever: Artefact, ranker: Artefact, tmp_path: Path
) -> None:
    asked = {"out": tmp_path / "out", "set": RANKER}
    with pytest.raises(ConfigError, match="sasrec is not a ranker"):
        recray.train(data, recipe="sasrec", retriever=retriever, out=tmp_path / "out")
    with pytest.raises(ConfigError, match="neumf is not a retriever"):
        recray.train(data, recipe="neumf", retriever=ranker, **asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="workers"):
        recray.train(data, recipe="neumf", retriever=retriever, workers=2, **asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="loss=labels learns from no candidates"):
        labels = ["options.loss=labels"]
        recray.train(data, recipe="dlrm", retriever=retriever, set=labels, out=tmp_path / "out")
    log = tmp_path / "log.csv"
    log.write_text("user,item\n" + "".join(f"u{u},i{i}\n" for u in range(9) for i in range(5)))
    other = recray.prepare(log, out=tmp_path / "other")
    with pytest.raises(ConfigError, match="another dataset"):
        recray.train(other, recipe="neumf", retriever=retriever, **asked)  # type: ignore[arg-type]

"""A bundle of every codec and index: built, opened and asked; bits chosen per table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recray import config
from recray.bundles.build import asking, build
from recray.bundles.bundle import Bundle
from recray.bundles.plan import Plan
from recray.compression.askers import wrong
from recray.compression.codec import CODECS, CodedTable
from recray.data.dataset import Dataset
from recray.errors import ConfigError
from recray.manifest import Artefact
from recray.models import build_model
from recray.models.base import Catalogue, Retriever
from recray.models.saved import load_model
from recray.retrieval.index import INDEXES
from recray.tuning import packing
from tests.serving_bundles import checkpoint, small_dataset

CODES = [*CODECS, "pq:width=4,bits=4", "tiers:head=int8,middle=pq:width=2+bits=8,tail=int4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("codecs"))


@pytest.fixture(scope="module")
def ials(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Artefact:
    return checkpoint(tmp_path_factory.mktemp("codecs-ials") / "ials", data, "ials", dim=16)


@pytest.fixture(scope="module")
def neumf(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Artefact:
    return checkpoint(tmp_path_factory.mktemp("codecs-neumf") / "neumf", data, "neumf", dim=8)


def table_of(made: Bundle, name: str = "item") -> CodedTable:
    table = made.recommender.retriever.tables[name]
    assert isinstance(table, CodedTable)
    return table


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("codec", CODES)
def test_what_is_served_is_what_the_decoded_table_says(
    tmp_path: Path, data: Dataset, ials: Artefact, codec: str, index: str
) -> None:
    made = build(tmp_path / "bundle", ials, None, data, Plan(retriever_codec=codec, index=index))
    table = table_of(made)
    user = made.histories.take([6])
    scores = (made.recommender.retriever.encode(user)[:, 0] @ table.dense().T).numpy()[0]
    scores[made.histories[6]] = -np.inf
    best = np.argsort(-scores, kind="stable")[:10]
    answer = made.recommend(user=made.users.id_of(6), k=10)
    assert made.items.rows_of([item.item for item in answer.items]).tolist() == best.tolist()
    np.testing.assert_allclose([item.score for item in answer.items], scores[best], rtol=1e-4)
    bound = packing.table_bytes({"retriever_codec": codec}, load_model(ials), None)
    assert bound == table.nbytes <= made.model_bytes


def test_the_head_holds_the_popular_items(tmp_path: Path, data: Dataset, ials: Artefact) -> None:
    plan = Plan(retriever_codec="tiers:head=f32,head_share=0.1,middle_share=0,tail=int4")
    made = build(tmp_path / "bundle", ials, None, data, plan)
    popular = np.argsort(-made.recommender.popularity, kind="stable")[:15]
    assert table_of(made).arrays["head_rows"].tolist() == sorted(popular.tolist())


def test_each_table_has_its_own_codec(tmp_path: Path, data: Dataset, ials: Artefact, neumf: Artefact) -> None:
    plan = Plan(
        retriever_codec={"item": "pq:width=4"},
        ranker_codec={"item_gmf": "int8", "item_mlp": "low-rank:share=0.5,values=f16"},
        candidates=20,
    )
    made = build(tmp_path / "bundle", ials, neumf, data, plan, pieces=tmp_path / "pieces")
    assert made.plan == config.build(Plan, json.loads(json.dumps(config.as_dict(plan)))) == plan
    ranker = made.recommender.ranker
    assert ranker is not None
    found = {name: table.codec.name for name, table in ranker.tables.items()}  # type: ignore[union-attr]
    assert found.pop("item_gmf") == "int8"
    assert found.pop("item_mlp") == "low-rank"
    assert set(found.values()) == {"f32"}
    assert len(made.recommend(user="u3", k=5).items) == 5
    whole = build(tmp_path / "whole", ials, neumf, data, Plan(candidates=20), pieces=tmp_path / "pieces")
    assert made.model_bytes < whole.model_bytes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"retriever_codec": {"items": "int8"}}, "the retriever has item"),
        ({"retriever_codec": {"item": "int9"}}, "did you mean 'int8'"),
        ({"retriever_codec": "pq:width=none"}, "pq.width"),
        ({"ranker_codec": {"item": "int8"}}, "the ranker has none"),
    ],
)
def test_a_codec_of_no_table_is_refused(
    tmp_path: Path, data: Dataset, ials: Artefact, given: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build(tmp_path / "bundle", ials, None, data, Plan(**given))  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_the_search_space_has_every_codec_and_index(data: Dataset, ials: Artefact) -> None:
    model = load_model(ials)
    assert isinstance(model, Retriever)
    space = packing.plan_space(model, None)
    assert space is not None
    assert set(space.dimensions["retriever_codec"].choices) == set(CODECS)
    assert set(space.dimensions["index"].choices) == set(INDEXES)
    draw = np.random.default_rng(0)
    for _ in range(40):
        packing.plan_of(space.sample(draw)).check(model, None)


def test_codes_are_fitted_to_the_users_of_the_train_split(
    tmp_path: Path, data: Dataset, ials: Artefact
) -> None:
    model = load_model(ials)
    assert isinstance(model, Retriever)
    askers = asking(model, data)
    assert askers is not None
    vectors, metric = model.item_vectors().detach(), askers.metric(0, data.n_items)
    off = []
    for fit in (0, 2):
        plan = Plan(retriever_codec=f"pq:width=8,bits=4,fit={fit}")
        table = table_of(build(tmp_path / f"fit-{fit}", ials, None, data, plan))
        off.append(float(wrong(table.dense() - vectors, metric).sum()))
    assert off[1] < 0.9 * off[0]


def test_who_asks_is_known_of_retrievers_with_one_vector_a_user(data: Dataset, ials: Artefact) -> None:
    found = asking(load_model(ials), data, users=7)
    assert found is not None
    assert (len(found), found.vectors.shape[0]) == (data.n_items, 7)
    assert asking(build_model("ease", Catalogue.of(data), {}), data) is None


def test_what_users_would_be_shown_counts_where_there_are_items_enough(
    data: Dataset, ials: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(ials)
    plain = asking(model, data)
    monkeypatch.setattr("recray.bundles.build._RARE", 0)
    listed = asking(model, data)
    assert plain is not None
    assert listed is not None
    assert len(plain.users) == len(data.histories("train").items)
    assert len(listed.users) > len(plain.users)

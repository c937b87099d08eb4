"""Every model of MODELS is trained, bundled, served and asked over HTTP, one by one on one running Serve."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from recray.bundles.build import build
from recray.bundles.bundle import Bundle
from recray.bundles.plan import Plan
from recray.data.dataset import Dataset
from recray.manifest import Artefact
from recray.models import MODELS, model_class
from recray.recipes import RECIPES, recipe
from recray.recommender import Ranked
from recray.serving.process import check_free
from recray.training.run import train
from tests.serving_bundles import small_dataset

pytestmark = [pytest.mark.ray_cluster, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FIRST = "ials"  # the retriever before every ranker
QUICK = ("train.epochs=1", "train.valid_users=0", "train.threads=1")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def first(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return trained(FIRST, data, tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def running(ray_cluster: str) -> Iterator[None]:
    """Serve without an application: each test puts its own on it and takes it away."""
    from ray import serve

    port = check_free("127.0.0.1", 0)
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": "127.0.0.1", "port": port},
        logging_config=quiet,  # type: ignore[arg-type]
    )
    yield
    serve.shutdown()


def trained(name: str, data: Dataset, folder: Path) -> Artefact:
    """What the first recipe of that model leaves, trained for an epoch."""
    of_it = next(key for key in RECIPES if recipe(key).model == name)
    return train(data, recipe(of_it, QUICK), out=folder / name)


def asks(bundle: Bundle) -> Iterator[dict[str, Any]]:
    """Known and unknown users, histories, what is excluded, filters, circumstances."""
    items = bundle.items.ids_of(range(len(bundle.items)))
    yield {"user": "u1", "k": 7}
    yield {"user": "u2", "context": {"weather": "rain"}}
    yield {"user": "u3", "filter": {"category": ["book", "song"]}}
    yield {"user": "u4", "exclude": items[:20], "filter": {"category": "film"}, "k": 1000}
    yield {"history": items[5:8], "k": 5}
    yield {"history": items[9:40], "exclude": items[:9]}
    yield {"user": "nobody", "exclude": items[3:9]}
    yield {"history": ["unknown"], "filter": {"category": "book"}}
    yield {}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_trained_bundled_served_and_answers_as_it_does_in_process(
    name: str, data: Dataset, first: Artefact, running: None, tmp_path: Path
) -> None:
    from recray.serving.on_ray import serving

    made = trained(name, data, tmp_path)
    ranks = model_class(name).stage == "ranker"
    stages = (first, made) if ranks else (made, None)
    bundle = build(tmp_path / "bundle", *stages, data, Plan(candidates=40, blend=0.5))
    with (
        serving(bundle.artefact.place.uri, port=0, name=name) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for ask in asks(bundle):
            found = client.post("/v1/recommend", json=ask)
            assert found.status_code == 200, found.text
            request = bundle.request(**ask)
            wanted = bundle.recommender.recommend(**bundle.arguments(request))
            same(bundle, found.json(), wanted, ask)
            shut = set(ask.get("exclude", ())) | set(bundle.items.ids_of(request.history))
            assert not shut & {item["item"] for item in found.json()["items"]}
        usual = "ranker" if ranks else "retriever"
        assert found.json()["items"][0]["source"] == "popular"
        assert client.post("/v1/recommend", json={"user": "u1"}).json()["items"][0]["source"] == usual
        for row in (0, 7, 70):
            (item,) = bundle.items.ids_of([row])
            found = client.get(f"/v1/items/{item}/similar?k=4")
            same(bundle, found.json(), bundle.recommender.similar(row, 4), item)


def same(bundle: Bundle, found: dict[str, Any], wanted: Ranked, asked: object) -> None:
    """The items of the answer are those of `Recommender`, and its scores within 1e-5."""
    rows = wanted.rows[0][wanted.rows[0] >= 0]
    assert [item["item"] for item in found["items"]] == bundle.items.ids_of(rows), asked
    scores = wanted.scores[0][: len(rows)]
    np.testing.assert_allclose([i["score"] for i in found["items"]], scores, atol=1e-5, rtol=1e-5)
    assert found["generation"] == bundle.generation

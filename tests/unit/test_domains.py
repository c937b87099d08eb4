"""Every domain, from a log of the synthetic world to an answer over its own bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import recray
from recray import api
from recray.cli.build import DOMAINS as WORDS
from recray.data import synthetic
from recray.domains import DOMAINS
from recray.errors import ConfigError, InputError

SMALL = ("train.epochs=1", "train.threads=1", "train.valid_users=20")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world whose items also have a risk and a rule."""
    config = synthetic.WorldConfig(n_users=120, n_items=150, mean_length=10.0)
    folder = synthetic.write_world(synthetic.make(config), tmp_path_factory.mktemp("world"))
    items = pq.read_table(folder / "items.parquet")
    draw = np.random.default_rng(0)
    items = items.append_column("risk", pa.array(draw.integers(1, 8, len(items))))
    items = items.append_column("restricted", pa.array(draw.random(len(items)) < 0.3))
    pq.write_table(items, folder / "items.parquet")
    return folder


@pytest.mark.parametrize("name", DOMAINS)
def test_from_a_log_to_an_answer(name: str, world: Path, tmp_path: Path) -> None:
    gradient = DOMAINS[name].retriever[0] not in ("ials", "ease", "item-knn")
    bundle = recray.build(
        world / "log.parquet",
        name,
        items=world / "items.parquet",
        context=("weekday",),
        set=SMALL if gradient or DOMAINS[name].ranker else (),
        out=tmp_path,
    )
    answer = bundle.recommend(user="u003", k=200, exclude_seen=False)
    features = bundle.item_features
    assert features is not None
    rows = bundle.items.rows_of([item.item for item in answer.items])
    held = {
        column: [features.column(column)[int(row)].as_py() for row in rows]
        for column in ("risk", "restricted")
    }
    assert len(rows) > 50
    if name == "finance":
        assert max(held["risk"]) == 5
    elif name == "health":
        assert not any(held["restricted"])
    else:
        assert len(rows) == bundle.recommender.n_items
    assert {item.source for item in answer.items} == {"ranker" if DOMAINS[name].ranker else "retriever"}
    weights = bundle.artefact.manifest.parents
    assert {"dataset", "checkpoint"} <= set(weights)


def test_a_ranker_is_trained_here_where_the_retriever_is_not(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    here = api.train

    def train(data: Any, *, recipe: str, workers: int = 0, **more: Any) -> Any:
        asked[recipe] = workers
        return here(data, recipe=recipe, **more)

    monkeypatch.setattr(api, "train", train)
    recray.build(world / "log.parquet", "social", set=SMALL, out=tmp_path, workers=2)
    assert asked == {"ials": 2, "neumf": 0}


def test_what_was_made_from_the_same_is_kept(world: Path, tmp_path: Path) -> None:
    def build(*changes: str) -> list[float]:
        made = [*SMALL, *changes]
        recray.build(world / "log.parquet", "course", set=made, out=tmp_path, items=world / "items.parquet")
        return [(tmp_path / part / "manifest.json").stat().st_mtime for part in ("retriever", "ranker")]

    first = build()
    assert build() == first
    other = build("train.seed=5")
    assert min(other) > max(first)


def test_health_holds_back_what_it_does_not_know(world: Path, tmp_path: Path) -> None:
    items = pq.read_table(world / "items.parquet").slice(0, 100)  # of the others nothing is known
    pq.write_table(items, tmp_path / "items.parquet")
    bundle = recray.build(
        world / "log.parquet", "health", items=tmp_path / "items.parquet", out=tmp_path / "out"
    )
    shown = {item.item for item in bundle.recommend(user="u003", k=200, exclude_seen=False).items}
    allowed = items.filter(pc.invert(items.column("restricted"))).column("item").to_pylist()
    assert len(shown) > 10
    assert shown <= set(allowed)


def test_the_command_knows_every_domain() -> None:
    assert list(DOMAINS) == WORDS


@pytest.mark.parametrize(
    ("domain", "more", "error", "words"),
    [
        ("shops", {}, ConfigError, "unknown domain 'shops'.*shop"),
        ("finance", {}, InputError, "needs an item column 'risk'"),
    ],
)
def test_what_cannot_be_built(
    domain: str, more: dict[str, Any], error: type[Exception], words: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        recray.build(world / "log.parquet", domain, out=tmp_path, **more)


@pytest.mark.parametrize(
    ("domain", "column", "words"),
    [
        ("health", ["yes", "no"], "needs true and false in the item column 'restricted', which holds string"),
        ("health", [1, 0], "needs true and false in the item column 'restricted', which holds int64"),
        ("finance", ["low", "high"], "needs numbers in the item column 'risk', which holds string"),
    ],
)
def test_columns_that_a_filter_cannot_ask(
    domain: str, column: list[Any], words: str, world: Path, tmp_path: Path
) -> None:
    name = next(iter(DOMAINS[domain].needs))
    items = pq.read_table(world / "items.parquet")
    held = pa.array([column[n % 2] for n in range(len(items))])
    items = items.set_column(items.column_names.index(name), name, held)
    pq.write_table(items, tmp_path / "items.parquet")
    with pytest.raises(InputError, match=words):
        recray.build(world / "log.parquet", domain, items=tmp_path / "items.parquet", out=tmp_path / "out")
    assert not (tmp_path / "out" / "retriever").exists()

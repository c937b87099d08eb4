"""Filters, pins, caps and diversity of a request, against the whole catalogue in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from recray import api
from recray.bundles.bundle import Bundle, Item
from recray.bundles.many import FILE
from recray.cli.main import main
from recray.data.sequences import Histories
from recray.errors import InputError
from recray.retrieval.index import INDEXES
from tests.serving_bundles import small_bundle


@pytest.fixture(scope="module", params=["sasrec", "item-knn", "ranked"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder, ranked = tmp_path_factory.mktemp("rules"), request.param == "ranked"
    return small_bundle(folder, ranker=ranked, retriever="sasrec" if ranked else request.param)


def names(items: list[Item]) -> list[str]:
    return [item.item for item in items]


def value(bundle: Bundle, item: str, column: str) -> Any:
    assert bundle.item_features is not None
    return bundle.item_features.column(column)[int(bundle.items.rows_of([item])[0])].as_py()


@pytest.mark.parametrize("index", INDEXES)
def test_a_sharp_filter_is_an_exact_search_of_what_it_leaves(index: str, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path, ranker=False, index=index)
    asked = {"price": {"min": 3, "max": 4}, "category": ["book", "film"]}
    mask = bundle.filters.mask(bundle.wanted(asked))
    assert mask is not None
    assert 3 <= mask.sum() <= 20
    for user in ("u0", "u7", "u33"):
        history = bundle.request(user).history
        with torch.inference_mode():
            scores = bundle.recommender.retriever.score(Histories.of([history])).numpy()[0]
        left = [row for row in np.argsort(-scores, kind="stable") if mask[row] and row not in history]
        got = names(bundle.recommend(user, k=50, filter=asked).items)
        assert got == bundle.items.ids_of(left)


def test_pins_have_their_places_and_the_others_their_order(bundle: Bundle) -> None:
    for user in ("u1", "u2", "nobody"):
        before = bundle.recommend(user, k=12)
        far = [
            i for i in reversed(names(bundle.recommend(user, k=1000).items)) if i not in names(before.items)
        ]
        pins = [far[0], {"item": far[1], "place": 4}, names(before.items)[2], far[0]]
        after = bundle.recommend(user, k=12, pin=pins)
        assert [names(after.items)[at] for at in (0, 1, 3)] == [far[0], names(before.items)[2], far[1]]
        assert [i.source == "pin" for i in after.items] == [at in (0, 1, 3) for at in range(12)]
        others = [i for i in names(after.items) if i not in (far[0], far[1], names(before.items)[2])]
        wanted = [i for i in names(before.items) if i != names(before.items)[2]]
        assert others == wanted[:9]
        assert "pin left out" not in after.degraded
        assert np.isfinite([i.score for i in after.items]).all()


def test_a_pin_that_must_not_be_shown_is_left_out(bundle: Bundle) -> None:
    seen = bundle.items.id_of(int(bundle.request("u1").history[0]))
    best = names(bundle.recommend("u1", k=9).items)
    kind = value(bundle, best[0], "category")
    for asked in (
        {"pin": [seen]},
        {"pin": [best[5]], "exclude": [best[5]]},
        {"pin": [best[0]], "filter": {"category": {"not": kind}}},
        {"pin": ["unknown"]},
    ):
        answer = bundle.recommend("u1", k=9, **asked)  # type: ignore[arg-type]
        assert "pin left out" in answer.degraded
        assert asked["pin"][0] not in names(answer.items)
        plain = {key: given for key, given in asked.items() if key != "pin"}
        assert names(answer.items) == names(bundle.recommend("u1", k=9, **plain).items)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "caps", [{"category": 1}, {"category": 3}, {"price": 1}, {"price": 2, "category": 4}]
)
def test_caps_are_kept_and_k_items_come_where_there_are_so_many(bundle: Bundle, caps: Any) -> None:
    for user in ("u1", "u8", "nobody"):
        whole = names(bundle.recommend(user, k=1000).items)
        chosen: list[str] = []
        for item in whole:
            alike = {c: sum(value(bundle, o, c) == value(bundle, item, c) for o in chosen) for c in caps}
            if len(chosen) < 11 and all(alike[column] < most for column, most in caps.items()):
                chosen.append(item)
        got = names(bundle.recommend(user, k=11, caps=caps).items)
        assert len(got) == len(set(got)) == len(chosen)
        for column, most in caps.items():
            assert max(np.unique([value(bundle, i, column) for i in got], return_counts=True)[1]) <= most
        if bundle.recommender.ranker is None:
            assert got == chosen


def test_diversity_keeps_k_and_nought_changes_nothing(bundle: Bundle) -> None:
    for user in ("u1", "u8", "nobody"):
        before = bundle.recommend(user, k=10)
        assert bundle.recommend(user, k=10, diversity=0) == before
        lists = [names(bundle.recommend(user, k=10, diversity=d).items) for d in (0.01, 0.5, 1)]
        assert all(len(set(one)) == 10 and one[0] == before.items[0].item for one in lists)
        assert lists[2] != names(before.items)


def test_many_users_get_what_each_gets_alone(bundle: Bundle, tmp_path: Path) -> None:
    whole = names(bundle.recommend("nobody", k=1000).items)
    asked: dict[str, Any] = {
        "pin": [whole[50], {"item": whole[60], "place": 3}],
        "caps": {"category": 3},
        "filter": {"price": {"max": 15}},
        "exclude": whole[:4],
        "diversity": 0.2,
    }
    users = ["u1", "nobody", *(f"u{row}" for row in range(2, 20))]
    api.recommend(bundle, users=users, k=6, out=tmp_path / "out", **asked)
    lines = pq.read_table(tmp_path / "out" / FILE).to_pylist()
    for user in users:
        wanted = bundle.recommend(user, k=6, **asked).items
        got = [(line["item"], line["source"]) for line in lines if line["user"] == user]
        assert got == [(i.item, i.source) for i in wanted]


def test_the_bundles_own_filter_holds_for_many_users(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path, ranker=False, filter={"category": "book"})
    api.recommend(bundle, users=["u1", "nobody"], k=20, out=tmp_path / "out")
    lines = pq.read_table(tmp_path / "out" / FILE).to_pylist()
    assert {value(bundle, line["item"], "category") for line in lines} == {"book"}


def test_a_bundle_is_measured_with_its_own_filter(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path, ranker=False, filter={"category": "book"})
    report = api.evaluate(bundle)
    assert report.means["diversity@10"] == 0
    assert 0 < report.means["coverage@20"] < 0.5


@pytest.mark.parametrize(
    "asked",
    [
        {"pin": "i1"},
        {"pin": [None]},
        {"pin": [True]},
        {"pin": [{"item": "i1", "at": 3}]},
        {"pin": [{"place": 3}]},
        {"pin": [{"item": "i1", "place": 0}]},
        {"pin": [{"item": "i1", "place": 6}]},
        {"pin": [{"item": "i1", "place": 2}, {"item": "i2", "place": 2}]},
        {"pin": ["i1", "i2", "i3", "i4", "i5", "i6"]},
        {"caps": ["category"]},
        {"caps": {"colour": 1}},
        {"caps": {"category": 0}},
        {"caps": {"category": True}},
        {"caps": {"category": 1.5}},
        {"diversity": 1.1},
        {"diversity": -1},
        {"diversity": float("nan")},
        {"diversity": "much"},
        {"filter": {"colour": 1}},
        {"colour": 1},
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(bundle: Bundle, asked: Any) -> None:
    with pytest.raises(InputError) as error:
        api.recommend(bundle, user="u1", k=5, **asked)
    assert "\n" not in str(error.value)


def test_on_the_command_line(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    place = bundle.artefact.place.uri
    asked = {"caps": {"category": 1}, "filter": {"category": ["book", "film"]}}
    words = ["recommend", place, "--user", "u1", "-k", "4", "--json", "--ask", json.dumps(asked)]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [i["item"] for i in told["items"]] == names(bundle.recommend("u1", k=4, **asked).items)  # type: ignore[arg-type]
    assert main([*words[:-1], '{"user": "u2"}']) == 2
    assert "no field 'user'" in capsys.readouterr().err

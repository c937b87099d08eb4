"""New and withdrawn items of an open bundle: seen in every answer, and named by the generation."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from recray import api
from recray.bundles.bundle import Answer, Bundle, open_front
from recray.bundles.changes import Changes, change, with_changes
from recray.bundles.many import FILE
from recray.errors import ArtefactError, InputError
from recray.serving import stages
from recray.serving.ingress import Fused, Ingress, Split
from recray.serving.schema import RecommendRequest
from recray.serving.settings import Batch
from tests.serving_bundles import requests, small_bundle


@pytest.fixture(scope="module", params=["retrieved", "ranked", "scored"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("changes")
    if request.param == "retrieved":
        return small_bundle(folder, ranker=False, index="hnsw")
    return small_bundle(folder) if request.param == "ranked" else small_bundle(folder, retriever="item-knn")


def names(answer: Answer) -> list[str]:
    return [item.item for item in answer.items]


def grown(bundle: Bundle) -> Bundle:
    """With two new items near the user's best ones, and one withdrawn."""
    best = names(bundle.recommend("u1", k=3))
    new: list[dict[str, Any]] = [
        {"item": "new1", "like": [best[0]], "features": {"category": "book", "price": 500}},
        {"item": "new2", "like": best[1:], "features": {"category": "film"}},
    ]
    return change(bundle, withdraw=[best[2]], add=new)


def test_what_is_withdrawn_is_nowhere_and_comes_back(bundle: Bundle, tmp_path: Path) -> None:
    gone = names(bundle.recommend("u1", k=4)) + names(bundle.recommend("nobody", k=4))
    less = change(bundle, withdraw=gone)
    assert less.generation.startswith(bundle.generation + "+")
    for user in ("u1", "u5", "nobody"):
        whole = [item for item in names(bundle.recommend(user, k=1000)) if item not in gone]
        got = names(less.recommend(user, k=1000))
        assert sorted(got) == sorted(whole)
        if bundle.recommender.ranker is None:
            assert got == whole
        pinned = less.recommend(user, k=5, pin=gone[:1])
        assert gone[0] not in names(pinned)
        assert "pin left out" in pinned.degraded
    some = less.items.id_of(5)
    assert not set(gone) & set(names(less.similar(some, 1000)))
    api.recommend(less, users=["u1", "nobody"], k=30, out=tmp_path / "out")
    assert not set(gone) & set(pq.read_table(tmp_path / "out" / FILE)["item"].to_pylist())
    assert gone[0] in names(bundle.recommend("u1", k=4)), "the given bundle stays as it was"
    back = change(less, restore=gone)
    assert back.generation == bundle.generation
    assert names(back.recommend("u1", k=9)) == names(bundle.recommend("u1", k=9))


def test_a_new_item_is_answered_where_it_belongs(bundle: Bundle) -> None:
    if bundle.recommender.index is None:
        with pytest.raises(InputError, match="no item vectors"):
            grown(bundle)
        return
    best = names(bundle.recommend("u1", k=3))
    more = grown(bundle)
    got = names(more.recommend("u1", k=1000))
    assert {"new1", "new2"} <= set(got)
    if bundle.recommender.ranker is None:
        assert got[:2] == [best[0], "new1"], "its vector is that of the best, whose row is lower"
    assert "new1" in names(more.similar(best[0], 3))
    assert best[0] in names(more.similar("new1", 2))
    assert names(more.recommend("u1", filter={"price": {"min": 400}})) == ["new1"]
    assert names(more.recommend("u1", k=3, pin=["new2"]))[0] == "new2"
    assert "new1" not in names(more.recommend("u1", k=1000, history=["new1", "i1"]))
    assert names(more.recommend(history=["new1"])) == names(more.recommend("nobody", exclude=["new1"]))
    assert {"new1", "new2"} <= set(names(more.recommend("nobody", k=1000)))
    caps = names(more.recommend("u1", k=1000, caps={"price": 1}))
    assert "new2" in caps, "an unknown feature is under no cap"
    assert more.recommend("u1", k=20, diversity=0.7, why=True).why[0].generation == more.generation
    both = change(more, withdraw=["new1"])
    assert "new1" not in names(both.recommend("u1", k=1000))


def test_equal_changes_are_one_generation_and_a_file_gives_them_back(bundle: Bundle, tmp_path: Path) -> None:
    one = change(change(bundle, withdraw=["i1", "i2"]), withdraw=["i4"], restore=["i2"])
    other = change(bundle, withdraw=["i4", "i1"])
    assert one.generation == other.generation != change(bundle, withdraw=["i1"]).generation
    full = one if bundle.recommender.index is None else change(grown(bundle), withdraw=["i1"])
    assert full.changes is not None
    full.changes.save(tmp_path / "changes.json")
    back = with_changes(bundle, Changes.load(tmp_path / "changes.json"))
    assert back.generation == full.generation
    assert names(back.recommend("u1", k=50)) == names(full.recommend("u1", k=50))
    (tmp_path / "changes.json").write_text("[]")
    with pytest.raises(ArtefactError, match="no file of changes"):
        Changes.load(tmp_path / "changes.json")


def test_both_layouts_answer_as_the_changed_bundle(bundle: Bundle) -> None:
    less = change(bundle, withdraw=["i1", "i5"]) if bundle.recommender.index is None else grown(bundle)
    front = with_changes(open_front(bundle.artefact.place), less.changes or Changes())
    assert front.generation == less.generation

    def hop(work: Any) -> Any:
        async def ask(*asked: object) -> stages.Found:
            return await asyncio.to_thread(work, less, *asked)

        return ask

    ranked = less.recommender.ranker is not None
    split = Split(
        front,
        Batch(),
        retrieve=hop(stages.retrieve),
        similar=hop(stages.similar),
        rank=hop(stages.rank) if ranked else None,
    )
    for ingress in (Ingress(less, Fused(less, Batch())), Ingress(front, split)):
        for ask in list(requests(bundle))[::3]:
            reply = asyncio.run(ingress.recommend(RecommendRequest(**ask)))
            want = less.recommend(**ask)
            assert [(i["item"], i["source"]) for i in reply.items] == [(i.item, i.source) for i in want.items]
            assert (reply.generation, reply.degraded) == (less.generation, want.degraded)


@pytest.mark.parametrize(
    "asked",
    [
        {"withdraw": ["nothing"]},
        {"restore": ["nothing"]},
        {"add": [{"item": "i1", "like": ["i2"]}]},
        {"add": [{"item": "new", "like": ["i2"]}, {"item": "new", "like": ["i3"]}]},
        {"add": [{"item": "new"}]},
        {"add": [{"item": "new", "like": []}]},
        {"add": [{"item": "new", "like": ["nothing"]}]},
        {"add": [{"item": "new", "like": ["i1"], "vector": [0.0] * 16}]},
        {"add": [{"item": "new", "vector": [1.0, 2.0]}]},
        {"add": [{"item": "new", "vector": [float("nan")] * 16}]},
        {"add": [{"item": "new", "vector": "much"}]},
        {"add": [{"item": "new", "like": ["i1"], "features": {"colour": "red"}}]},
        {"add": [{"item": "new", "like": ["i1"], "features": {"price": "cheap"}}]},
        {"add": [{"item": "", "like": ["i1"]}]},
        {"add": ["new"]},
        {"add": [{"item": None, "like": ["i1"]}]},
        {"add": [{"item": ["a"], "like": ["i1"]}]},
        {"add": [{"item": "new", "like": ["i1"], "features": None}]},
        {"add": [{"item": "new", "vector": [10**400] * 16}]},
        {"withdraw": 5},
        {"withdraw": [None]},
    ],
)
def test_what_cannot_be_changed_is_refused_in_a_line(bundle: Bundle, asked: Any) -> None:
    with pytest.raises(InputError) as error:
        change(bundle, **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"withdraw": "12"}, "'12' is one id"),
        ({"restore": "i1"}, "'i1' is one id"),
        ({"add": [{"item": "\ud800", "like": ["i1"]}]}, "cannot be"),
        ({"add": [{"item": "x", "like": ["i1"], "features": {"price": np.int64(3)}}]}, "cannot be"),
    ],
    ids=["one id", "one id back", "surrogate", "numpy"],
)
def test_what_is_no_list_or_no_json_is_refused(bundle: Bundle, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        change(bundle, **asked)

"""Why an item is in an answer, as ids and shared features, from a bundle and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recray.bundles.build import build
from recray.bundles.bundle import Bundle
from recray.bundles.plan import Plan
from recray.cli.main import main
from recray.errors import InputError
from recray.recommender import Recommender
from tests.serving_bundles import checkpoint, small_dataset


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("why")
    data = small_dataset(folder)
    ials = checkpoint(folder / "ials", data, "ials")
    neumf = checkpoint(folder / "neumf", data, "neumf", dim=8)
    return {
        "alone": build(folder / "alone", ials, None, data, Plan()),
        "ranked": build(folder / "ranked", ials, neumf, data, Plan(candidates=30, ranker_codec="f16")),
    }


@pytest.mark.parametrize("name", ["alone", "ranked"])
def test_each_item_of_an_answer_has_its_reasons(bundles: dict[str, Bundle], name: str) -> None:
    bundle = bundles[name]
    answer = bundle.recommend(user="u3", k=3, why=True)
    seen = set(bundle.items.ids_of(bundle.histories[int(bundle.users.rows_of(["u3"])[0])]))
    for item, why in zip(answer.items, answer.why, strict=True):
        assert why.item == item.item
        assert why.score == pytest.approx(item.score, abs=1e-3)
        assert {reason.item for reason in why.reasons} == seen
        if why.additive:
            assert why.base + sum(r.weight for r in why.reasons) == pytest.approx(why.score, abs=1e-5)
    assert answer.why[0].additive == (name == "alone")
    assert not bundle.recommend(user="u3", k=3).why


@pytest.mark.parametrize(
    "asked",
    [
        {"filter": {"category": "book"}},
        {"exclude_seen": False},
        {"k": 50},
        {"exclude": ["i1", "i2", "i3"]},
        {"caps": {"category": 1}, "pin": ["i9"]},
        {"diversity": 0.5},
    ],
    ids=str,
)
def test_what_is_explained_is_the_answer_s_score(bundles: dict[str, Bundle], asked: dict[str, Any]) -> None:
    answer = bundles["ranked"].recommend(user="u3", why=True, **{"k": 3, **asked})
    assert answer.items
    for item, why in zip(answer.items, answer.why, strict=True):
        assert why.score == pytest.approx(item.score, abs=1e-3)


def test_reasons_cost_no_search_where_no_ranker_is_blended_in(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    retrieve = Recommender.retrieve
    monkeypatch.setattr(Recommender, "retrieve", lambda *given: asked.append(1) or retrieve(*given))
    bundles["alone"].recommend(user="u3", k=5, why=True)
    assert len(asked) == 1


def test_reasons_name_the_features_that_both_items_have(bundles: dict[str, Bundle]) -> None:
    bundle = bundles["alone"]
    features = bundle.item_features
    assert features is not None
    category = dict(
        zip(bundle.items.ids_of(range(len(bundle.items))), features.column("category").to_pylist())
    )
    why = bundle.why("i0", history=["i1", "i2", "i3", "i4", "i5"])
    for reason in why.reasons:
        same = category[reason.item] == category["i0"]
        assert reason.shared == ({"category": category["i0"]} if same else {})


def test_nobody_and_unknown_items(bundles: dict[str, Bundle]) -> None:
    assert bundles["ranked"].why("i0", user="nobody").reasons == []
    with pytest.raises(InputError, match="unknown item 'x'"):
        bundles["ranked"].why("x", user="u3")


def test_the_command_says_why(bundles: dict[str, Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(str(bundles["alone"].artefact.place))
    assert main(["recommend", str(folder), "--history", "i1,i2", "-k", "2", "--why"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("  because of")
    assert "i1 " in said[1]
    assert main(["recommend", str(folder), "--history", "i1,i2", "-k", "2", "--why", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {reason["item"] for reason in told["why"][0]["reasons"]} == {"i1", "i2"}

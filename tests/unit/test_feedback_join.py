"""Feedback joined, added to a dataset, and trained on: nothing twice, rows stay, the models go on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recray
from recray.bundles.plan import Plan
from recray.data.dataset import Dataset
from recray.data.extend import extend
from recray.data.prepare import prepare
from recray.errors import ArtefactError, ConfigError, InputError
from recray.feedback.join import join, write
from recray.feedback.log import EVENTS, IMPRESSIONS, SegmentLog
from recray.manifest import Artefact, open_artefact
from recray.models.base import Catalogue
from recray.models.saved import load_model
from recray.recipes import recipe
from recray.training.beginning import grow
from recray.training.run import train

NOW = 1_650_000_000


def event(user: str, item: str, time: float, **more: Any) -> dict[str, Any]:
    return {"user": user, "item": item, "time": time, "event_id": f"{item}@{time}", "weight": 1.0, **more}


def log(folder: Path, events: list[dict[str, Any]], impressions: list[dict[str, Any]] | None = None) -> Path:
    for name, lines in ((EVENTS, events), (IMPRESSIONS, impressions or [])):
        made = SegmentLog(folder, name)
        made.write(lines)
        made.close()
    return folder


def shown(request_id: str, user: str | None, *items: str, generation: str = "g1") -> dict[str, Any]:
    told = {"request_id": request_id, "user": user, "time": NOW, "generation": generation}
    return {**told, "items": items}


def test_an_event_counts_once_and_knows_where_it_was_shown(tmp_path: Path) -> None:
    events = [
        event("u2", "b", NOW + 2.9, request_id="r1", event="buy"),
        event("u1", "a", NOW + 1.5),
        event("u2", "b", NOW + 2.9, request_id="r1", event="buy"),
        event("u1", "x", NOW + 3, request_id="r1"),
        event("u3", "c", NOW + 4, request_id="r3", event="return", weight=0.0),
        event("u4", "d", NOW + 5, request_id="gone"),
    ]
    impressions = [
        shown("r1", "u2", "a", "b"),
        shown("r2", None, "a"),
        shown("r3", "u3", "c", generation="g2"),
    ]
    found = join(log(tmp_path, events, impressions))
    rows = found.interactions.to_pylist()
    assert [
        (row["user"], row["item"], row["time"] - NOW, row["place"], row["generation"]) for row in rows
    ] == [
        ("u1", "a", 1, None, None),
        ("u2", "b", 2, 2, "g1"),
        ("u1", "x", 3, None, None),
        ("u3", "c", 4, 1, "g2"),
        ("u4", "d", 5, None, None),
    ]
    assert found.report == {
        "events": 5,
        "repeated": 1,
        "impressions": 3,
        "generations": {
            "g1": {"answers": 2, "shown": 3, "answered": 1, "events: buy": 1},
            "g2": {"answers": 1, "shown": 1, "answered": 0},
        },
    }


def test_prepare_reads_what_is_joined(tmp_path: Path) -> None:
    events = [event(f"u{n % 3}", f"i{n}", NOW + n, event="view") for n in range(9)]
    write(log(tmp_path / "log", [*events, event("u1", "back", NOW, weight=-1.0)]), tmp_path / "new.parquet")
    made = prepare(tmp_path / "new.parquet", out=tmp_path / "data", event_weights={"view": 2.0})
    assert (made.n_users, made.n_items) == (3, 9)
    assert set(made.interactions().weights) == {2.0}


def test_a_folder_without_events_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no events"):
        join(log(tmp_path, []))


def test_a_line_of_others_is_named(tmp_path: Path) -> None:
    log(tmp_path, [event("u1", "a", NOW)])
    file = tmp_path / "events-2.jsonl"
    file.write_text(f'{json.dumps(event("u2", "b", NOW))}\n{{"userId": 7}}\n')
    with pytest.raises(InputError, match="is no line of events: its user is None") as raised:
        join(tmp_path)
    assert raised.value.where == f"{file}:2"
    assert "\n" not in str(raised.value)
    file.unlink()
    open_now = tmp_path / ".impressions-2-x.open"
    open_now.write_text(f'{json.dumps(shown("r1", "u1", "a") | {"items": "a"})}\n{{"half')
    with pytest.raises(InputError, match="is no line of impressions: its items is 'a'") as raised:
        join(tmp_path)
    assert raised.value.where == f"{open_now}:1"


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.sampled_from([None, True, [], {}, "u"]) | NUMBERS | st.text()


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(event("u", "i", NOW, event="e", request_id="r"), JSON)),
    st.fixed_dictionaries({}, optional=dict.fromkeys(shown("r", "u"), JSON)),
    st.booleans(),
)
def test_any_line_is_joined_or_refused(one: dict[str, Any], other: dict[str, Any], whole: bool) -> None:
    if whole:  # but for what was drawn
        one, other = event("u", "i", NOW, request_id="r") | one, shown("r", "u", "i") | other
    with tempfile.TemporaryDirectory() as folder:
        log(Path(folder), [event("u1", "a", NOW), one], [other])
        try:
            assert join(folder).interactions.num_rows == 2
        except InputError as refused:
            told = str(refused)
        else:
            told = ""
        assert told == "" or ".jsonl:" in told


def dataset(folder: Path, *, times: bool = True, **options: Any) -> Dataset:
    """12 users who walk a ring of 10 items."""
    frame = pd.DataFrame(
        [
            (f"u{u}", f"i{(u + step) % 10}", 1_600_000_000 + 100 * step + u, "sun")
            for u in range(12)
            for step in range(6)
        ],
        columns=["user", "item", "time", "weather"],
    )
    frame = frame if times else frame.drop(columns="time")
    folder.mkdir(parents=True, exist_ok=True)
    frame.to_csv(folder / "log.csv", index=False)
    pd.DataFrame({"item": ["i3", "i1", "only"], "price": [3.0, 1.0, 9.0]}).to_csv(
        folder / "items.csv", index=False
    )
    return prepare(folder / "log.csv", items=folder / "items.csv", out=folder / "data", **options)


def newer(folder: Path, events: list[dict[str, Any]]) -> Path:
    write(log(folder / "log", events), folder / "new.parquet")
    return folder / "new.parquet"


def everything(data: Dataset) -> set[tuple[str, str, int]]:
    found = set()
    for split in ("train", "valid", "test"):
        rows = data.interactions(split)
        users, items = data.users.ids_of(rows.user_rows), data.items.ids_of(rows.item_rows)
        found |= set(zip(users, items, rows.times.tolist()))
    return found


EVENTS_OF = [
    event("u1", "i9", NOW),
    event("new", "i1", NOW + 1, event="buy"),
    event("new", "fresh", NOW + 2),
    event("u0", "i0", 1_600_000_000),  # known already
    event("u2", "i5", NOW, weight=0.0),  # given back
]


@pytest.mark.parametrize("split", ["leave-one-out", "time", "none"])
def test_a_dataset_grows_and_its_rows_stay(tmp_path: Path, split: str) -> None:
    old = dataset(tmp_path, split=split, context=("weather",))
    more = extend(old, newer(tmp_path, EVENTS_OF), out=tmp_path / "more")
    assert more.users.ids_of(range(old.n_users)) == old.users.ids_of(range(old.n_users))
    assert more.items.ids_of(range(old.n_items)) == old.items.ids_of(range(old.n_items))
    assert (more.n_users, more.n_items) == (old.n_users + 1, old.n_items + 1)
    added = {("u1", "i9", NOW), ("new", "i1", NOW + 1), ("new", "fresh", NOW + 2)}
    assert everything(more) == everything(old) | added
    assert more.report["added"] == 3
    assert more.artefact.manifest.parents["dataset"]["hash"] == old.artefact.hash
    assert more.item_features is not None
    prices = more.item_features.column("price").to_pylist()
    assert prices == [*old.item_features.column("price").to_pylist(), None]
    assert more.context_values == old.context_values
    rows = more.interactions("train" if split != "leave-one-out" else "test")
    assert len(rows.context["weather"]) == len(rows)
    for name in ("train", "valid", "test"):
        assert more.has_split(name) == old.has_split(name)
    if split == "leave-one-out":
        at = more.interactions("test")
        last = dict(zip(more.users.ids_of(at.user_rows), more.items.ids_of(at.item_rows)))
        assert last["u1"] == "i9"
    again = extend(old, newer(tmp_path, EVENTS_OF), out=tmp_path / "again")
    assert again.artefact.hash == more.artefact.hash
    with pytest.raises(InputError, match="nothing that the dataset does not know"):
        extend(more, newer(tmp_path, EVENTS_OF), out=tmp_path / "twice")


def test_a_dataset_without_times_adds_what_was_not_added_before(tmp_path: Path) -> None:
    old = dataset(tmp_path, times=False)
    day = 86_400
    first = extend(
        old, newer(tmp_path / "1", [*EVENTS_OF[:2], event("u5", "i3", NOW + day)]), out=tmp_path / "first"
    )
    assert first.report["added"] == 3
    late = [event("u6", "i4", NOW + 60), event("u7", "i4", NOW - day)]  # one clock was a day ahead
    second = extend(first, newer(tmp_path / "2", [*EVENTS_OF, *late]), out=tmp_path / "second")
    assert second.report["added"] == 4
    row = int(second.users.rows_of(["u1"])[0])
    history = second.items.ids_of(second.histories("test")[row])
    assert history == ["i9"], "what is new comes last"
    with pytest.raises(InputError, match="nothing that the dataset does not know"):
        extend(second, newer(tmp_path / "3", [*EVENTS_OF, *late]), out=tmp_path / "third")


def test_given_splits_stay_as_they_were(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    dataset(folder)
    (folder / "test.csv").write_text("user,item,time\nu0,i9,1600000901\n")
    old = prepare(folder / "log.csv", test=folder / "test.csv", out=folder / "given")
    more = extend(old, newer(tmp_path, EVENTS_OF), out=tmp_path / "more")
    assert len(more.interactions("test")) == 1
    assert len(more.interactions("train")) == len(old.interactions("train")) + 3


def quick(name: str, **options: Any) -> Any:
    words = ["train.epochs=1", "train.valid_users=5", *(f"options.{k}={v}" for k, v in options.items())]
    return recipe(name, words)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Artefact]:
    folder = tmp_path_factory.mktemp("parents")
    old = dataset(folder)
    made = train(old, quick("sasrec", dim=8, blocks=1, max_len=6), out=folder / "sasrec")
    return old, made


def test_training_goes_on_from_the_old_rows(parents: tuple[Dataset, Artefact], tmp_path: Path) -> None:
    old, start = parents
    more = extend(old, newer(tmp_path, EVENTS_OF), out=tmp_path / "more")
    words = ["train.epochs=1", "train.lr=1e-12", "train.valid_users=0", f"train.start={start.place}"]
    again = recipe("sasrec", [*words, "options.dim=8", "options.blocks=1", "options.max_len=6"])
    made = train(more, again, out=tmp_path / "sasrec")
    before, after = (load_model(one).state_dict() for one in (start, made))
    assert len(after["tables.item.weight"]) == more.n_items
    for name, value in before.items():
        assert torch.allclose(after[name][: len(value)], value, atol=1e-6), name
    assert made.manifest.parents["start"]["hash"] == start.hash
    other = extend(more, newer(tmp_path, [event("u1", "i2", NOW + 9)]), out=tmp_path / "other")
    with pytest.raises(ConfigError, match="was trained on another dataset"):
        train(other, again, out=tmp_path / "never")


def test_a_model_of_another_shape_cannot_grow(parents: tuple[Dataset, Artefact]) -> None:
    from recray.models import build_model

    old, start = parents
    larger = build_model("sasrec", Catalogue(old.n_items + 1, {}), {"dim": 16, "blocks": 1, "max_len": 6})
    with pytest.raises(ConfigError, match="has another shape"):
        grow(larger, load_model(start), where="here")


def test_a_bundle_is_refitted_and_names_its_parent(parents: tuple[Dataset, Artefact], tmp_path: Path) -> None:
    from recray.bundles.build import build

    old, start = parents
    first = build(tmp_path / "bundle", start, None, old, Plan(retriever_codec="int8"))
    folder = log(tmp_path / "feedback", EVENTS_OF, [shown("r", "u1", "i9")])
    second = recray.refit(first, events=folder, set=["train.epochs=1"], out=tmp_path / "second")
    parents_of = second.artefact.manifest.parents
    assert parents_of["bundle"]["hash"] == first.artefact.hash
    assert second.plan == first.plan
    assert second.artefact.manifest.report["feedback"]["events"] == 5
    checkpoint = open_artefact(parents_of["checkpoint"]["uri"], "checkpoint")
    assert checkpoint.manifest.parents["start"]["hash"] == start.hash
    assert "fresh" in second.items
    assert second.recommend(user="new", k=5).degraded == []
    row = int(second.users.rows_of(["u1"])[0])
    assert second.items.ids_of(second.histories[row])[-1] == "i9"
    third = recray.refit(
        second,
        events=log(tmp_path / "later", [event("u3", "i1", NOW + 50)]),
        fresh=True,
        out=tmp_path / "third",
    )
    assert "start" not in open_artefact(third.artefact.manifest.parents["checkpoint"]["uri"]).manifest.parents
    with pytest.raises(InputError, match="nothing that the dataset does not know"):
        recray.refit(second, events=folder, out=tmp_path / "never")
    with pytest.raises(ArtefactError, match="not a bundle"):
        recray.refit(start, events=folder, out=tmp_path / "never")


def test_a_model_in_closed_form_is_fitted_anew(tmp_path: Path) -> None:
    from recray.bundles.build import build

    old = dataset(tmp_path)
    knn = train(old, recipe("item-knn"), out=tmp_path / "knn")
    first = build(tmp_path / "bundle", knn, None, old)
    second = recray.refit(first, events=log(tmp_path / "feedback", EVENTS_OF), out=tmp_path / "second")
    assert second.recommender.n_items == old.n_items + 1
    row = int(second.items.rows_of(["fresh"])[0])
    near = second.recommend(history=["i1"], k=20)
    assert "fresh" in [item.item for item in near.items]
    assert np.load(second.artefact.place.local / "popularity.npy")[row] >= 0
    assert pq.read_table(second.artefact.place.local / "ids" / "items.parquet").num_rows == old.n_items + 1

"""A bundle from checkpoints to answers: what is asked for, what cannot be, and every byte checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recray
from recray import manifest
from recray.bundles.build import build
from recray.bundles.bundle import Answer, Bundle, open_bundle
from recray.bundles.plan import GRAPHS, Plan, choices
from recray.compression.codec import CODECS
from recray.data.dataset import Dataset
from recray.data.sequences import Histories
from recray.errors import ArtefactError, ConfigError, InputError
from recray.manifest import Artefact
from recray.models.embeddings import DenseTable
from tests.serving_bundles import checkpoint, small_dataset

PLANS = {
    "plain": Plan(candidates=30),
    "small": Plan(
        candidates=30, retriever_codec="int8", ranker_codec="f16", encoder_graph="onnx", index="hnsw"
    ),
    "least": Plan(
        candidates=30,
        retriever_codec="int4",
        ranker_codec="int4",
        encoder_graph="onnx-int8",
        ranker_graph="onnx-int8",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module")
def data(folder: Path) -> Dataset:
    return small_dataset(folder)


@pytest.fixture(scope="module")
def checkpoints(folder: Path, data: Dataset) -> dict[str, Artefact]:
    sasrec = checkpoint(folder / "sasrec", data, "sasrec", dim=32, blocks=1, max_len=20)
    found = {"sasrec": sasrec, "neumf": checkpoint(folder / "neumf", data, "neumf", dim=8)}
    return found | {
        name: checkpoint(folder / name, data, name) for name in ("ials", "item-knn", "popularity")
    }


@pytest.fixture(scope="module")
def bundles(folder: Path, data: Dataset, checkpoints: dict[str, Artefact]) -> dict[str, Bundle]:
    """One bundle a plan, all of one folder of pieces."""
    return {
        name: build(
            folder / f"bundle-{name}",
            checkpoints["sasrec"],
            checkpoints["neumf"],
            data,
            plan,
            pieces=folder / "p",
        )
        for name, plan in PLANS.items()
    }


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Bundle]) -> Bundle:
    return bundles["plain"]


def names(answer: Answer) -> list[str]:
    return [item.item for item in answer.items]


@pytest.mark.parametrize("plan", PLANS)
def test_a_known_user_gets_k_unseen_items(bundles: dict[str, Bundle], plan: str) -> None:
    bundle = bundles[plan]
    for user in ("u0", "u3", "u41"):
        seen = bundle.items.ids_of(bundle.histories[int(bundle.users.rows_of([user])[0])])
        answer = bundle.recommend(user=user, k=7)
        assert len(set(names(answer)) - set(seen)) == 7
        assert {item.source for item in answer.items} == {"ranker"}
        scores = [item.score for item in answer.items]
        assert scores == sorted(scores, reverse=True)
        assert (answer.generation, answer.degraded) == (bundle.generation, [])
        assert answer == bundle.recommend(history=seen, k=7)


def test_smaller_plans_make_smaller_bundles_of_other_generations(bundles: dict[str, Bundle]) -> None:
    table = "retriever/tables/item.safetensors"
    sizes = [b.artefact.manifest.files[table]["bytes"] for b in bundles.values()]
    assert sizes[0] > sizes[1] > sizes[2]
    assert len({b.generation for b in bundles.values()}) == 3
    for made in bundles.values():
        files = made.artefact.manifest.files
        parts = ("retriever", "ranker", "index")
        weighed = [e["bytes"] for f, e in files.items() if f.split("/")[0] in parts]
        assert made.model_bytes == sum(weighed) == made.artefact.manifest.report["model_bytes"]


def test_nothing_compressed_answers_as_the_checkpoint(
    bundle: Bundle, data: Dataset, checkpoints: dict[str, Artefact]
) -> None:
    from recray.models.saved import load_model

    model: Any = load_model(checkpoints["sasrec"])
    scores = model.score(bundle.histories.take([4]))[0].numpy()
    scores[bundle.histories[4]] = -np.inf
    found = bundle.recommender.retrieve(bundle.histories.take([4]), 10, bundle.histories.take([4]))
    assert found.rows[0].tolist() == np.argsort(-scores, kind="stable")[:10].tolist()
    assert not any(isinstance(table, DenseTable) for table in bundle.recommender.retriever.tables.values())


def test_everything_known_at_build_time_is_a_history(bundle: Bundle, data: Dataset) -> None:
    parts = [data.histories(split) for split in ("train", "valid", "test")]
    assert bundle.histories.lengths.sum() == sum(p.lengths.sum() for p in parts)
    assert bundle.histories[5].tolist() == [row for p in parts for row in p[5].tolist()]


@pytest.mark.parametrize(
    ("asked", "degraded"),
    [
        ({"user": "nobody"}, ["unknown user"]),
        ({"history": ["never", "seen"]}, ["unknown history"]),
        ({"history": []}, []),
        ({}, []),
        ({"user": "x" * 1_000_000}, ["unknown user"]),
    ],
)
def test_the_unknown_get_what_is_popular(
    bundle: Bundle, data: Dataset, asked: dict[str, Any], degraded: list[str]
) -> None:
    answer = bundle.recommend(**asked, k=5)
    counts = np.bincount(data.histories("train").items, minlength=data.n_items)
    assert names(answer) == data.items.ids_of(np.argsort(-counts, kind="stable")[:5])
    assert {item.source for item in answer.items} == {"popular"}
    assert answer.degraded == degraded


def test_known_items_of_a_history_count_and_a_history_replaces_the_users(bundle: Bundle) -> None:
    known = bundle.items.ids_of([3, 4])
    alone = bundle.recommend(history=known)
    assert alone == bundle.recommend(history=["never", *known])
    assert alone == bundle.recommend(user="u1", history=known)
    assert not set(known) & set(names(alone))
    row = bundle.items.rows_of(known)
    shown = bundle.request(history=known, exclude_seen=False)
    assert not len(shown.exclude)
    assert bundle.request(history=known).exclude.tolist() == sorted(row.tolist())


def test_excluded_items_do_not_come_and_unknown_ones_are_passed_over(bundle: Bundle) -> None:
    first = names(bundle.recommend(user="u2", k=10))
    then = names(bundle.recommend(user="u2", k=10, exclude=[*first[:4], "never"]))
    assert not set(first[:4]) & set(then)
    assert len(then) == 10


def test_k_larger_than_the_catalogue_gives_what_is_left(bundle: Bundle) -> None:
    seen = len(set(bundle.histories[int(bundle.users.rows_of(["u7"])[0])].tolist()))
    answer = bundle.recommend(user="u7", k=10**12)
    assert len(set(names(answer))) == len(answer.items) == len(bundle.items) - seen


def test_a_bundles_own_filter_holds_for_every_answer(
    folder: Path, data: Dataset, checkpoints: dict[str, Artefact], bundles: dict[str, Bundle]
) -> None:
    plan = Plan(filter={"price": {"max": 5}, "category": {"not": "song"}})
    cheap = build(folder / "cheap", checkpoints["ials"], None, data, plan, pieces=folder / "p")
    features = cheap.item_features
    assert features is not None
    price, category = (features.column(name).to_pylist() for name in ("price", "category"))
    allowed = {row for row in range(len(price)) if price[row] <= 5 and category[row] != "song"}

    def rows(answer: Answer) -> set[int]:
        return set(cheap.items.rows_of(names(answer)).tolist())

    for asked in ({"user": "u3"}, {"user": "nobody"}, {"history": ["i1"]}):
        assert rows(cheap.recommend(**asked, k=200, exclude_seen=False)) == allowed  # type: ignore[arg-type]
    both = rows(cheap.recommend(user="u3", k=200, filter={"price": {"min": 3}}, exclude_seen=False))
    assert both == {row for row in allowed if price[row] >= 3}
    assert rows(cheap.similar("i0", 200)) <= allowed
    with pytest.raises(InputError, match="unknown filter column 'colour'"):
        build(folder / "no", checkpoints["ials"], None, data, Plan(filter={"colour": "red"}))
    assert not (folder / "no").exists()


@pytest.mark.parametrize("plan", PLANS)
def test_filters_are_exact_however_little_they_leave(bundles: dict[str, Bundle], plan: str) -> None:
    bundle = bundles[plan]
    assert bundle.item_features is not None
    price = bundle.item_features.column("price").to_pylist()
    kind = bundle.item_features.column("category").to_pylist()
    for user in ("u1", "u2"):
        seen = set(bundle.histories[int(bundle.users.rows_of([user])[0])].tolist())
        wanted = {i for i in range(len(price)) if price[i] in (3, 4) and kind[i] == "book"} - seen
        answer = bundle.recommend(user=user, k=200, filter={"price": [3, "4"], "category": "book"})
        assert set(names(answer)) == set(bundle.items.ids_of(sorted(wanted)))
    assert names(bundle.recommend(user="u1", filter={"price": -1})) == []
    assert names(bundle.recommend(user="u1", filter={})) == names(bundle.recommend(user="u1"))


def test_context_reaches_the_ranker_and_unknown_values_are_unknown(bundle: Bundle) -> None:
    rows = [
        bundle.request(context={"weather": value}).context["weather"] for value in ("sun", "rain", "hail")
    ]
    assert rows[2] == 0
    assert len(set(rows)) == 3
    assert bundle.request().context == {"weather": 0}
    sun, none = (bundle.recommend(user="u1", context=c) for c in ({"weather": "sun"}, None))
    assert [i.score for i in sun.items] != [i.score for i in none.items]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -3}, "k is -3"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": True}, "k is True"),
        ({"k": "5"}, "k is '5'"),
        ({"filter": {"colour": "red"}}, "unknown filter column 'colour'. choose of .*category.*price"),
        ({"filter": "book"}, "filter is"),
        ({"filter": {"price": "dear"}}, "wants int64"),
        ({"filter": {"price": [None]}}, "neither text nor a number"),
        ({"filter": {"category": {"a": 1}}}, "write a value, a list of values"),
        ({"context": {"mood": "low"}}, "unknown context column 'mood'. choose of weather"),
        ({"context": 3}, "context is 3"),
        ({"history": "i1"}, "list of item ids"),
        ({"history": [None]}, "is not an id"),
        ({"exclude": 5}, "list of item ids"),
        ({"user": ["u1"]}, "is not an id"),
    ],
)
def test_what_cannot_be_asked(bundle: Bundle, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        bundle.recommend(**asked)
    assert len(str(caught.value)) < 400


def test_similar_items(bundle: Bundle) -> None:
    item = bundle.items.id_of(3)
    answer = bundle.similar(item, 5)
    assert len(set(names(answer)) - {item}) == 5
    assert bundle.item_features is not None
    kind = bundle.item_features.column("category").to_pylist()
    films = bundle.similar(item, 5, filter={"category": "film"})
    assert {kind[row] for row in bundle.items.rows_of(names(films))} == {"film"}
    with pytest.raises(InputError, match="unknown item"):
        bundle.similar("never")


@pytest.mark.parametrize("name", ["ials", "item-knn", "popularity"])
def test_models_without_a_network_are_bundled_too(
    tmp_path: Path, data: Dataset, checkpoints: dict[str, Artefact], name: str
) -> None:
    made = build(tmp_path / "b", checkpoints[name], None, data)
    seen = set(made.histories[8].tolist())
    found = made.items.rows_of(names(made.recommend(user=made.users.id_of(8), k=6)))
    scores = made.recommender.retriever.score(made.histories.take([8]))[0].numpy()
    wanted = [i for i in np.argsort(-scores, kind="stable") if i not in seen][:6]
    assert found.tolist() == wanted
    assert made.recommend(user="u9").items[0].source == "retriever"
    assert len(made.similar(made.items.id_of(0), 3).items) == 3


def test_a_plan_must_mean_something(tmp_path: Path, data: Dataset, checkpoints: dict[str, Artefact]) -> None:
    knn, ials, neumf, sasrec = (checkpoints[n] for n in ("item-knn", "ials", "neumf", "sasrec"))
    for first, second, plan, words in [
        (knn, None, Plan(retriever_codec="int8"), "retriever_codec"),
        (knn, None, Plan(index="hnsw"), "index"),
        (ials, None, Plan(encoder_graph="onnx"), "encoder_graph"),
        (ials, None, Plan(ranker_codec="int8"), "no ranker"),
        (neumf, None, Plan(), "not a retriever"),
        (sasrec, sasrec, Plan(), "not a ranker"),
    ]:
        with pytest.raises(ConfigError, match=words):
            build(tmp_path / "b", first, second, data, plan)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"retriever_codec": "int3"},
        {"ranker_graph": "tensorrt"},
        {"index": "flat"},
        {"index_params": {"nlist": 3}},
        {"candidates": 0},
        {"blend": 1.5},
    ],
)
def test_a_plan_refuses_what_it_does_not_know(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Plan(**wrong)


def test_choices_say_what_applies(bundle: Bundle) -> None:
    r = bundle.recommender
    found = choices(r.retriever, r.ranker)
    assert found["retriever_codec"] == found["ranker_codec"] == tuple(CODECS)
    assert found["encoder_graph"] == GRAPHS
    assert choices(r.retriever, None)["ranker_graph"] == ("eager",)


def test_pieces_are_made_once_and_give_the_same_bundle(
    tmp_path: Path, folder: Path, data: Dataset, checkpoints: dict[str, Artefact], bundles: dict[str, Bundle]
) -> None:
    def files(made: Bundle) -> dict[str, str]:
        return {n: e["sha256"] for n, e in made.artefact.manifest.files.items()}

    kept = {p.name: p.stat().st_mtime_ns for p in (folder / "p").iterdir()}
    args = (checkpoints["sasrec"], checkpoints["neumf"], data, PLANS["least"])
    again = build(tmp_path / "again", *args, pieces=folder / "p")
    assert {p.name: p.stat().st_mtime_ns for p in (folder / "p").iterdir()} == kept
    assert files(again) == files(bundles["least"])
    assert again.artefact.manifest.report["graphs"]["ranker"]["parity"] > 0


def test_a_flipped_byte_anywhere_is_refused(tmp_path: Path, bundles: dict[str, Bundle]) -> None:
    source = bundles["small"].artefact.place.local
    listed = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert len(listed) > 12
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert open_bundle(copy).generation == bundles["small"].generation
    for name in listed:
        whole = (copy / name).read_bytes()
        at = len(whole) // 2
        (copy / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ArtefactError) as caught:
            open_bundle(copy)
        assert "\n" not in str(caught.value)
        (copy / name).write_bytes(whole)
    (copy / "popularity.npy").unlink()
    with pytest.raises(ArtefactError, match="missing"):
        open_bundle(copy)


def test_what_the_manifest_does_not_list_is_not_read(
    tmp_path: Path, data: Dataset, checkpoints: dict[str, Artefact], bundle: Bundle
) -> None:
    alone = build(tmp_path / "alone", checkpoints["sasrec"], None, data, Plan())
    want = alone.recommend(user="u3", k=5)
    other = bundle.artefact.place.local
    shutil.copytree(other / "ranker", tmp_path / "alone" / "ranker")
    again = open_bundle(tmp_path / "alone")
    assert again.recommender.ranker is None
    assert again.recommend(user="u3", k=5).items == want.items


def test_measuring_a_bundle_reads_each_byte_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    check = manifest.check_file

    def noted(artefact: Artefact, name: str) -> None:
        read.append(str(artefact.place / name))
        check(artefact, name)

    monkeypatch.setattr(manifest, "check_file", noted)
    recray.evaluate(bundle)
    assert len(read) == len(set(read)) > len(bundle.artefact.manifest.files), "the dataset's, too"


def test_a_batch_of_a_quantized_graph_answers_as_each_alone(bundles: dict[str, Bundle]) -> None:
    recommender, known = bundles["least"].recommender, bundles["least"].histories
    mixed = Histories.of([known[0], known[1][-1:], known[2][-3:]])
    together = recommender.recommend(mixed, 9, mixed, None, {"weather": np.array([1, 2, 0], np.int32)})
    for b in range(3):
        context = {"weather": np.array([[1], [2], [0]][b], np.int32)}
        alone = recommender.recommend(mixed.take([b]), 9, mixed.take([b]), None, context)
        assert np.array_equal(alone.rows[0], together.rows[b])
        assert np.array_equal(alone.scores[0], together.scores[b])

"""The verbs over stand-in artefacts: defaults, what they refuse, and how a search becomes a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import recray
from recray import api, composing, recipes
from recray.bundles.plan import Plan
from recray.errors import ArtefactError, ConfigError, InputError
from recray.manifest import Artefact, write_artefact
from recray.tuning.chosen import plan_of_trial
from recray.tuning.space import Space
from tests.models_data import ring_dataset

TRIALS = {
    "aa11": {"number": 1, "error": None, "detail": {"plan": {"retriever_codec": "f32"}}},
    "aa22": {"number": 2, "error": None, "detail": {"plan": {"retriever_codec": "int8", "candidates": 50}}},
    "bb33": {"number": 3, "error": "it broke", "detail": {}},
}


def _artefact(out: Path, kind: str, **options: Any) -> Artefact:
    return write_artefact(out, kind, lambda _: None, **options)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Artefact:
    data = _artefact(tmp_path / "data", "dataset")
    return _artefact(tmp_path / "model", "checkpoint", parents={"dataset": data})


def _search(out: Path, checkpoint: Artefact, chosen: str | None = "aa22") -> Artefact:
    def fill(folder: Path) -> Mapping[str, Any]:
        (folder / "trials").mkdir()
        for name, trial in TRIALS.items():
            (folder / "trials" / f"{name}.json").write_text(json.dumps(trial))
        return {"chosen": {"trial": chosen}}

    return write_artefact(
        out, "search", fill, recipe={"search": "compress"}, parents={"checkpoint": checkpoint}
    )


def test_the_chosen_trial_gives_the_plan(tmp_path: Path, checkpoint: Artefact) -> None:
    search = _search(tmp_path / "search", checkpoint)
    plan, retriever, ranker = composing.packed(search, None, None)
    assert (plan, retriever.hash, ranker) == (
        Plan(retriever_codec="int8", candidates=50),
        checkpoint.hash,
        None,
    )
    assert plan_of_trial(search, "aa1") == plan_of_trial(search, "1") == Plan()


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        ("aa", "means several trials"),
        ("cc", "no trial"),
        ("9", "no trial"),
        ("bb33", r"trial 3 failed \(it broke"),
    ],
)
def test_a_trial_must_be_one_that_worked(tmp_path: Path, checkpoint: Artefact, trial: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_of_trial(_search(tmp_path / "search", checkpoint), trial)


def test_a_search_that_found_nothing_is_told(tmp_path: Path, checkpoint: Artefact) -> None:
    search = _search(tmp_path / "search", checkpoint, chosen=None)
    with pytest.raises(InputError, match="no trial fits the budget"):
        plan_of_trial(search)
    assert plan_of_trial(search, "2").retriever_codec == "int8"


def test_what_does_not_go_together_is_refused(tmp_path: Path, checkpoint: Artefact) -> None:
    search = _search(tmp_path / "search", checkpoint)
    with pytest.raises(InputError, match="own ranker"):
        composing.packed(search, None, checkpoint)
    with pytest.raises(InputError, match="no trial to choose"):
        composing.packed(checkpoint, "1", None)
    with pytest.raises(ArtefactError, match="is a search, not a bundle"):
        api.recommend(search, user="u")


def test_results_are_named_after_what_they_are_made_from(
    tmp_path: Path, checkpoint: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [
        composing.target(None, "dataset", "logs/events.csv.gz"),
        composing.target(None, "search", "runs/checkpoint-sasrec-ml"),
        composing.target(None, "bundle", checkpoint),
        composing.target(None, "checkpoint", "ials", "runs/dataset-ml/"),
        composing.target("there", "bundle", checkpoint),
    ]
    names = [
        "runs/dataset-events",
        "runs/search-sasrec-ml",
        "runs/bundle-model",
        "runs/checkpoint-ials-ml",
        "there",
    ]
    assert [place.local for place in named] == [tmp_path / name for name in names]


@pytest.mark.parametrize(
    "given",
    [{}, {"user": "a", "history": ["b"]}, {"user": "a", "users": "file"}],
    ids=["nobody", "two", "both"],
)
def test_recommend_wants_exactly_one(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give one of user, history and users"):
        api.recommend("nowhere", **given)


def test_reasons_are_not_said_of_many_users() -> None:
    with pytest.raises(InputError, match="why is said of one user or history"):
        api.recommend("nowhere", users=["a", "b"], why=True)


def test_mistakes_are_found_before_anything_is_opened(tmp_path: Path) -> None:
    for call, said in [
        (lambda: api.train("nowhere", recipe="sasrek"), "did you mean 'sasrec'"),
        (
            lambda: api.train("nowhere", recipe="sasrec", set=["train.epoch=1"]),
            "unknown setting 'train.epoch'",
        ),
        (lambda: api.compress("nowhere", p99="10", size="1MB"), "p99 '10' has no unit"),
        (lambda: api.compress("nowhere", p99="10ms", size="-1MB"), "size '-1MB'"),
        (lambda: api.compress("nowhere", p99="10ms", size="1MB", rps=-1), "load of -1 requests/s"),
        (lambda: api.compress("nowhere", p99="10ms", size="1MB", cost_per_1k=0), "budget of 0 for cost"),
        (lambda: api.compress("nowhere", p99="10ms", size="1MB", price={"hours": 1}), "did you mean 'hour'"),
        (lambda: api.compress("nowhere", p99="10ms", size="1MB", price={"hour": 0}), "price hour is 0"),
        (lambda: api.compress("nowhere", p99="10ms", size="1MB", http="2"), "http '2' has no unit"),
        (lambda: api.tune("nowhere", recipe="x", space=[]), "unknown recipe 'x'"),
    ]:
        with pytest.raises(ConfigError, match=said):
            call()
    with pytest.raises(InputError, match="no log is given"):
        api.prepare([])
    with pytest.raises(ArtefactError, match="is not there"):
        recray.evaluate(tmp_path / "none")


def test_show_tells_the_lineage(checkpoint: Artefact) -> None:
    told = api.show(checkpoint)
    assert told["kind"] == "checkpoint"
    assert [row["role"] for row in told["lineage"]] == ["dataset"]
    assert json.loads(json.dumps(told)) == told


def test_a_result_does_not_replace_an_artefact_of_another_kind(checkpoint: Artefact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds a checkpoint, not an older dataset"):
        composing.target(tmp_path / "model", "dataset")
    assert composing.target(tmp_path / "model", "checkpoint") == checkpoint.place


@pytest.mark.parametrize(
    ("space", "metric", "words"),
    [
        ("options.nope=1..2", "ndcg@10", "unknown setting 'options.nope'"),
        ("options.dim=a,b", "ndcg@10", "options.dim is 'a'"),
        ("options.dim=4,8", "foo", "unknown metric 'foo'"),
        ("options.dim=4,8", "ndcg", "unknown metric 'ndcg'"),
        ("options.dim=4,8", "ndcg@5", "unknown metric 'ndcg@5'"),
        ("options.dim=4,8", "rmse", "unknown metric 'rmse'"),
    ],
)
def test_a_search_that_no_trial_could_do_is_refused_at_once(space: str, metric: str, words: str) -> None:
    fit = composing.Fit(recipes.recipe("ials"), "nowhere", metric)
    with pytest.raises(ConfigError, match=words):
        composing.check_search(fit, Space.parse([space]))


@pytest.mark.parametrize("name", ["item-ratings", "user-ratings"])
def test_a_search_over_ratings_takes_the_least_error(name: str, tmp_path: Path) -> None:
    pairs = [(u, i) for u in range(40) for i in range(20) if (u * 7 + i * 13 + u * i) % 9 < 5]
    lines = [f"u{u},i{i},{1 + 3 * ((u + i) % 2) + (u * i) % 2}\n" for u, i in pairs]
    (tmp_path / "log.csv").write_text("user,item,rating\n" + "".join(lines))
    data = recray.prepare(tmp_path / "log.csv", columns={"weight": "rating"}, out=tmp_path / "data")
    found = recray.tune(
        data, recipe=name, space=["options.neighbours=1,30"], metric="rmse", trials=2, out=tmp_path / "search"
    )
    trials = json.loads((found.place / "front.json").read_bytes())["trials"]
    best = min(trials, key=lambda trial: trial["metrics"]["rmse"])
    assert found.manifest.report["chosen"]["trial"] == best["trial"]
    assert len({trial["metrics"]["rmse"] for trial in trials}) == 2


def test_a_search_without_a_valid_split_is_refused_at_once(tmp_path: Path) -> None:
    for name, rows in (("with", 3), ("without", 0)):
        _artefact(tmp_path / name, "dataset", report={"interactions": {"train": 9, "valid": rows}})
    space = Space.parse(["options.dim=4,8"])
    composing.check_search(composing.Fit(recipes.recipe("ials"), str(tmp_path / "with"), "hr@20"), space)
    fit = composing.Fit(recipes.recipe("ials"), str(tmp_path / "without"), "hr@20")
    with pytest.raises(InputError, match="has no valid split"):
        composing.check_search(fit, space)


def test_models_are_not_measured_by_other_items(tmp_path: Path) -> None:
    data, header = ring_dataset(tmp_path), "user,item,time\n"
    log = (tmp_path / "log.csv").read_text().removeprefix(header).splitlines()
    (tmp_path / "turned.csv").write_text(header + "\n".join(reversed(log)))
    turned = recray.prepare(tmp_path / "turned.csv", out=tmp_path / "turned")
    again = recray.prepare(tmp_path / "log.csv", split="none", out=tmp_path / "again")
    assert (turned.items != data.items, turned.n_items) == (True, data.n_items)
    made, other = (
        recray.train(each, recipe="popularity", out=tmp_path / f"model-{n}")
        for n, each in enumerate((data, turned))
    )
    for one in (made, recray.bundle(made, out=tmp_path / "bundle")):
        assert recray.evaluate(one, baseline=made).means["ndcg@10"] >= 0
        with pytest.raises(ConfigError, match=r"other items.*give the dataset it was trained on"):
            recray.evaluate(one, data=turned)
    with pytest.raises(ConfigError, match=r"model-1.*give the dataset it was trained on"):
        recray.evaluate(made, baseline=other)
    with pytest.raises(ConfigError, match="give the dataset it was trained on"):
        recray.bundle(made, data=turned, out=tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
    assert recray.bundle(made, data=again, out=tmp_path / "joined").recommend(user="u1", k=3).items


def test_who_may_have_been_trained_on_what_is_held_out_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"u{n % 20},i{(n * 7) % 9},{n}\n" for n in range(200)]
    (tmp_path / "log.csv").write_text("user,item,time\n" + "".join(lines))
    held, whole = (
        recray.prepare(tmp_path / "log.csv", out=tmp_path / split, split=split)
        for split in ("leave-one-out", "none")
    )
    honest, other = (
        recray.train(data, recipe="ease", out=tmp_path / f"of-{data.artefact.place.name}")
        for data in (held, whole)
    )
    recray.evaluate(honest, data=held)
    assert "another dataset" not in capsys.readouterr().err
    recray.evaluate(honest, data=held, baseline=other)
    assert f"warning: {other.place} is made from another dataset" in capsys.readouterr().err

"""The compression search: its space, its choice, what it leaves, and what it says when nothing fits."""

from __future__ import annotations

import errno
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recray import config
from recray.bundles.plan import Plan
from recray.data.dataset import Dataset
from recray.data.prepare import prepare
from recray.errors import BudgetError, ConfigError, InputError
from recray.manifest import Artefact, open_artefact
from recray.models.base import Ranker, Retriever
from recray.models.saved import load_model
from recray.money import Price, bill
from recray.tuning import packing
from recray.tuning.chosen import plan_of_trial, told_trial
from recray.tuning.compress import Limits, cores, search_compress
from recray.tuning.latency import Effort
from recray.tuning.space import Point
from recray.tuning.trial import Outcome, words
from tests.serving_bundles import checkpoint, small_dataset

QUICK = Effort(least=100, seconds=0.3, warmup=5)
SIZES = {
    "f32": 8e6,
    "f16": 4e6,
    "int8": 2e6,
    "int4": 1e6,
    "low-rank": 1e6,
    "pq": 1e6,
    "sparse": 3e6,
    "tiers": 5e5,
}
Parts = tuple[Dataset, Artefact, Artefact]


@pytest.fixture(autouse=True)
def quick_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    """TPE from the first trial on; the Gaussian process has its own test."""
    monkeypatch.setattr("recray.tuning.searcher.GP_TRIALS", 0)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """A dataset, and untrained checkpoints of a retriever and a ranker."""
    folder = tmp_path_factory.mktemp("compress")
    data = small_dataset(folder)
    first = checkpoint(folder / "retriever", data, "sasrec", dim=16, blocks=1, max_len=20)
    return data, first, checkpoint(folder / "ranker", data, "neumf", dim=8)


class Pretend:
    """An objective that computes what building and measuring would find, and counts."""

    def __init__(self, noise: float = 0.0) -> None:
        self.asked: list[Point] = []
        self.noise = noise

    def __call__(self, point: Point) -> Outcome:
        self.asked.append(point)
        plan = packing.plan_of(point)
        if plan.encoder_graph == "onnx":
            raise OSError("this graph cannot be exported")
        quality = {"f32": 0.5, "f16": 0.5, "int8": 0.499, "int4": 0.3}.get(plan.retriever_codec, 0.3)
        values = quality + self.noise * np.random.default_rng(len(self.asked)).normal(size=200)
        p99 = {"onnx-int8": 2e-3}.get(plan.encoder_graph, 8e-3)
        return Outcome(
            {"ndcg@10": quality, "p50": p99 / 2, "p99": p99, "bytes": SIZES.get(plan.retriever_codec, 1e6)},
            {"plan": config.as_dict(plan), "values": values.tolist()},
        )


def search(parts: Parts, out: Path, objective: Any = None, **more: Any) -> Artefact:
    data, retriever, _ = parts
    given = {"trials": 12, "workers": 0, **more}
    asked = {"p99": given.pop("p99_s", 5e-3), "size": given.pop("size_bytes", 3e6)}
    asked |= {name: given.pop(name) for name in ("cost", "rps", "price") if name in given}
    limits = Limits(**asked)
    return search_compress(retriever, None, data, limits=limits, out=out, objective=objective, **given)


def left(search: Artefact) -> tuple[dict[str, Any], dict[str, Any]]:
    front, chosen = (json.loads((search.place / name).read_bytes()) for name in ("front.json", "chosen.json"))
    return front, chosen


def test_the_space_is_what_means_something_for_the_models(parts: Parts) -> None:
    retriever, ranker = (load_model(p) for p in parts[1:])
    assert isinstance(retriever, Retriever)
    assert isinstance(ranker, Ranker)
    alone, both = packing.plan_space(retriever, None), packing.plan_space(retriever, ranker)
    assert alone is not None
    assert both is not None
    assert set(alone.dimensions) == {"retriever_codec", "encoder_graph", "index", *packing.USED_BY}
    assert set(both.dimensions) - set(alone.dimensions) == {
        "ranker_codec",
        "ranker_graph",
        "candidates",
        "blend",
    }
    assert both.dimensions["candidates"].high <= retriever.n_items
    reference, guess = packing.first_points(both)
    assert packing.plan_of(reference) == Plan()
    assert packing.plan_of(guess).retriever_codec == packing.plan_of(guess).ranker_codec == "int8"
    rng = np.random.default_rng(0)
    for _ in range(50):
        packing.plan_of(both.sample(rng)).check(retriever, ranker)


def test_parameters_of_an_index_that_is_not_used_do_not_count() -> None:
    one: Point = {"index": "exact", "links": 8, "ef_search": 16, "probes": 8}
    assert packing.canonical(one) == packing.canonical({**one, "links": 30}) == config.as_dict(Plan())
    lists: Point = {**one, "index": "ivf"}
    assert packing.plan_of(lists).index_params == {"probes": 8}
    assert packing.canonical(lists) == packing.canonical({**lists, "ef_search": 99})
    assert packing.canonical({**one, "index": "hnsw"}) != packing.canonical(
        {**one, "index": "hnsw", "links": 9}
    )


def test_parameters_that_do_not_count_are_not_told_of(parts: Parts) -> None:
    retriever = load_model(parts[1])
    assert isinstance(retriever, Retriever)
    space = packing.plan_space(retriever, None)
    assert space is not None
    usual = packing.first_points(space)[0]
    other: Point = {**usual, "retriever_codec": "int8", "links": 30, "ef_search": 99}
    assert words(packing.tidy(other, usual), usual) == "retriever_codec=int8"
    told = packing.tidy({**other, "index": "hnsw"}, usual)
    assert words(told, usual) == "retriever_codec=int8 index=hnsw links=30 ef_search=99"


def test_the_bytes_of_tables_are_a_true_lower_bound(parts: Parts, tmp_path: Path) -> None:
    from recray.bundles.build import build

    data, *both = parts
    retriever, ranker = (load_model(p) for p in both)
    for codec in ("f32", "int4"):
        point: Point = {"retriever_codec": codec, "ranker_codec": codec}
        made = build(tmp_path / codec, both[0], both[1], data, packing.plan_of(point))
        bound = packing.table_bytes(point, retriever, ranker)
        assert 0 < bound <= made.model_bytes


def test_the_best_that_fits_is_chosen_and_everything_is_told(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = search(parts, tmp_path / "search", Pretend())
    front, chosen = left(made)
    assert chosen["plan"]["retriever_codec"] == "int8"
    assert chosen["plan"]["encoder_graph"] == "onnx-int8"
    assert chosen["bounded_by"] == ["p99", "size"]
    assert "0.20% below uncompressed" in chosen["why"]
    assert plan_of_trial(open_artefact(made.place, "search")).retriever_codec == "int8"
    rows = front["trials"]
    assert len(rows) == 12
    assert rows[0]["trial"] == front["reference"]
    assert rows[0]["words"] == "as trained"
    assert rows[0]["over"] == {"p99": pytest.approx(0.6), "size": pytest.approx(5 / 3)}
    failed = [row for row in rows if row["error"]]
    assert all("OSError: this graph cannot be exported" in row["error"] for row in failed)
    assert all(row["fits"] == (not row["over"]) for row in rows if not row["error"])
    assert {"trials/" + row["trial"] + ".json" for row in rows} <= set(made.manifest.files)
    assert sorted(made.manifest.parents) == ["checkpoint", "dataset"]
    assert not (tmp_path / ".search.search").exists()
    assert 0 < front["hypervolume"] < 1
    told = capsys.readouterr()
    assert told.out == ""
    assert (
        "trial  1/12  as trained  ndcg@10 0.5000 (+0.0%)  p50 4 ms  p99 8 ms  8 MB  over p99 and size"
        in told.err
    )


def test_quality_that_cannot_be_told_apart_is_settled_by_p99_times_bytes(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"retriever_codec": ("f32", "f16", "int8", "int4"), "encoder_graph": ("eager", "onnx-int8")}
    monkeypatch.setattr(packing, "choices", lambda *_: few)  # so few that all are tried
    given = {"p99_s": 1.0, "size_bytes": 9e6, "trials": 8}
    _, clear = left(search(parts, tmp_path / "clear", Pretend(), **given))
    assert clear["plan"]["retriever_codec"] == "f16", "equal to f32 at half the bytes"
    _, noisy = left(search(parts, tmp_path / "noisy", Pretend(noise=0.2), **given))
    assert noisy["plan"]["retriever_codec"] == "int8", "its loss of .001 drowns in the noise; int4's does not"
    assert "ties with the best" in noisy["why"]
    _, strict = left(search(parts, tmp_path / "strict", Pretend(noise=0.2), tolerance=0.001, **given))
    assert strict["plan"]["retriever_codec"] == "f16", "beyond the tolerance there is no tie"


def test_when_nothing_fits_the_error_names_the_nearest_and_the_search_is_left(
    parts: Parts, tmp_path: Path
) -> None:
    with pytest.raises(
        BudgetError, match=r"nothing of .* fits p99 1 ms and size 3 MB: the nearest"
    ) as caught:
        search(parts, tmp_path / "search", Pretend(), p99_s=1e-3)
    assert "p99 is 2 ms where 1 ms are allowed (100% over)" in str(caught.value)
    assert "size is" not in str(caught.value)
    made = open_artefact(tmp_path / "search", "search")
    front, chosen = left(made)
    assert chosen["trial"] is front["chosen"] is None
    assert chosen["bounded_by"] == ["p99"]
    assert chosen["nearest"] in {row["trial"] for row in front["trials"]}


def test_the_same_trials_serve_another_budget_and_a_longer_search(parts: Parts, tmp_path: Path) -> None:
    first = Pretend()
    search(parts, tmp_path / "search", first, trials=8)
    again = Pretend()
    made = search(parts, tmp_path / "search", again, trials=8, p99_s=1.0)
    asked = {json.dumps(p) for p in first.asked}
    assert not asked & {json.dumps(p) for p in again.asked if packing.plan_of(p).encoder_graph != "onnx"}
    assert left(made)[0]["budget"]["p99"] == 1.0
    longer = Pretend()
    search(parts, tmp_path / "search", longer, trials=11)
    assert len(longer.asked) >= 3


def test_the_share_of_http_is_counted_in(parts: Parts, tmp_path: Path) -> None:
    made = search(parts, tmp_path / "search", Pretend(), p99_s=9e-3, http_overhead_s=2e-3)
    front, chosen = left(made)
    assert chosen["metrics"]["p99"] == pytest.approx(4e-3)
    assert front["trials"][0]["over"].keys() == {"p99", "size"}
    with pytest.raises(ConfigError, match="leave nothing beside the 5 ms of HTTP"):
        search(parts, tmp_path / "other", Pretend(), http_overhead_s=5e-3)


def test_money_is_a_limit_like_the_others(parts: Parts, tmp_path: Path) -> None:
    price = Price(hour=1.0, cores=1, memory_gb=7.5)
    given = {"p99_s": 1.0, "size_bytes": 1e9, "rps": 20.0, "price": price}
    made = search(parts, tmp_path / "free", Pretend(), **given)
    rows = {row["trial"]: row for row in left(made)[0]["trials"] if not row["error"]}
    plain = rows[left(made)[0]["reference"]]["cost"]
    assert plain["total"] == pytest.approx(bill(4e-3, 8e6, price, 20, cores()).total)
    assert plain["delta"]["total"] == 0
    small = next(
        row for row in rows.values() if row["metrics"]["bytes"] == 2e6 and row["metrics"]["p50"] < 2e-3
    )
    assert small["cost"]["delta"]["total"] == pytest.approx(small["cost"]["total"] - plain["total"])
    assert small["cost"]["operations"] > 0
    tight = (small["cost"]["total"] + plain["total"]) / 2
    front, chosen = left(search(parts, tmp_path / "bound", Pretend(), cost=tight, **given))
    assert front["budget"]["cost"] == tight
    assert chosen["metrics"]["p99"] == 2e-3
    assert chosen["uses"]["cost"] < 1
    assert front["trials"][0]["over"].keys() == {"cost"}
    with pytest.raises(BudgetError, match=r"cost is .* per 1,000 where .* are allowed"):
        search(parts, tmp_path / "none", Pretend(), cost=1e-9, **given)


def test_tables_that_cannot_be_small_enough_are_told_of_before_any_work(parts: Parts, tmp_path: Path) -> None:
    objective = Pretend()
    with pytest.raises(
        BudgetError, match=r"smallest tables \(retriever_codec=.*\) alone take .* size is .* over"
    ):
        search(parts, tmp_path / "search", objective, size_bytes=100.0)
    assert objective.asked == []
    assert not (tmp_path / "search").exists()


def test_checkpoints_that_do_not_match_are_refused_at_once(parts: Parts, tmp_path: Path) -> None:
    data, retriever, _ = parts
    other = prepare_other(tmp_path)
    stranger = checkpoint(tmp_path / "stranger", other, "neumf", dim=8)
    objective = Pretend()
    with pytest.raises(ConfigError, match=r"knows \d+ items and the dataset has \d+"):
        search_compress(
            retriever, stranger, data, limits=Limits(p99=1, size=1e9), out=tmp_path / "s", objective=objective
        )
    assert objective.asked == []


def prepare_other(folder: Path) -> Dataset:
    lines = [f"u{n % 9},j{n % 13},{n}" for n in range(200)]
    (folder / "log.csv").write_text("\n".join(["user,item,time", *lines]))
    return prepare(folder / "log.csv", out=folder / "other")


def test_a_full_disk_fails_trials_and_not_the_search(
    parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(Pretend):
        def __call__(self, point: Point) -> Outcome:
            if len(self.asked) in (2, 3):
                self.asked.append(point)
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().__call__(point)

    front, chosen = left(search(parts, tmp_path / "search", Full()))
    assert chosen["trial"]
    assert sum("No space left on device" in (row["error"] or "") for row in front["trials"]) == 2
    assert "failed: OSError: [Errno 28] No space left on device" in capsys.readouterr().err


def test_the_page_and_the_picture_lie_beside_the_front(parts: Parts, tmp_path: Path) -> None:
    made = search(parts, tmp_path / "search", Pretend())
    assert {"front.html", "front.svg", "front.json"} <= set(made.manifest.files)
    front, chosen = left(made)
    assert front["why"] == chosen["why"]
    assert front["predictor"]["n"] == 0, "a made-up objective has no stages to learn from"
    told = told_trial(made, "1")
    assert told["words"] == "as trained"
    assert "values" not in told["detail"]
    assert told["cost"]["delta"]["compute"] == 0
    with pytest.raises(InputError, match="no trial"):
        told_trial(made, "999")


def test_what_cannot_be_searched_is_refused_before_any_work(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _, ranker = parts
    objective = Pretend()
    for wrong in ({"p99_s": 0.0}, {"size_bytes": 0.0}, {"trials": 0}):
        with pytest.raises(ConfigError):
            search(parts, tmp_path / "search", objective, **wrong)
    with pytest.raises(ConfigError, match="neumf is not a retriever"):
        search((data, ranker, ranker), tmp_path / "search", objective)
    monkeypatch.setattr(packing, "choices", lambda *_: {"retriever_codec": ("f32",), "index": ("exact",)})
    with pytest.raises(ConfigError, match="nothing to compress in sasrec"):
        search(parts, tmp_path / "search", objective)
    assert objective.asked == []
    assert not (tmp_path / "search").exists()


def test_two_real_trials_are_built_asked_and_timed(parts: Parts, tmp_path: Path) -> None:
    data, retriever, ranker = parts
    start = time.monotonic()
    made = search_compress(
        retriever,
        ranker,
        data,
        limits=Limits(p99=5.0, size=64e6),
        trials=2,
        workers=0,
        effort=QUICK,
        out=tmp_path / "search",
    )
    front, chosen = left(made)
    plain, packed = front["trials"]
    assert plain["error"] is packed["error"] is None
    assert packed["metrics"]["bytes"] < 0.7 * plain["metrics"]["bytes"]
    for row in (plain, packed):
        timed = row["latency"]
        assert 0 < timed["p50"] <= timed["p95"] <= timed["p99"] == row["metrics"]["p99"]
        assert timed["low"] <= timed["p99"] <= timed["high"]
        assert timed["repeats"] >= 100
        assert timed["seconds"] < time.monotonic() - start
    trial = json.loads((made.place / "trials" / f"{chosen['trial']}.json").read_bytes())
    stages = trial["detail"]["latency"]["stages"]
    assert {"encode", "search", "rank", "rest"} == set(stages)
    assert min(stage["p50"] for stage in stages.values()) > 1e-6, "each stage is really timed"
    assert len(trial["detail"]["values"]) == len(data.cases("valid"))
    assert np.mean(trial["detail"]["values"]) == pytest.approx(chosen["metrics"]["ndcg@10"], abs=1e-6)

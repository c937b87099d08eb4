"""Plans put together from parts: what is known before any is built, what is proposed, what races."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recray.bundles.build import build
from recray.data.dataset import Dataset
from recray.manifest import Artefact
from recray.models.base import Ranker, Retriever
from recray.models.saved import load_model
from recray.tuning import packing
from recray.tuning.compress import Limits, search_compress
from recray.tuning.forecast import Forecast, choices, features, part_points, smallest
from recray.tuning.latency import Effort
from recray.tuning.pareto import Budget
from recray.tuning.race import raced, rungs
from recray.tuning.space import Point, Space
from recray.tuning.trial import Trial
from tests.serving_bundles import checkpoint, small_dataset

QUICK = Effort(least=100, seconds=0.2, warmup=5)
Parts = tuple[Dataset, Artefact, Artefact]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("forecast")
    data = small_dataset(folder)
    first = checkpoint(folder / "retriever", data, "sasrec", dim=16, blocks=1, max_len=20)
    return data, first, checkpoint(folder / "ranker", data, "neumf", dim=8)


@pytest.fixture
def models(parts: Parts) -> tuple[Retriever, Ranker]:
    retriever, ranker = (load_model(artefact) for artefact in parts[1:])
    assert isinstance(retriever, Retriever)
    assert isinstance(ranker, Ranker)
    return retriever, ranker


@pytest.fixture
def space(models: tuple[Retriever, Ranker]) -> Space:
    made = packing.plan_space(*models)
    assert made is not None
    return made


def trial(
    point: Point, quality: float, *, size: dict[str, int], users: Any = None, scale: float = 1.0
) -> Trial:
    """As a measurement would leave it: int8 is slower to read, onnx faster to run, candidates cost."""
    encode = {"eager": 4e-3, "onnx": 2e-3}.get(str(point["encoder_graph"]), 1e-3)
    rank = 1e-5 * float(str(point["candidates"]))
    stages = {"encode": encode, "search": 5e-4, "rank": rank, "rest": 2e-4}
    total = scale * sum(stages.values())
    return Trial(
        hash=json.dumps(point),
        number=1,
        point=point,
        metrics={"ndcg@10": quality, "p50": total, "p99": 1.5 * total, "bytes": float(sum(size.values()))},
        detail={
            "latency": {"stages": {name: {"p50": s, "p99": 1.5 * s} for name, s in stages.items()}},
            "bytes": size,
            "values": users,
        },
    )


def test_parts_change_one_thing_and_reach_the_ends(space: Space) -> None:
    usual = packing.first_points(space)[0]
    made = part_points(space, usual)
    assert made[0] == usual
    for point in made[1:]:
        changed = {name for name in point if point[name] != usual[name]}
        assert len(changed - set(packing.USED_BY)) == 1
        packing.plan_of(point)
    assert {point["retriever_codec"] for point in made} == set(space.dimensions["retriever_codec"].choices)
    assert {point["index"] for point in made} == set(space.dimensions["index"].choices)
    for name in ("candidates", "ef_search", "probes"):
        low, high = space.dimensions[name].low, space.dimensions[name].high
        assert {low, high} <= {float(str(point[name])) for point in made}
    assert len({json.dumps(packing.canonical(point), sort_keys=True) for point in made}) == len(made)


def test_what_decides_a_stage_and_nothing_else(space: Space) -> None:
    usual = packing.first_points(space)[0]
    plain = features(usual)
    assert set(plain) == {"encode", "search", "rank", "rest"}
    assert features({**usual, "links": 9}) == plain, "no graph is searched"
    assert features({**usual, "ranker_codec": "int8"})["encode"] == plain["encode"]
    assert features({**usual, "index": "hnsw"})["search"]["ef_search"] == pytest.approx(
        np.log(float(str(usual["ef_search"])))
    )
    assert "rank" not in features({**usual, "blend": 1.0}), "the ranker is not asked"
    assert choices({**usual, "blend": 0.5})["blend squared"] == 0.25


def test_bytes_are_known_before_a_plan_is_built(
    parts: Parts, space: Space, models: tuple[Retriever, Ranker], tmp_path: Path
) -> None:
    """Every part once; then plans that were never built, to a few hundred bytes of file headers."""
    data, *both = parts
    usual = packing.first_points(space)[0]
    forecast = Forecast(space, *models, Budget(1.0, 1e9), "ndcg@10")

    def built(point: Point, name: str) -> dict[str, int]:
        made = build(
            tmp_path / name, both[0], both[1], data, packing.plan_of(point), pieces=tmp_path / "pieces"
        )
        return dict(made.artefact.manifest.report["bytes"])

    for i, more in enumerate(({}, {"encoder_graph": "onnx-int8"}, {"ranker_graph": "onnx"})):
        forecast.learn(trial({**usual, **more}, 0.5, size=built({**usual, **more}, f"part{i}")), part=True)
    other: Point = {**usual, "retriever_codec": "int4", "ranker_codec": "int8", "encoder_graph": "onnx-int8"}
    other |= {"ranker_graph": "onnx"}
    true = sum(built(other, "other").values())
    assert forecast.bytes(other) == pytest.approx(true, abs=1200)
    assert forecast.bound(other)["bytes"] < true


def learned(space: Space, models: tuple[Retriever, Ranker], budget: Budget) -> Forecast:
    forecast = Forecast(space, *models, budget, "ndcg@10")
    size = {"retriever": 40_000, "ranker": 20_000, "index": 0}
    usual = packing.first_points(space)[0]
    for point in part_points(space, usual):
        quality = 0.5 - 0.02 * (point["retriever_codec"] == "int4") - 0.01 * (point["index"] == "ivf")
        forecast.learn(trial(point, quality, size=size), part=True)
    whole: list[Point] = [{}, {"encoder_graph": "onnx"}, {"candidates": 40}, {"ranker_codec": "int8"}]
    whole += [{"encoder_graph": "onnx", "candidates": 120}, {"retriever_codec": "int8"}]
    for i, more in enumerate(whole):
        values = [0.4 + 0.01 * i] * 64
        forecast.learn(trial({**usual, **more}, 0.5, size=size, users=values, scale=1.1))
    return forecast


def test_a_plan_is_put_together_from_its_parts(space: Space, models: tuple[Retriever, Ranker]) -> None:
    forecast = learned(space, models, Budget(1.0, 1e9))
    usual = packing.first_points(space)[0]
    asked: Point = {**usual, "encoder_graph": "onnx", "candidates": 100, "retriever_codec": "int4"}
    found = forecast.value(asked)
    assert found is not None
    assert found.p99 == pytest.approx(1.5 * 1.1 * (2e-3 + 5e-4 + 1e-3 + 2e-4), rel=0.2)
    assert found.quality == pytest.approx(0.48, abs=0.005)
    assert forecast.model.error.n == 6
    assert forecast.operations(asked) < forecast.operations(usual)


def test_proposals_fit_as_predicted_and_add_to_the_front(
    space: Space, models: tuple[Retriever, Ranker]
) -> None:
    forecast = learned(space, models, Budget(4e-3, 1e9))
    proposed = [point for point, _ in zip(forecast.propose(), range(5))]
    assert proposed
    for point in proposed:
        value = forecast.value(point)
        assert value is not None
        assert value.p99 <= 4e-3
        assert point["encoder_graph"] != "eager", "it alone takes more than the budget"
    assert list(learned(space, models, Budget(1e-5, 1e9)).propose()) == []
    assert forecast.bound(packing.first_points(space)[0])["p99"] > 4e-3
    assert forecast.bound(proposed[0])["p99"] < 4e-3


def test_a_rival_is_surely_no_slower_and_no_larger(space: Space, models: tuple[Retriever, Ranker]) -> None:
    forecast = learned(space, models, Budget(1.0, 1e9))
    usual = packing.first_points(space)[0]
    (against,) = forecast.rival({**usual, "blend": 0.5})
    assert len(against) == 64
    assert forecast.rival({**usual, "encoder_graph": "onnx-int8", "candidates": 20}) == (), (
        "nothing is faster"
    )
    assert forecast.rival({**usual, "retriever_codec": "int4"}) == (), "nothing is smaller"


def test_a_race_ends_when_the_rival_is_surely_better() -> None:
    draw = np.random.default_rng(0)
    rival = draw.random(2000)
    asked: list[int] = []

    def plan(loss: float) -> Any:
        def ask(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            asked.append(len(rows))
            return np.asarray(rival[rows] - loss + 0.05 * draw.normal(size=len(rows)))

        return ask

    assert rungs(2000) == [250, 500, 1000, 2000]
    assert len(raced(plan(0.05), 2000, rival.tolist())) == 250
    assert len(raced(plan(-0.01), 2000, rival.tolist())) == 2000
    asked.clear()
    assert len(raced(plan(0.05), 2000, None)) == 2000
    assert asked == [2000], "nobody to race: all users at once"
    assert raced(lambda rows: rows * 1.0, 7, [0.0] * 7).tolist() == [0, 1, 2, 3, 4, 5, 6], "in their order"


def test_the_smallest_tables_are_known(space: Space, models: tuple[Retriever, Ranker]) -> None:
    least, words = smallest(space, *models)
    assert 0 < least < packing.table_bytes({}, *models) / 4
    assert "retriever_codec=" in words


def test_parts_are_measured_once_and_kept_with_the_search(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real parts and trials of a retriever alone; a second search finds every part in the first."""
    data, retriever, _ = parts
    few = {"retriever_codec": ("f32", "int8", "int4"), "encoder_graph": ("eager",), "index": ("exact",)}
    monkeypatch.setattr(packing, "choices", lambda *_: few)

    def searched(trials: int) -> dict[str, Any]:
        made = search_compress(
            retriever, None, data, limits=Limits(p99=5.0, size=64e6), trials=trials, workers=0,
            out=tmp_path / "search", effort=QUICK, users=60, parts=True,
        )  # fmt: skip
        found: dict[str, Any] = json.loads((made.place / "front.json").read_bytes())
        return found

    assert len(searched(2)["trials"]) == 2
    kept = sorted((tmp_path / "search" / "parts").iterdir())
    assert len(kept) == 3
    assert "part 3/3" in capsys.readouterr().err
    stamps = [path.read_bytes() for path in kept]
    front = searched(3)
    assert "3 parts were finished before and are kept" in capsys.readouterr().err
    assert [path.read_bytes() for path in kept] == stamps
    assert front["predictor"]["words"].startswith("out of range"), "three wholes are too few"
    assert all(row["latency"]["stages"] for row in front["trials"])


def test_what_came_before_the_uncompressed_plan_counts_as_much(
    space: Space, models: tuple[Retriever, Ranker]
) -> None:
    usual = packing.first_points(space)[0]
    points = part_points(space, usual)
    size = {"retriever": 40_000, "ranker": 20_000, "index": 0}
    forecasts = []
    for order in (points, [*points[1:], points[0]]):
        forecast = Forecast(space, *models, Budget(1.0, 1e9), "ndcg@10")
        for point in order:
            quality = 0.5 - 0.02 * (point["retriever_codec"] == "int4")
            forecast.learn(trial(point, quality, size=size), part=True)
        forecasts.append(forecast)
    asked = choices({**usual, "retriever_codec": "int4", "candidates": 100})
    first, last = (forecast.model.quality(asked) for forecast in forecasts)
    assert first == pytest.approx(0.96, abs=0.01)
    assert last == pytest.approx(first)

"""The cost model: what it learns from parts and wholes, how it knows its error, what it will not guess."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from recray.errors import ConfigError
from recray.money import BUSY, GB_A_CORE, PROCESS, Bill, Price, bill
from recray.tuning.cost import LEAST, CostModel, LatencyModel, Seen, held_out
from recray.tuning.ridge import Ridge

ENCODE = {"f32": 1.0, "int8": 1.2, "pq": 2.0}
GRAPH = {"eager": 2e-3, "onnx": 8e-4, "onnx-int8": 4e-4}


def features(codec: str, graph: str, candidates: int) -> dict[str, dict[str, Any]]:
    return {
        "encode": {"codec": codec, "graph": graph},
        "rank": {"candidates": math.log(candidates)},
        "rest": {},
    }


def planted(
    codec: str, graph: str, candidates: int, *, whole: bool, noise: float = 0.0, seed: int = 0
) -> Seen:
    """A request of known parts: the encoder's choices multiply, ranking grows with the root of candidates,
    and the whole takes a tenth more than its parts."""
    draw = np.random.default_rng(seed)
    stages = {
        "encode": GRAPH[graph] * ENCODE[codec],
        "rank": 1e-4 * candidates**0.5,
        "rest": 3e-4,
    }
    told = {name: {"p50": s, "p99": 1.5 * s} for name, s in stages.items()}
    total = 1.1 * sum(stages.values()) * math.exp(noise * draw.normal())
    return Seen(
        key=f"{codec} {graph} {candidates}",
        features=features(codec, graph, candidates),
        choices={"codec": codec, "graph": graph},
        stages=told,
        p50=total if whole else None,
        p99=1.6 * total if whole else None,
        quality={"f32": 1.0, "int8": 0.99, "pq": 0.9}[codec] * (0.98 if graph == "onnx-int8" else 1.0),
    )


def parts() -> list[Seen]:
    """One thing changed at a time."""
    made = [planted(codec, "eager", 100, whole=False) for codec in ENCODE]
    made += [planted("f32", graph, 100, whole=False) for graph in ("onnx", "onnx-int8")]
    return [*made, planted("f32", "eager", 20, whole=False), planted("f32", "eager", 400, whole=False)]


WHOLE = [
    ("f32", "eager", 100),
    ("int8", "eager", 40),
    ("f32", "onnx", 300),
    ("pq", "onnx", 60),
    ("int8", "onnx-int8", 200),
]


def test_plans_are_predicted_from_parts_that_were_measured_once() -> None:
    model = LatencyModel.fit([*parts(), *(planted(*plan, whole=True) for plan in WHOLE)])
    true = planted("pq", "onnx-int8", 150, whole=True)  # no part of it was ever measured together
    found = model.predict(true.features)
    assert found.out == ()
    assert found.p50 == pytest.approx(true.p50, rel=0.12)
    assert found.p99 == pytest.approx(true.p99, rel=0.12)


def test_it_prints_its_own_error_on_plans_left_out() -> None:
    noisy = [planted(*plan, whole=True, noise=0.05, seed=i) for i, plan in enumerate(WHOLE)]
    error = held_out([*parts(), *noisy])
    assert error.n == 5
    assert 0.005 < error.p50 < 0.15
    assert error.p99 <= error.reach
    assert "left out in turn" in error.words()
    assert f"p50 within {error.p50:.0%}" in error.words()


def test_the_error_is_of_plans_it_was_not_fitted_to() -> None:
    """One plan whose time follows from nothing: it is told of as an error, not learned by heart."""
    odd = planted("pq", "onnx-int8", 150, whole=True)
    odd = Seen(**{**vars(odd), "p50": 9 * (odd.p50 or 0), "p99": 9 * (odd.p99 or 0)})
    plain = [planted(*plan, whole=True) for plan in WHOLE]
    assert held_out([*parts(), *plain, odd]).p50 > 0.1 > held_out([*parts(), *plain]).p50


def test_out_of_range_is_said_and_not_guessed() -> None:
    seen = [*parts(), *(planted(*plan, whole=True) for plan in WHOLE)]
    model = LatencyModel.fit(seen)
    strange = model.predict(
        {"encode": {"codec": "int2", "graph": "eager"}, "rank": {"candidates": 3.0}, "rest": {}}
    )
    assert (strange.p50, strange.p99) == (None, None)
    assert "codec=int2 was not measured" in strange.out
    far = model.predict(features("f32", "eager", 40_000))
    assert far.p50 is None
    assert "candidates" in far.out[0]
    assert model.predict({**features("f32", "eager", 50), "gpu": {}}).out == ("gpu is new",)
    few = LatencyModel.fit([*parts(), *(planted(*plan, whole=True) for plan in WHOLE[: LEAST - 1])])
    assert few.predict(features("f32", "eager", 100)).out == (f"only {LEAST - 1} plans were measured",)
    assert "out of range" in held_out(parts()).words()


def test_what_is_surely_too_slow_is_known_by_more_than_the_error() -> None:
    model = CostModel()
    assert model.surely_above(features("f32", "eager", 100)) == 0.0
    for seen in [*parts(), *(planted(*plan, whole=True, noise=0.05, seed=i) for i, plan in enumerate(WHOLE))]:
        model.learn(seen)
    asked = features("pq", "eager", 300)
    low, likely = model.surely_above(asked), model.latency(asked).p99
    assert likely is not None
    assert low == pytest.approx(likely / (1 + model.error.reach))
    assert low < likely
    assert model.surely_above(features("nothing", "eager", 300)) == 0.0, "out of range is no reason to refuse"


def test_quality_is_what_every_choice_takes_of_it() -> None:
    model = CostModel()
    for seen in parts():
        model.learn(seen)
    assert model.quality({"codec": "int8", "graph": "onnx-int8"}) == pytest.approx(0.97, abs=0.01)
    assert model.quality({"codec": "int2", "graph": "onnx"}) is None


def test_a_ridge_keeps_to_the_mean_where_it_knows_nothing() -> None:
    rows: list[dict[str, float | str]] = [{"a": "x", "n": 1.0}, {"a": "y", "n": 3.0}, {"a": "x", "n": 2.0}]
    made = Ridge.fit(rows, [1.0, 3.0, 2.0])
    assert made.predict({"a": "x", "n": 1.5}) == pytest.approx(1.5, abs=0.1)
    assert made.beyond({"a": "x", "n": 2.9}) == []
    assert made.beyond({"a": "z", "n": 9.0, "m": 1.0}) == [
        "a=z was not measured", "n was not measured so far out", "m was not measured",
    ]  # fmt: skip
    assert Ridge.fit([{}, {}], [1.0, 3.0]).predict({}) == 2.0
    with pytest.raises(ValueError, match="nothing to learn"):
        Ridge.fit([], [])


def test_c_is_requests_times_compute_plus_storage() -> None:
    price = Price(hour=3.6, cores=1, memory_gb=GB_A_CORE)  # a core and its worth of memory: half of it each
    assert price.core_second == pytest.approx(0.0005)
    assert price.byte_second == pytest.approx(0.0005 / GB_A_CORE / 1e9)
    one = bill(0.002, 70e6, price)
    assert one.compute == pytest.approx(1000 * 0.002 / BUSY * price.core_second)
    assert one.storage == pytest.approx((PROCESS + 70e6) * 1000 * 0.002 / BUSY * price.byte_second)
    assert one.total == one.compute + one.storage
    slow = bill(0.002, 70e6, price, rps=10)
    assert slow.compute == one.compute
    assert slow.storage == pytest.approx((PROCESS + 70e6) * 100 * price.byte_second), "held while it waits"
    many = bill(0.002, 70e6, price, rps=700)
    assert many.storage == pytest.approx(2 * (PROCESS + 70e6) * 1000 / 700 * price.byte_second), (
        "two replicas"
    )


def test_delta_c_under_quantization_has_both_terms() -> None:
    price = Price()
    change = bill(0.001, 16e6, price, 50) - bill(0.002, 64e6, price, 50)
    assert isinstance(change, Bill)
    assert change.compute == pytest.approx(-1000 * 0.001 / BUSY * price.core_second)
    assert change.storage == pytest.approx(-48e6 * 20 * price.byte_second)
    assert change.as_dict()["total"] == change.compute + change.storage < 0


@pytest.mark.parametrize("wrong", [{"hour": 0}, {"cores": -1}, {"memory_gb": math.nan}, {"hour": math.inf}])
def test_a_price_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="price"):
        Price(**wrong)

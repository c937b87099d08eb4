"""What the autoscaling policy is told and makes of it: counters, costs found from batches, options."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recray.config import build
from recray.errors import ConfigError
from recray.serving.scaling import (
    COUNTERS,
    Batches,
    Sums,
    Watch,
)
from recray.serving.settings import Batch, GraphArgs


def test_a_part_s_cost_is_found_from_its_batches() -> None:
    draw, meter = np.random.default_rng(0), Batches({})
    for size in draw.integers(1, 20, 500).tolist():
        meter.add(size, (0.01 + 0.002 * size) * float(draw.gamma(25, 1 / 25)))
    sums = Sums()
    assert sums.work(32) is None, "too few batches"
    sums.add(meter.told(), 0.0)
    found = sums.work(32)
    assert found is not None
    assert found.call_s == pytest.approx(0.01, rel=0.2)
    assert found.item_s == pytest.approx(0.002, rel=0.1)
    assert found.spread == pytest.approx(1 / 25, rel=0.5)
    assert found.size == 32


def test_batches_of_one_leave_it_open_which_half_is_whose() -> None:
    meter, sums = Batches({}), Sums()
    for _ in range(50):
        meter.add(1, 0.01)
    sums.add(meter.told(), 0.0)
    found = sums.work(8)
    assert found is not None
    assert (found.call_s, found.item_s) == pytest.approx((0.005, 0.005))


def test_a_watch_adds_up_replicas_and_forgets_those_that_went() -> None:
    watch = Watch()

    def told(requests: float, at: float, before: float = 0.0) -> dict[str, list[tuple[float, float]]]:
        made = {name: [(at - 5, 0.0), (at, 0.0)] for name in COUNTERS}
        for name, each in (("calls", 1.0), ("requests", 1.0), ("requests2", 1.0)):
            made[name] = [(at - 5, before * each), (at, requests * each)]
        for name, each in (("busy_s", 0.01), ("busy2", 1e-4), ("both", 0.01), ("door_s", 0.002)):
            made[name] = [(at - 5, before * each), (at, requests * each)]
        return made

    assert watch.rate == 0.0
    for replica in ("a", "b"):
        watch.see("Ingress", replica, told(100, 10.0))
        watch.see("Ingress", replica, told(300, 15.0, 100))
        watch.see("Ingress", replica, told(300, 15.0, 100))  # the same again
    assert watch.rate == pytest.approx(80)
    door, model = watch.works("Ingress", 8)
    assert (door.item_s, door.size) == (pytest.approx(0.002), 1)
    assert model.call_s + model.item_s == pytest.approx(0.01)
    assert watch.works("Ranker", 8) == ()
    watch.keep("Ingress", ["b"])
    assert watch.rate == pytest.approx(40)
    watch.see("Ingress", "c", {})  # it has not reported yet
    assert watch.rate == pytest.approx(40)


def test_a_replica_tells_only_what_is_asked_for() -> None:
    quiet = Batches.of(GraphArgs(bundle="b"))
    quiet.add(3, 0.01)
    assert quiet.told() == {}
    telling = Batches.of(GraphArgs(bundle="b", p99_ms=50.0, batch=Batch(size=8)), hops=2)
    assert telling.timed(3, lambda a, b: a + b, 1, 2) == 3
    told = telling.told()
    assert (told["size"], told["target_ms"], told["calls"], told["requests"]) == (8, 50, 1, 3)
    assert told["fixed_ms"] > 1, "two hops"
    assert told["door_s"] > 0
    assert set(COUNTERS) < set(told)
    for bad in (0.0, -1.0):
        with pytest.raises(ConfigError, match="above zero"):
            build(GraphArgs, {"bundle": "b", "p99_ms": bad})


def test_options_get_our_cadence_beside_a_target_and_what_is_fixed_stays_so() -> None:
    from recray.serving.on_ray.scaling import BUILD, CADENCE, POLICY, declaration, paced

    assert paced({"num_replicas": 2}, 4, 50.0) == {"num_replicas": 2}
    assert paced({"max_ongoing_requests": 9}, 4, None) == {"max_ongoing_requests": 9}
    made = paced({"autoscaling_config": {"min_replicas": 0, "look_back_period_s": 3}}, 4, 50.0)
    config = made["autoscaling_config"]
    assert (config["min_replicas"], config["max_replicas"], config["look_back_period_s"]) == (0, 4, 3)
    assert config["downscale_delay_s"] == CADENCE["downscale_delay_s"] == 0
    app = declaration(
        {"bundle": "b", "p99_ms": 50.0}, {"Ranker": {"autoscaling_config": {"max_replicas": 3}}}
    )
    assert (app["import_path"], app["autoscaling_policy"]) == (BUILD, {"policy_function": POLICY})
    assert app["deployments"][0]["autoscaling_config"]["max_replicas"] == 3
    assert app["deployments"][0]["autoscaling_config"]["upscale_delay_s"] == 0


def context(name: str, target: int, ongoing: float, reports: Mapping[str, Mapping[str, float]]) -> Any:
    """What Serve hands to a policy: metric -> replica -> points, each replica's counters grown over 5 s."""
    raw: dict[str, dict[str, list[Any]]] = {}
    for replica, counters in reports.items():
        for metric, value in counters.items():
            grown = metric in COUNTERS
            points = [(100.0 + t, value * t / 5 if grown else value) for t in (0.0, 2.5, 5.0)]
            raw.setdefault(metric, {})[replica] = [SimpleNamespace(timestamp=t, value=v) for t, v in points]
    return SimpleNamespace(
        deployment_name=name, raw_metrics=raw, total_num_requests=ongoing, target_num_replicas=target,
        current_num_replicas=len(reports), capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=8,
    )  # fmt: skip


def test_the_policy_sizes_all_deployments_from_what_ray_hands_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from recray.serving.on_ray.scaling import Together

    fixed = {"size": 1.0, "target_ms": 200.0, "fixed_ms": 5.0}
    n = 150.0  # requests in 5 seconds at each of two retrievers, 25 ms each: both are 0.75 busy
    busy = {
        "calls": n,
        "requests": n,
        "busy_s": n * 0.025,
        "requests2": n,
        "busy2": n * 0.025**2,
        "both": n * 0.025,
    }
    idle = dict.fromkeys(busy, 0.0)
    ids = {"Ingress": object(), "Retriever": object()}

    def contexts(part: float) -> dict[Any, Any]:
        grown = {name: value * part for name, value in busy.items()}
        door = {**fixed, **idle, "door_s": 0.3 * part}
        return {
            ids["Ingress"]: context("Ingress", 1, 10.0, {"i": door}),
            ids["Retriever"]: context(
                "Retriever", 2, 10.0, {r: {**fixed, **grown, "door_s": 0.0} for r in "ab"}
            ),
        }

    policy, clock = Together(), [1000.0]
    monkeypatch.setattr("recray.serving.on_ray.scaling.time.monotonic", lambda: clock[0])
    assert policy(contexts(1.0)) == ({ids["Ingress"]: 1, ids["Retriever"]: 2}, {}), "nothing is known yet"
    assert policy(contexts(1.0)) == ({}, {}), "too soon for another look"
    later = contexts(2.0)
    for one in later.values():
        for replicas in one.raw_metrics.values():
            for points in replicas.values():
                points[:] = [SimpleNamespace(timestamp=p.timestamp + 5, value=p.value) for p in points]
    clock[0] += 2
    made, _ = policy(later)
    assert made[ids["Ingress"]] == 1
    assert made[ids["Retriever"]] > 2
    clock[0] += 2
    assert policy({ids["Ingress"]: SimpleNamespace(deployment_name="Ingress")}) == ({}, {}), "it never raises"

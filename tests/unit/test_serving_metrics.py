"""What is counted, what it is called, and that dashboard and alerts ask for nothing else."""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from recray.money import Price, bill
from recray.serving import metrics
from recray.serving.http import Reply, build_asgi
from recray.serving.metrics import METRICS, Meter, Sample
from recray.serving.router import Router
from recray.serving.scaling import Batches
from recray.serving.schema import ApiError, RecommendRequest
from recray.serving.seen import Seen

FOLDER = Path(__file__).parents[2] / "deployments" / "observability"
WORDS = {
    "sum",
    "max",
    "by",
    "on",
    "group_left",
    "rate",
    "histogram_quantile",
    "offset",
    "label_values",
    "changes",
}
WORDS |= {"unless"}


def told(meter: Meter) -> dict[tuple[str, ...], float]:
    return {(s.name, *s.labels.values()): s.value for s in meter.collect()}


def test_counters_tell_their_growth_and_gauges_themselves() -> None:
    meter = Meter()
    meter.count("answers", "g1")
    meter.count("answers", "g1", by=2)
    meter.set("waiting", 7)
    assert told(meter) == {("answers", "g1"): 3, ("waiting",): 7}
    assert told(meter) == {("waiting",): 7}
    meter.count("answers", "g1")
    meter.count("answers", "g2")
    assert [one for one in meter.collect() if one.kind == "counter"] == [
        Sample("answers", "counter", {"generation": "g1"}, 1),
        Sample("answers", "counter", {"generation": "g2"}, 1),
    ]


@given(st.lists(st.floats(0, 1e5), max_size=40))
def test_buckets_are_counts_of_values_up_to_their_edges(values: list[float]) -> None:
    meter = Meter()
    meter.observe("ms", 1.0, "g", "total")
    told(meter)
    for value in values:
        meter.observe("ms", value, "g", "total")
    grown = told(meter)
    for edge in metrics.MS:
        want = sum(value <= edge for value in values)
        assert grown.get(("ms_bucket", "g", "total", f"{edge:g}"), 0) == want
    assert grown.get(("ms_bucket", "g", "total", "+Inf"), 0) == len(values)
    assert grown.get(("ms_count", "g", "total"), 0) == len(values)
    assert grown.get(("ms_sum", "g", "total"), 0) == pytest.approx(sum(values))


def test_a_new_series_tells_its_empty_buckets_too() -> None:
    meter = Meter()
    meter.observe("batch", 5, "g")
    counts = [value for (name, *_), value in told(meter).items() if name == "batch_bucket"]
    assert counts == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_labels_cannot_grow_without_end() -> None:
    meter = Meter()
    for n in range(5000):
        meter.count("degraded", "g", f"reason {n}")
    kept = told(meter)
    assert len(kept) == metrics.MOST + 1
    assert kept["degraded", "g", "other"] == 5000 - metrics.MOST


def test_generations_cannot_grow_without_end_and_the_other_labels_stay() -> None:
    meter, more = Meter(), 150
    timing = {"wait": 1.0, "retrieve": 1.0, "rank": 1.0, "total": 3.0}
    for n in range(metrics.MOST + more):
        metrics.answered(meter, f"g{n}", timing, ["unknown user", "state unavailable"])
        metrics.acted(meter, f"g{n}", ["click"], 1)
    kept = told(meter)
    assert kept["answers", "other"] == kept["acted", "other"] == kept["events", "other", "click"] == more
    for reason in ("unknown user", "state unavailable"):
        assert kept["degraded", "other", reason] == more
    for stage in timing:
        assert kept["ms_count", "other", stage] == more
        assert kept["ms_count", f"g{metrics.MOST - 1}", stage] == 1
    names = [key[1] for key in kept if key[0] == "ms_count" and key[2] == "total"]
    assert len(names) == len(set(names)) == metrics.MOST + 1
    metrics.answered(meter, "g0", timing, [])
    assert told(meter)["ms_count", "g0", "total"] == 1, "a known one keeps its name"


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["wait", "total"])), max_size=400))
def test_each_stage_counts_all_its_answers(seen: list[tuple[int, str]]) -> None:
    meter = Meter()
    for n, stage in seen:
        meter.observe("ms", 1.0, f"g{n}", stage)
    kept = told(meter)
    for stage in ("wait", "total"):
        counts = [value for key, value in kept.items() if key[0] == "ms_count" and key[2] == stage]
        assert sum(counts) == sum(one == stage for _, one in seen)


def test_answers_events_and_refusals_are_counted_at_the_door() -> None:
    class Answerer:
        async def recommend(self, ask: RecommendRequest) -> Reply:
            if ask.user == "away":
                raise ApiError(503, "unavailable", "away")
            if ask.user == "boom":
                raise RuntimeError("boom")
            items = [{"item": "secret-item", "score": 1.0, "source": "fake"}]
            return Reply(items, "0123456789ab+feed", ["unknown user"], {"retrieve": 1.5, "total": 4.0})

        async def similar(self, item: str, k: int) -> Reply:
            return Reply([], "g")

        async def ready(self) -> str:
            return "g"

    seen = Seen()

    async def scene() -> None:
        app = build_asgi(Answerer(), seen=seen)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            for user in ("mary", "mary", "away", "boom"):
                await client.post("/v1/recommend", json={"user": user, "history": ["secret-item"]})
            await client.post("/v1/recommend", json={"k": 0})

    asyncio.run(scene())
    kept = told(seen.meter)
    g = "0123456789ab"
    assert kept["answers", g] == 2
    assert kept["degraded", g, "unknown user"] == 2
    assert kept["ms_bucket", g, "retrieve", "2"] == 2
    assert kept["ms_bucket", g, "total", "3"] == 0
    assert (kept["refused", "unavailable"], kept["refused", "internal"]) == (1, 1)
    assert kept["refused", "invalid_value"] == 1
    assert not any(word in str(kept) for word in ("mary", "secret", "feed")), "no ids in labels"


def test_events_are_counted_by_kinds_that_we_know() -> None:
    meter = Meter()
    metrics.acted(meter, "g", ["click", "buy", "click", "shoe-lover-7", None], 2)
    kinds = {("events", "g", "click"): 2, ("events", "g", "buy"): 1, ("events", "g", "other"): 2}
    assert told(meter) == {("acted", "g"): 2, **kinds}


def test_queues_and_batches_are_looked_at() -> None:
    batches = SimpleNamespace(waiting=3, sizes=deque([1, 4, 4]))
    answers = SimpleNamespace(hits=2, misses=5)
    held = {"g1": SimpleNamespace(layout=SimpleNamespace(batches=batches), answers=answers)}
    router = SimpleNamespace(held=held, state=SimpleNamespace(version=5, share=0.1))
    meter = Meter()
    metrics.gathered(meter, cast(Router, router))
    kept = told(meter)
    assert (kept[("waiting",)], kept[("version",)], kept[("canary_share",)]) == (3, 5, 0.1)
    assert (kept["batch_count", "g1"], kept["batch_sum", "g1"]) == (3, 9)
    assert (kept["cache", "answers", "hit"], kept["cache", "answers", "miss"]) == (2, 5)
    assert not batches.sizes
    assert (answers.hits, answers.misses) == (0, 0)


def test_what_a_stage_has_done() -> None:
    batches, meter = Batches(), Meter()
    batches.add(8, 0.25)
    batches.add(2, 0.5)
    metrics.worked(meter, batches.sums())
    assert told(meter) == {("batches",): 2, ("batched",): 10, ("busy_seconds",): 0.75}
    batches.add(1, 0.25)
    metrics.worked(meter, batches.sums())
    assert told(meter) == {("batches",): 1, ("batched",): 1, ("busy_seconds",): 0.25}


def test_what_a_process_uses_and_what_that_costs() -> None:
    meter, price = Meter(), Price()
    metrics.used(meter, price)
    kept = told(meter)
    assert kept[("cpu_seconds",)] > 0
    assert 1e6 < kept[("memory_bytes",)] < 1e11
    seconds, answers, size = 30.0, 10_000, 1e9  # as the panel has it, against the bill
    cost = 1000 * (seconds / 60 / 0.7 * kept[("price_core_second",)] + size * kept[("price_byte_second",)])
    cost /= answers / 60
    want = bill(seconds / answers, size - 430e6, price, rps=answers / 60).total
    assert cost == pytest.approx(want)


def queries() -> list[str]:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    made = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    made += [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    return made + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("query", queries())
def test_every_query_asks_for_what_is_exported(query: str) -> None:
    labels = {label for metric in METRICS.values() for label in metric.labels}
    labels |= {"application", "deployment", "le"}
    bare = re.sub(r'"[^"]*"', '""', query)
    assert all(bare.count(a) == bare.count(b) for a, b in ("()", "{}", "[]")), "brackets close"
    names = set(re.findall(r"\bray_\w+", bare))
    assert names, "it asks for something"
    assert names <= metrics.exported()
    rest = set(re.findall(r"[a-zA-Z_$]\w*", re.sub(r"\bray_\w+|\[[^\]]*\]|offset \w+", "", bare)))
    assert rest <= WORDS | labels, rest - WORDS - labels
    for name, inside in re.findall(r"\b(ray_\w+)\{([^}]*)\}", bare):
        stem = re.sub(r"(_bucket|_sum|_count)?(_total)?$", "", name.removeprefix(metrics.PREFIX))
        known = {*METRICS[stem].labels, "application", "deployment", "le"}
        assert set(re.findall(r"(\w+) *[=!]", inside)) <= known
    for counter in re.findall(r"(\S*?)\b(ray_\w+_total)", bare):
        assert counter[0].endswith("rate("), "a counter is read by its rate"


def test_every_metric_is_on_the_dashboard() -> None:
    asked = " ".join(queries())
    assert [name for name in METRICS if f"{metrics.PREFIX}{name}" not in asked] == []


def test_alerts_and_dashboard_are_whole() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    names = []
    for group in rules["groups"]:
        assert set(group) <= {"name", "rules", "interval"}
        for rule in group["rules"]:
            assert {"alert", "expr", "for", "labels", "annotations"} == set(rule)
            assert re.fullmatch(r"\d+[smhd]", rule["for"])
            assert rule["labels"]["severity"] in ("page", "warn")
            assert rule["annotations"]["summary"]
            names.append(rule["alert"])
    assert len(set(names)) == len(names)
    board: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
    places = np.array([list(panel["gridPos"].values()) for panel in board["panels"]])
    assert len(np.unique(places[:, :2], axis=0)) == len(places), "no panel lies on another"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert yaml.safe_load((FOLDER / "prometheus.yaml").read_text())["rule_files"] == ["alerts.yaml"]

"""The plan before a run: what it holds, what it refuses and what it then says would fit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recray
from recray import memory
from recray.cli.main import main
from recray.data.dataset import Dataset
from recray.errors import ConfigError, InputError
from recray.memory import free_memory
from recray.models.base import Catalogue
from recray.recipes import Train, recipe
from recray.training import machine
from recray.training.machine import measured_machine
from recray.training.plan import (
    GIB,
    PROCESS,
    Machine,
    RunPlan,
    TableWork,
    Work,
    check_fits,
    compare,
    make_plan,
    size,
)
from recray.training.work import recipe_work, table_work
from tests.models_data import ring_dataset

BIG = Machine(memory=1 << 60)

tables = st.builds(
    TableWork,
    name=st.just("item"),
    rows=st.integers(1, 3_000_000_000),
    dim=st.integers(1, 512),
    lookups=st.floats(1, 1e7),
    distinct=st.floats(0, 1),
    scored=st.sampled_from([0.0, 1.0, 5000.0]),
    dtype=st.sampled_from(["f32", "bf16"]),
    optimizer=st.sampled_from(["sgd", "adagrad", "adam"]),
)
works = st.builds(
    Work,
    tables=st.lists(tables, min_size=1, max_size=3).map(
        lambda made: tuple(dataclasses.replace(t, name=f"table{i}") for i, t in enumerate(made))
    ),
    validated=st.booleans(),
    dense=st.integers(0, 10**8),
    activations=st.floats(0, 1e9),
    largest=st.floats(1, 10),
    accumulate=st.integers(1, 4),
    wire=st.sampled_from(["f32", "bf16"]),
)
ranks = st.integers(1, 300)


def one(**changes: Any) -> Work:
    """A million rows of 64, 40,960 lookups."""
    table = TableWork(**{"name": "item", "rows": 10**6, "dim": 64, "lookups": 40960.0, **changes})
    return Work(tables=(table,))


@given(works, ranks)
def test_the_ranks_share_every_table_without_gap_or_overlap(work: Work, ranks: int) -> None:
    plan = make_plan(work, ranks, BIG)
    for table in work.tables:
        bounds = [plan.holds(rank)[table.name] for rank in range(ranks)]
        assert (bounds[0][0], bounds[-1][1]) == (0, table.rows)
        assert all(before[1] == after[0] for before, after in pairwise(bounds))


@given(works, ranks, st.integers(1, 1000), st.integers(1, 64))
def test_more_rows_and_wider_ones_never_take_less(work: Work, ranks: int, rows: int, dims: int) -> None:
    def larger(rows: int, dims: int) -> Work:
        changed = [
            dataclasses.replace(t, rows=min(t.rows + rows, 3_000_000_000), dim=t.dim + dims)
            for t in work.tables
        ]
        return dataclasses.replace(work, tables=tuple(changed))

    base = make_plan(work, ranks, BIG)
    for other in (make_plan(larger(rows, 0), ranks, BIG), make_plan(larger(0, dims), ranks, BIG)):
        assert other.bytes >= base.bytes
        assert sum(other.sent.values()) >= sum(base.sent.values())
        assert other.step_s >= base.step_s


@given(works, ranks)
def test_twice_the_ranks_never_need_more_memory_each(work: Work, ranks: int) -> None:
    one, two = make_plan(work, ranks, BIG), make_plan(work, 2 * ranks, BIG)
    assert all(two.memory[part] <= one.memory[part] for part in one.memory)


@given(works)
def test_one_rank_sends_nothing(work: Work) -> None:
    alone = make_plan(work, 1, BIG)
    assert sum(alone.sent.values()) == alone.seconds["wire"] == 0


@given(works, st.integers(1, 40), st.floats(1.0001, 1000))
def test_what_is_said_to_fit_does(work: Work, ranks: int, short: float) -> None:
    need = make_plan(work, ranks, BIG).bytes
    small = Machine(memory=max(1, int(need / short)))
    with pytest.raises(InputError) as refused:
        check_fits(make_plan(work, ranks, small))
    said = refused.value.fix or ""
    if "neither" in said:
        assert not make_plan(work, 1 << 20, small).fits
        return
    for words in said.removeprefix("it fits with ").split(", or with "):
        check_fits(make_plan(*follow(words, work, ranks), small))
    if found := re.search(r"([\d,]+) workers", said):
        fewest = int(found[1].replace(",", ""))
        assert fewest > ranks
        assert not make_plan(work, fewest - 1, small).fits, "so few were enough"


def follow(words: str, work: Work, ranks: int) -> tuple[Work, int]:
    """Do what a refusal says."""
    if words == "train.valid_users=0":
        return dataclasses.replace(work, validated=False), ranks
    if found := re.fullmatch(r"([\d,]+) workers that have .* each", words):
        return work, int(found[1].replace(",", ""))
    change: dict[str, Any] = dict(re.findall(r"train\.table_(\w+)=(\w+)", words))
    if found := re.fullmatch(r"rows of (\d+) floats", words):
        widest = max(t.dim for t in work.tables)
        made = [dataclasses.replace(t, dim=int(found[1])) if t.dim == widest else t for t in work.tables]
        return dataclasses.replace(work, tables=tuple(made)), ranks
    assert change, words
    made = [dataclasses.replace(t, **change) for t in work.tables]
    return dataclasses.replace(work, tables=tuple(made)), ranks


def test_the_bytes_are_those_of_the_tensors() -> None:
    for optimizer, state in (("sgd", 0), ("adagrad", 4), ("adam", 4 * 64 + 8)):
        for dtype, width in (("f32", 4), ("bf16", 2)):
            plan = make_plan(one(dtype=dtype, optimizer=optimizer), 4, BIG)
            assert plan.memory["weights"] == 250_000 * 64 * width
            assert plan.memory["optimizer"] == 250_000 * state
            assert plan.memory["process"] == PROCESS


def test_the_wire_carries_what_is_not_local() -> None:
    plan = make_plan(one(distinct=0.5), 2, BIG)
    asked = 40960 / 2 * 0.5 / 2  # of a rank, distinct, at the other
    assert plan.sent["ids"] == asked * 8
    assert plan.sent["rows"] == plan.sent["gradients"] == asked * 64 * 4
    half = make_plan(dataclasses.replace(plan.work, wire="bf16"), 2, BIG)
    assert half.sent["rows"] * 2 == plan.sent["rows"]
    assert half.sent["ids"] == plan.sent["ids"]
    dense = make_plan(dataclasses.replace(plan.work, dense=1000), 4, BIG)
    assert dense.sent["dense"] == 2 * 1000 * 4 * 3 // 4


def test_a_full_softmax_costs_its_products_and_touches_every_row() -> None:
    slow = Machine(memory=1 << 60, flops=1e9)
    sampled, full = make_plan(one(), 2, slow), make_plan(one(scored=100.0), 2, slow)
    products = 6 * 100 * 10**6 * 64 / 2 / 1e9
    assert full.seconds["softmax"] == pytest.approx(products, rel=0.1)
    assert sampled.seconds["softmax"] == 0
    assert full.seconds["update"] > 5 * sampled.seconds["update"]
    held = make_plan(one(penalized=True), 2, slow)  # a penalty steps on every row, and scores none
    assert (held.seconds["update"], held.seconds["softmax"]) == (full.seconds["update"], 0)
    assert held.memory["step"] - sampled.memory["step"] == 10**6 / 2 * 64 * 4


def test_a_billion_rows_on_machines_we_do_not_have() -> None:
    work = table_work(1e9, 64, asked=2048 * 20, train=Train(table_optimizer="adagrad"))
    small = Machine(memory=64 * GIB)
    with pytest.raises(InputError) as refused:
        check_fits(make_plan(work, 2, small))
    said = str(refused.value)
    assert "\n" not in said
    assert "table 'table' of 1,000,000,000 x 64: needs 121.53 GiB of memory a worker on 2" in said
    assert "and 64.00 GiB are there. it fits with 4 workers that have 64.00 GiB each, or with " in said
    assert said.endswith("train.table_dtype=bf16, or with rows of 32 floats")
    plan = check_fits(make_plan(work, 4, small))
    assert plan.holds(3) == {"table": (750_000_000, 1_000_000_000)}
    assert make_plan(work, 64, small).bytes < 6 * GIB


def test_fifty_million_rows_train_on_two_ranks_of_one_machine() -> None:
    """The bar of the training wing: 50 M x 64 within 18 GiB in f32, 10 GiB in bf16, both ranks together."""
    for dtype, room in (("f32", 18), ("bf16", 10)):
        settings = Train(table_optimizer="adagrad", table_dtype=dtype)  # type: ignore[arg-type]
        plan = make_plan(table_work(50e6, 64, asked=40960, train=settings), 2, BIG)
        assert 0.6 * room * GIB < 2 * plan.bytes < room * GIB


def test_validation_that_gathers_a_table_is_counted() -> None:
    bare = table_work(50e6, 64, asked=40960, train=Train(table_optimizer="adagrad"))
    work = dataclasses.replace(bare, validated=True)
    more = make_plan(work, 2, BIG).bytes - make_plan(bare, 2, BIG).bytes
    assert more == 2 * 50_000_000 * 64 * 4
    with pytest.raises(InputError, match="valid_users=0"):
        check_fits(make_plan(work, 2, Machine(memory=12 * GIB)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": 0}, "has 0 rows"),
        ({"rows": 4_000_000_000}, "4,000,000,000 rows. plan 1 to 3,037,000,499"),
        ({"dim": 0}, "rows of 0"),
        ({"lookups": 0.0}, "asked for 0 rows a step"),
        ({"lookups": math.nan}, "asked for nan rows"),
        ({"lookups": math.inf}, "asked for inf rows"),
        ({"distinct": 1.5}, "1.5 of the ids"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        one(**changes)


def test_ranks_and_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 workers"):
        make_plan(one(), 0, BIG)
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="flops of"):
            Machine(memory=1, flops=rate)


def test_where_nothing_helps_that_is_said() -> None:
    with pytest.raises(InputError, match="neither workers nor smaller rows"):
        check_fits(make_plan(dataclasses.replace(one(), dense=10**9), 1, Machine(memory=GIB)))


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return ring_dataset(tmp_path_factory.mktemp("planned"), days=True)


def test_planning_for_a_table_of_any_size_allocates_nothing() -> None:
    started = time.perf_counter()
    work = recipe_work(recipe("sasrec"), Catalogue(3 * 10**9, {}))
    assert time.perf_counter() - started < 5
    with pytest.raises(InputError, match="table 'item' of 3,000,000,000 x 64"):
        check_fits(make_plan(work, 1, Machine(memory=free_memory())))


def test_the_report_keeps_both_times() -> None:
    plan = make_plan(one(), 1, BIG)
    kept = compare(plan, 0.0123)
    assert kept["measured_step_ms"] == 12.3
    assert kept["predicted_step_ms"] == pytest.approx(plan.step_s * 1e3, abs=1e-3)
    assert sum(kept["predicted_parts_ms"].values()) == pytest.approx(kept["predicted_step_ms"], abs=0.01)
    assert json.loads(json.dumps(kept)) == kept


def test_this_machine_is_measured_quickly_and_once() -> None:
    machine._rates.cache_clear()
    started = time.perf_counter()
    whole = measured_machine()
    spent = time.perf_counter() - started
    assert spent < 5, "half a second where nothing else runs"
    assert 1e8 < whole.bandwidth < 1e13
    assert 1e-10 < whole.id_s < 1e-4
    assert 1e8 < whole.flops < 1e14
    started = time.perf_counter()
    assert measured_machine(memory=7).memory == 7
    assert time.perf_counter() - started < 0.1
    shared = measured_machine(shared_by=2)
    assert shared.memory < 0.7 * whole.memory


def test_a_control_group_limits_what_is_free(tmp_path: Path) -> None:
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        group = tmp_path / names[0]
        group.mkdir()
        (group / "memory.stat").write_text("anon 600\ninactive_file 300\n")
        (group / names[1]).write_text("900\n")
        (group / names[0]).write_text("1000\n")
        assert memory._left(str(group)) == 1000 - 900 + 300
        (group / names[0]).write_text("max\n")
        assert memory._left(str(group)) > 1 << 60
    assert memory._left(str(tmp_path / "none")) > 1 << 60


def test_the_verb_plans_a_dataset(ring: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    where = str(ring.artefact.place)
    assert main(["plan", where, "--set", "options.dim=32", "--workers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["holds"] == [{"item": [0, 10]}, {"item": [10, 20]}]
    assert found["work"]["tables"][0]["dim"] == 32
    assert found["step_ms"]["total"] > 0
    assert main(["plan", where]) == 0
    out = capsys.readouterr().out
    for words in ("table item", "20 x 64 f32", "memory a worker", "expected step", "reckoned with"):
        assert words in out


def test_the_verb_plans_what_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--rows", "1e9", "--batch", "2048", "--lookups", "20", "--memory", "64GiB"]
    words += ["--wire", "10GB/s", "--rates", "bandwidth=2e11,latency=2e-5"]
    assert main([*words, "--workers", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["wire"] == 10e9
    assert (found["machine"]["bandwidth"], found["machine"]["latency"]) == (2e11, 2e-5)
    assert len(found["holds"]) == 64
    assert main([*words, "--workers", "2"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recray: error: table 'table' of 1,000,000,000 x 64: needs ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give either a dataset or --rows"),
        (["data", "--rows", "5"], "give either a dataset or --rows"),
        (["--rows", "many"], "invalid float value: 'many'"),
        (["--rows", "nan"], "rows. plan 1 to 3,037,000,499"),
        (["--rows", "9", "--lookups", "nan"], "asked for nan rows"),
        (["--rows", "9", "--memory", "64"], "memory '64' has no unit"),
        (["--rows", "9", "--wire", "fast"], "wire 'fast' has no unit"),
        (["--rows", "9", "--rates", "speed=3"], "unknown setting 'rates.speed'"),
        (["--rows", "9", "--rates", "flops=-3"], "flops of -3"),
        (["--rows", "9", "--recipe", "x"], "unknown recipe 'x'"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_python_plans_as_the_command_line_does() -> None:
    plan = recray.plan(rows=1e9, dim=64, workers=64, memory="64GiB")
    assert isinstance(plan, RunPlan)
    assert plan.fits
    assert size(plan.memory["weights"]) == "3.73 GiB"

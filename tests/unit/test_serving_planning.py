"""The planner: a pure function of bytes, seconds and machines, so no cluster is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.bundles.build import build
from recray.bundles.plan import Plan
from recray.cli.main import main
from recray.data.dataset import Dataset
from recray.errors import ArtefactError, ConfigError
from recray.models.embeddings import Table
from recray.retrieval.index import Index
from recray.serving.generations import Generation, State
from recray.serving.planning import (
    COSTS,
    GENERATIONS,
    PROCESS,
    TABLE,
    Machine,
    StageLoad,
    loads_of,
    make_plan,
    table,
    this_machine,
)
from recray.serving.settings import Batch
from tests.serving_bundles import checkpoint, small_bundle, small_dataset

GIB = 1 << 30
BOX = Machine(cores=2, memory=24 * GIB)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data"))


def loads(retriever: int = 40 << 20, ranker: int = 25 << 20, device: str = "cpu") -> list[StageLoad]:
    return [
        StageLoad(name="retriever", bytes=retriever, item_s=6e-4, call_s=1e-3),
        StageLoad(name="ranker", bytes=ranker, item_s=3e-4, call_s=1e-3, device=device),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("profile", ["lite", "fast"])
def test_a_small_bundle_is_fused_since_hops_cost_more_than_models(profile: str) -> None:
    plan = make_plan(loads(), BOX, COSTS[profile])
    assert (plan.layout, plan.replicas) == ("fused", 2)
    assert plan.expected["fused"].hops == plan.expected["fused"].bytes == 0
    assert plan.expected["split"].hops == 2
    assert plan.expected["fused"].rps > plan.expected["split"].rps
    assert "no hop" in plan.reason


def test_tables_too_large_for_many_whole_replicas_are_split() -> None:
    """One replica with everything fits 4 times; the stages apart keep all 64 cores busy."""
    machine = Machine(cores=64, memory=768 * GIB)
    plan = make_plan(loads(retriever=20 * GIB, ranker=40 * GIB), machine, COSTS["fast"])
    assert plan.layout == "split"
    assert plan.expected["fused"].replicas == 4
    assert "only 4 replicas" in plan.reason
    assert make_plan(loads(retriever=20 * GIB, ranker=40 * GIB), machine, layout="fused").layout == "fused"


def test_what_fits_no_node_whole_but_in_parts_is_split_over_nodes() -> None:
    halves = loads(retriever=20 * GIB, ranker=20 * GIB)
    plan = make_plan(halves, Machine(cores=8, memory=72 * GIB, nodes=2))
    assert plan.layout == "split"
    assert "do not fit into one node" in plan.reason
    for machine, layout in ((BOX, "auto"), (BOX, "split"), (BOX, "fused")):
        with pytest.raises(ConfigError, match="does not fit") as error:
            make_plan(halves, machine, layout=layout)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


def test_a_ship_holds_as_many_generations_as_are_planned_for() -> None:
    one, two, three = (Generation(name, "") for name in "abc")
    state = State(current=one).load(two, 0.0).flip().load(three, 0.0)
    assert len(state.resident) == GENERATIONS
    room = make_plan(loads(retriever=GIB, ranker=GIB), Machine(cores=8, memory=32 * GIB))
    assert room.expected["fused"].replicas == 32 * GIB // (6 * GIB + PROCESS) == 5


def test_stages_on_different_hardware_are_split() -> None:
    mixed = loads(device="gpu")
    assert make_plan(mixed, Machine(cores=8, memory=64 * GIB, gpus=1)).layout == "split"
    assert "GPU" in make_plan(mixed, Machine(cores=8, memory=64 * GIB, gpus=1)).reason
    assert make_plan(mixed, Machine(cores=8, memory=64 * GIB)).layout == "fused", "there is no GPU to use"


def test_what_is_asked_for_overrules() -> None:
    plan = make_plan(loads(), BOX, layout="split", batch=Batch(size=7, in_flight=3))
    assert (plan.layout, plan.batch.size, plan.batch.in_flight) == ("split", 7, 3)
    assert "asked for" in plan.reason
    assert plan.expected["split"].batch <= 7


@given(
    retriever=st.integers(0, 64 * GIB), ranker=st.integers(0, 64 * GIB), cores=st.integers(1, 128),
    memory=st.integers(1, 512), clients=st.integers(1, 1000),
)  # fmt: skip
def test_a_plan_fits_and_is_the_better_one(
    retriever: int, ranker: int, cores: int, memory: int, clients: int
) -> None:
    machine = Machine(cores=cores, memory=memory * GIB)
    try:
        plan = make_plan(loads(retriever, ranker), machine, clients=clients)
    except ConfigError:
        assert GENERATIONS * (retriever + ranker) + 2 * GIB > machine.memory
        return
    chosen = plan.expected[plan.layout]
    assert chosen.replicas >= 1
    assert chosen.rps == max(one.rps for one in plan.expected.values())
    assert 1 <= chosen.batch <= plan.batch.size
    if plan.layout == "fused":
        assert chosen.replicas * GENERATIONS * (retriever + ranker) <= machine.memory
    assert [name for name, _ in table(plan)] == ["layout", "fused", "split", "batch"]


def test_more_clients_make_larger_batches_and_cheaper_hops() -> None:
    few, many = (make_plan(loads(), BOX, clients=n).expected["split"] for n in (1, 64))
    assert few.batch == 1
    assert many.batch > 16
    assert many.cpu_s < few.cpu_s


def test_a_manifest_says_enough(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    found = loads_of(bundle.artefact)
    assert [load.name for load in found] == ["retriever", "ranker"]
    assert all(load.bytes > 0 and load.item_s > 0 for load in found)
    told = dict(table(make_plan(found, this_machine())))
    assert told["layout"].startswith("fused")
    assert "0 hops" in told["fused"]
    assert "requests/s" in told["split"]


@pytest.mark.parametrize("model", ["bpr", "two-tower"])
@pytest.mark.parametrize("codec", ["f32", "int4", "pq", "tiers"])
def test_memory_is_reckoned_for_what_an_open_bundle_decodes(
    data: Dataset, model: str, codec: str, tmp_path: Path
) -> None:
    first = checkpoint(tmp_path / "checkpoint", data, model, dim=128)
    bundle = build(tmp_path / "bundle", first, None, data, Plan(retriever_codec=codec))
    bundle.similar(bundle.items.id_of(3))
    index, unit = bundle.recommender.index, bundle.recommender._cosine
    assert index is not None
    copies = [index, unit, unit.table] if model == "bpr" else [index, index.table, unit, unit.table]
    held = sum(_bytes(one) for one in copies)
    sizes = {name: int(entry["bytes"]) for name, entry in bundle.artefact.manifest.files.items()}
    (load,) = loads_of(bundle.artefact)
    assert load.bytes == held + sizes[TABLE] + 3 * (sum(sizes.values()) - sizes[TABLE])


def _bytes(held: Index | Table) -> int:
    return held.nbytes if isinstance(held, Index) else sum(p.nbytes for p in held.parameters())


def test_a_bundle_without_vectors_holds_no_copies(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path, ranker=False, retriever="item-knn")
    assert loads_of(bundle.artefact)[0].bytes == 3 * sum(
        int(entry["bytes"]) for entry in bundle.artefact.manifest.files.values()
    )


@pytest.mark.parametrize("start", [b"", b"\xff" * 64, b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{}"])
def test_a_damaged_table_is_one_line(tmp_path: Path, start: bytes) -> None:
    artefact = small_bundle(tmp_path).artefact
    (tmp_path / "bundle" / TABLE).write_bytes(start)
    with pytest.raises(ArtefactError, match=r"item\.safetensors") as error:
        loads_of(artefact)
    assert "\n" not in str(error.value)


def test_the_command_measures_a_bundle_and_prints_both_profiles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = small_bundle(tmp_path).artefact.place.uri
    assert main(["plan", where, "--serve"]) == 0
    said = capsys.readouterr().out
    for words in (
        "lite: layout",
        "fast: fused",
        "fast: split",
        "hops a batch",
        "bytes a request",
        "measured",
    ):
        assert words in said
    assert main(["plan", where, "--serve", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fast"]["expected"]["fused"]["rps"] > told["lite"]["expected"]["fused"]["rps"]
    assert [stage["name"] for stage in told["stages"]] == ["retriever", "ranker"]
    assert main(["plan", "--serve"]) == 2


@pytest.mark.parametrize("odd", [{"cores": 0}, {"memory": 0}, {"nodes": 0}, {"gpus": -1}])
def test_impossible_machines_are_refused(odd: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Machine(**{"cores": 1, "memory": GIB, **odd})

"""States on disk: bit-equal at any number of ranks, whole or not there, and refused where they do not fit."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from recray.errors import ArtefactError, RecrayError
from recray.manifest import digest
from recray.training import row_files
from recray.training.checkpoint import (
    EpochReport,
    Gather,
    Position,
    State,
    TableRows,
    assemble_model,
    best_state,
    last_state,
    open_state,
    read_optimizer,
    write_optimizer,
)
from recray.training.layout import Layout

Table = dict[str, Tensor]  # all positions: "weight" and slots
IDENTITY = {"recipe": "a" * 64, "code version": "0.2", "dataset": "b" * 64}
SLOTS = ((), ("sum",), ("m", "v", "steps"))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On tensors this small a second thread is only waited for; so is the disk."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield
    torch.set_num_threads(threads)


class Meeting:
    """Ranks that are threads of this process."""

    def __init__(self, world: int) -> None:
        self.said, self.barrier = [b""] * world, threading.Barrier(world, timeout=30)

    def gather(self, rank: int, message: bytes) -> list[bytes]:
        self.said[rank] = message
        self.barrier.wait()
        told = list(self.said)
        self.barrier.wait()
        assert len({len(each) for each in told}) == 1
        return told


def on_ranks(world: int, work: Callable[[int, Gather], Any]) -> list[Any]:
    """What `work(rank, gather)` gives on each rank, or the exception it ends with."""
    meeting = Meeting(world)

    def run(rank: int) -> Any:
        try:
            return work(rank, lambda message: meeting.gather(rank, message))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


def table(
    num_rows: int, dim: int, dtype: torch.dtype = torch.float32, slots: tuple[str, ...] = ("sum",)
) -> Table:
    made = {"weight": torch.randn(num_rows, dim).to(dtype)}
    return made | {slot: torch.randn(num_rows, *([dim] if slot == "m" else [])) for slot in slots}


def state(
    tables: Mapping[str, Table], position: Position, world: int = 1, rank: int = 0, **more: Any
) -> State:
    """One rank's state; the dense part says the epoch."""
    rows = {}
    for name, tensors in tables.items():
        num_rows, dim = tensors["weight"].shape
        start, stop = Layout(num_rows, world).bounds(rank)
        mine = {key: value[start:stop].clone() for key, value in tensors.items()}
        rows[name] = TableRows(num_rows, dim, start, stop, mine)
    dense = {"layer.weight": torch.full((2, 3), float(position.epoch)), "seen": torch.tensor(position.step)}
    return State(position, dense, {"0.step": torch.tensor(1.5)}, rows, IDENTITY, rank, **more)


def position(*values: float | None) -> Position:
    """After one epoch of three steps for each of `values`, the validation metric."""
    at = Position(seed=3)
    for number, value in enumerate(values, start=1):
        best = value is not None and (at.best_value is None or value > at.best_value)
        report = EpochReport(
            epoch=number,
            loss=1 / 3,
            metric="ndcg@10",
            value=value,
            best=best,
            seconds=1,
            batches=6,
            step=3 * number,
        )
        at = at.after(report)
    return at


def read(folder: Path, name: str, world: int, rank: int, like: Table) -> Table:
    """A rank's share of a table."""
    start, stop = Layout(len(like["weight"]), world).bounds(rank)
    into = {key: torch.full_like(value[start:stop], -1) for key, value in like.items()}
    open_state(folder, IDENTITY).rows(name, start, stop, into)
    return into


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_position_moves_from_epoch_to_epoch() -> None:
    at = replace(position(0.1, 0.3), batch=2, loss_sum=1.0, step=8)
    assert (at.epoch, at.best_epoch, at.best_value, at.folder) == (2, 2, 0.3, "state-00002-00000008")
    assert at.loss_mean == 0.5
    worse = at.after(replace(at.history[0], epoch=3, step=9, best=False))
    assert worse.loss_mean != worse.loss_mean, "no batch, no mean"
    assert (worse.batch, worse.loss_sum, worse.step, worse.best_epoch) == (0, 0.0, 9, 2)
    assert [report.step for report in worse.history] == [3, 6, 9]
    assert worse.best_folder == "state-00002-00000006"
    assert position(None).best_folder == position(None).folder == "state-00001-00000003"
    assert [worse.exhausted(epochs, patience) for epochs, patience in ((3, 0), (4, 0), (4, 1), (4, 2))] == [
        True, False, True, False,
    ]  # fmt: skip


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.sampled_from(SLOTS),
    st.sampled_from((torch.float32, torch.bfloat16)), st.lists(st.integers(1, 4), max_size=3),
)  # fmt: skip
def test_any_number_of_ranks_goes_on_where_others_were(
    num_rows: int, few: int, dim: int, slots: tuple[str, ...], dtype: torch.dtype, worlds: list[int]
) -> None:
    tables = {"item": table(num_rows, dim, dtype, slots), "context_0": table(few, 2)}  # some ranks own none
    at = replace(position(0.1, None), batch=1, loss_sum=0.1 + 0.2)
    with TemporaryDirectory() as name:
        run = Path(name)
        state(tables, at).save(run)
        for world in (2, 3, 1, *worlds):
            at = replace(at, step=at.step + 1)

            def go_on(rank: int, gather: Gather, world: int = world, at: Position = at) -> Path:
                found = last_state(run)
                assert found
                mine = state(tables, at, world, rank, gather=gather)
                for name in tables:
                    into = read(found, name, world, rank, tables[name])
                    for key, value in mine.tables[name].tensors.items():
                        assert torch.equal(into[key], value)
                        value.copy_(into[key])
                return mine.save(run)

            assert on_ranks(world, go_on) == [run / at.folder] * world
            saved = open_state(run / at.folder, IDENTITY)
            assert saved.position == at
            assert saved.tables["item"].slots == tuple(sorted(slots))
            assert len(saved.files) == 2 + sum(-(-n // -(-n // world)) for n in (num_rows, few))
            assert torch.equal(saved.dense()["layer.weight"], torch.full((2, 3), 2.0))
            assert torch.equal(saved.optimizer()["0.step"], torch.tensor(1.5))


def test_ranks_may_write_into_folders_of_their_own(tmp_path: Path) -> None:
    tables, at = {"item": table(7, 2)}, position(0.5)
    for part in ("0", "1", "2", "all"):
        (tmp_path / part).mkdir()
    on_ranks(3, lambda rank, gather: state(tables, at, 3, rank, gather=gather).write(tmp_path / str(rank)))
    assert [len(names(tmp_path / str(rank))) for rank in range(3)] == [4, 1, 1]
    for rank in range(3):
        for path in (tmp_path / str(rank)).iterdir():
            path.rename(tmp_path / "all" / path.name)
    assert torch.equal(
        read(tmp_path / "all", "item", 1, 0, tables["item"])["weight"], tables["item"]["weight"]
    )


def test_the_newest_state_and_the_best_epochs_stay(tmp_path: Path) -> None:
    tables = {"item": table(5, 2)}
    for values, kept in [
        ((0.1,), [1]), ((0.1, 0.3), [2]), ((0.1, 0.3, 0.2), [2, 3]), ((0.1, 0.3, 0.2, 0.1), [2, 4])
    ]:  # fmt: skip
        at = position(*values)
        saved = state(tables, at).save(tmp_path)
        assert last_state(tmp_path) == saved
        assert names(tmp_path) == [f"state-{epoch:05d}-{3 * epoch:08d}" for epoch in kept]
        assert best_state(tmp_path, at).name == f"state-{at.best_epoch:05d}-{3 * at.best_epoch:08d}"
    amid = replace(position(0.1, 0.3), step=8, batch=2)  # after some batches of the third epoch
    state(tables, amid).save(tmp_path)
    state(tables, replace(amid, step=10)).save(tmp_path)
    assert names(tmp_path) == ["state-00002-00000006", "state-00002-00000010"]
    assert best_state(tmp_path, amid).name == "state-00002-00000006"


def test_the_newest_is_told_by_numbers(tmp_path: Path) -> None:
    assert last_state(tmp_path) is None
    for name in (
        "state-99999-00000003",
        "state-100000-00000001",
        "state-99999-100000000",
        ".state-9-9.partial",
    ):
        (tmp_path / name).mkdir()
    assert last_state(tmp_path) == tmp_path / "state-100000-00000001"


def test_a_state_that_is_written_again_replaces_itself(tmp_path: Path) -> None:
    first, second = {"item": table(5, 2)}, {"item": table(5, 2)}
    for tables in (first, second):
        state(tables, position(0.1)).save(tmp_path)
    assert names(tmp_path) == ["state-00001-00000003"]
    found = read(tmp_path / "state-00001-00000003", "item", 1, 0, first["item"])
    assert torch.equal(found["weight"], second["item"]["weight"])


def test_all_of_it_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rename = os.rename

    def moved(old: Path, new: Path) -> None:
        done.append("renamed")
        rename(old, new)

    monkeypatch.setattr("os.fsync", lambda file: done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    monkeypatch.setattr("os.rename", moved)
    at = state({"item": table(5, 2)}, position(0.1)).save(tmp_path)
    assert sorted(done[:3]) == ["dense.safetensors", "optimizer.safetensors", "table-item-0-5.safetensors"]
    assert done[3:] == ["state.json", f".{at.name}.partial", "renamed", tmp_path.name]


def test_a_rank_that_cannot_write_stops_all_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"item": table(7, 2)}
    on_ranks(3, lambda rank, gather: state(tables, position(0.1), 3, rank, gather=gather).save(tmp_path))
    before = names(tmp_path)
    for victim in ("table-item-3-6", "dense", "state.json"):
        real = Path.open

        def full(path: Path, *given: Any, victim: str = victim, real: Any = real) -> Any:
            if path.name.startswith(victim):
                raise OSError(28, "no space left")
            return real(path, *given)

        monkeypatch.setattr(Path, "open", full)
        found = on_ranks(
            3, lambda rank, gather: state(tables, position(0.1, 0.2), 3, rank, gather=gather).save(tmp_path)
        )
        monkeypatch.setattr(Path, "open", real)
        broken = 1 if victim.startswith("table") else 0
        assert [type(error) for error in found] == [OSError if r == broken else RecrayError for r in range(3)]
        assert f"rank {broken} could not write" in str(found[2])
        assert names(tmp_path) == before
        read(tmp_path / before[0], "item", 2, 1, tables["item"])


def killed_at(line: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that kills itself at the n-th line it runs here; False if it ended before."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # a fork beside threads: none is used in the child
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = line

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if Path(frame.f_code.co_filename).name not in ("checkpoint.py", "row_files.py", "shutil.py"):
            return None
        left -= event == "line"
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    try:
        sys.settrace(trace)
        work()
    finally:
        os._exit(0)


def test_a_writer_killed_at_any_line_leaves_the_last_good_state(tmp_path: Path) -> None:
    old = {"item": table(9, 2), "user": table(3, 1)}
    new = {"item": table(9, 2), "user": table(3, 1)}
    at = [position(0.1), position(0.1, None), position(0.1, None, 0.0)]
    state(old, at[0]).save(tmp_path)  # the best epoch's
    state(old, at[1]).save(tmp_path)
    seen = set()
    for line in count(0, 31):
        killed = killed_at(line, lambda: state(new, at[2]).save(tmp_path))
        found = last_state(tmp_path)
        assert found
        assert (tmp_path / at[0].folder) == best_state(tmp_path, at[2])
        for folder, tables in (
            (found, new if found.name == at[2].folder else old),
            (tmp_path / at[0].folder, old),
        ):
            for name in tables:
                into = read(folder, name, 1, 0, tables[name])
                assert all(torch.equal(into[key], value) for key, value in tables[name].items())
            assert open_state(folder).dense()["layer.weight"][0, 0] == open_state(folder).position.epoch
        seen.add((found.name, len(names(tmp_path))))
        if not killed:
            break
        for tables, again in ((new, at[2]), (old, at[1])):  # what was left is swept, also a newer state
            state(tables, again).save(tmp_path)
            assert names(tmp_path) == [at[0].folder, again.folder]
    assert line > 300
    assert {name for name, _ in seen} == {at[1].folder, at[2].folder}
    assert {count for _, count in seen} == {2, 3}, (
        "nothing was left to be swept: the test shows less than it says"
    )


def test_another_recipe_code_or_dataset_is_named(tmp_path: Path) -> None:
    at = state({"item": table(5, 2)}, position(0.1)).save(tmp_path)
    assert open_state(at).position == open_state(at, IDENTITY).position == position(0.1)
    with pytest.raises(ArtefactError, match=r"state-00001-00000003: was written by another dataset\. delete"):
        open_state(at, {**IDENTITY, "dataset": "c" * 64})
    with pytest.raises(ArtefactError, match="by another code version and another recipe"):
        open_state(at, {"dataset": IDENTITY["dataset"], "recipe": "other"})


def test_a_state_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    tables = {"item": table(6, 2)}
    at = on_ranks(
        2, lambda rank, gather: state(tables, position(0.1), 2, rank, gather=gather).save(tmp_path)
    )[0]
    shard = at / row_files.file_name("item", 3, 6)
    kept = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ArtefactError, match=r"table-item-3-6.safetensors: is missing"):
        open_state(at)
    shard.write_bytes(kept[:-1])
    read(at, "item", 2, 0, tables["item"])  # the other half is sound
    with pytest.raises(ArtefactError, match=r"table-item-3-6.*cut short"):
        read(at, "item", 2, 1, tables["item"])
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    for read_it in (
        lambda: read(at, "item", 1, 0, tables["item"]),
        lambda: assemble_model(at, tmp_path / "model"),
    ):
        with pytest.raises(ArtefactError, match=r"table-item-3-6.*altered"):
            read_it()
    shard.write_bytes(kept)
    for name, load in (
        ("dense", lambda: open_state(at).dense()),
        ("optimizer", lambda: open_state(at).optimizer()),
    ):
        path = at / f"{name}.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ArtefactError, match=f"{name}.*altered"):
            load()
    with pytest.raises(ArtefactError, match="no table 'user'"):
        open_state(at).rows("user", 0, 1, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"position": 3}, "cannot be read"), ({"format": 9}, "format 9, this version reads 1"),
        ({"tables": {"item": {"rows": 7, "dim": 2, "slots": []}}}, "do not fit together at position 6 of 7"),
        ({"files": {"../x": "0"}}, "cannot be read"), ({"files": {}}, "list of files"),
        ({"identity": None}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_state_json_that_lies_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    at = state({"item": table(6, 2)}, position(0.1)).save(tmp_path)
    path = at / "state.json"
    raw = json.loads(path.read_text()) | change
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtefactError, match="altered" if "format" not in change else words):
        open_state(at)
    del raw["checksum"]
    path.write_text(json.dumps(raw | {"checksum": digest(raw)}))
    with pytest.raises(ArtefactError, match=words):
        open_state(at, IDENTITY)
    for text in ("", "[]", "{}", '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ArtefactError, match="cannot be read"):
            open_state(at)
    path.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        open_state(at)


def test_ranges_that_do_not_fit_together_are_not_written(tmp_path: Path) -> None:
    whole = state({"item": table(6, 2)}, position(0.1))
    short = replace(whole.tables["item"], num_rows=7)
    with pytest.raises(ArtefactError, match="position 6 of 7"):
        replace(whole, tables={"item": short}).save(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="positions 0 to 5"):
        replace(whole.tables["item"], stop=5)


def test_a_model_is_made_of_a_state(tmp_path: Path) -> None:
    tables = {"item": table(11, 3, torch.bfloat16), "user": table(4, 2)}
    at = on_ranks(
        3, lambda rank, gather: state(tables, position(0.1), 3, rank, gather=gather).save(tmp_path)
    )[0]
    assemble_model(at, tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert sorted(found) == ["layer.weight", "seen", "tables.item.weight", "tables.user.weight"]
    assert found["seen"] == 3
    for name, tensors in tables.items():
        rows = torch.arange(len(tensors["weight"]))
        want = tensors["weight"].float()[Layout(len(rows)).positions(rows)]
        assert torch.equal(found[f"tables.{name}.weight"], want)


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = made()
    for _ in range(3):
        step(layer, optimizer)
    State(Position(), layer.state_dict(), read_optimizer(optimizer), {}).write(tmp_path)
    step(layer, optimizer)
    other, again = made()
    saved = open_state(tmp_path)
    other.load_state_dict(saved.dense())
    write_optimizer(again, saved.optimizer())
    step(other, again)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)

"""States as they are written: bit-equal at any number of ranks, and whole or not there, whoever is killed."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
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

from recray.errors import ArtefactError, RecrayError
from recray.training.checkpoint import (
    Gather,
    Position,
    best_state,
    last_state,
    open_state,
)
from tests.training_states import (
    IDENTITY,
    SLOTS,
    names,
    on_ranks,
    position,
    quickly,
    read,
    state,
    table,
)

one_thread = pytest.fixture(autouse=True, scope="module")(quickly)


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


def test_ranges_that_do_not_fit_together_are_not_written(tmp_path: Path) -> None:
    whole = state({"item": table(6, 2)}, position(0.1))
    short = replace(whole.tables["item"], num_rows=7)
    with pytest.raises(ArtefactError, match="position 6 of 7"):
        replace(whole, tables={"item": short}).save(tmp_path)
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="positions 0 to 5"):
        replace(whole.tables["item"], stop=5)

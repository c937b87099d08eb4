"""Two ranks on the shares of a batch give what one process gives on the whole of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.embeddings import DenseTable
from recray.recipes import Train
from recray.training.checkpoint import State
from recray.training.loop import fit
from recray.training.parallel import Ranks
from recray.training.tables import unshard
from tests.models_data import ring
from tests.unit.training_fakes import FakeData, Tiny

TRAIN = Train(
    epochs=5, batch_size=7, lr=0.02, warmup_steps=4, patience=0, device="cpu", clip_norm=0.5, threads=1
)


def _fit(rank: int, world: int, folder: Path, resume: Path | None) -> None:
    torch.manual_seed(rank)  # the dense parts begin apart: rank 0's weights must win
    model = Tiny()
    model.tables["item"] = DenseTable(30, 8)
    torch.manual_seed(9)
    model.tables["item"].weight.data.normal_(std=0.3)
    result = fit(
        model,
        FakeData(users=23),  # type: ignore[arg-type]
        TRAIN,
        rank=rank,
        world=world,
        report=lambda epoch, state: _keep(state, folder, epoch.epoch if epoch else 0),
        resume=resume,
    )
    history = torch.tensor([[h.loss, h.value or 0.0] for h in result.position.history])
    unshard(model)
    save_file({**model.state_dict(), "history": history}, folder / f"rank{rank}.safetensors")


def _keep(state: State, folder: Path, epoch: int) -> None:
    if epoch == 3 or not epoch:
        state.save(folder)
        if state.rank == 0 and epoch == 3:
            shutil.copytree(folder / state.position.folder, folder / "epoch3")
        state.gather(b"x")


def _rank(rank: int, folder: str) -> None:
    """In a process of its own: a run of two ranks, and another that is resumed from its middle."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    _fit(rank, 2, Path(folder) / "two", None)
    dist.barrier()
    _fit(rank, 2, Path(folder) / "again", Path(folder) / "two" / "epoch3")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    for name in ("one", "two", "again", "alone"):
        (tmp_path / name).mkdir()
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    _fit(0, 1, tmp_path / "one", None)
    _fit(0, 1, tmp_path / "alone", tmp_path / "two" / "epoch3")  # a state of two ranks, resumed by one
    one = load_file(tmp_path / "one" / "rank0.safetensors")
    for path in ("two/rank0", "two/rank1", "again/rank0", "again/rank1", "alone/rank0"):
        found = load_file(tmp_path / f"{path}.safetensors")
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    ranks = [load_file(tmp_path / "two" / f"rank{rank}.safetensors") for rank in range(2)]
    assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in one)


def _two_tower(rank: int, world: int) -> torch.Tensor:
    """The losses of a model whose table of values is read, and named by none of its lookups."""
    data = ring(80, 23)
    options = {"dim": 8, "dropout": 0.0, "negatives": 10, "max_len": 6, "units": 8}
    model = build_model("two-tower", Catalogue.of(data), options, seed=0, allocate=False)
    model.see(data)
    asked = next(model.batches(data, batch_size=16, epoch=1, seed=0, rank=rank, world=world))
    assert set(model.lookups(asked)) < set(model.tables)
    train = Train(
        epochs=2, batch_size=16, lr=0.01, patience=0, valid_users=0, device="cpu", threads=1, warmup_steps=4
    )
    result = fit(model, data, train, rank=rank, world=world)
    return torch.tensor([epoch.loss for epoch in result.position.history])


def _rank_of_two_tower(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    save_file({"losses": _two_tower(rank, 2)}, f"{folder}/losses{rank}.safetensors")
    _average(rank)
    dist.barrier()
    dist.destroy_process_group()


def _average(rank: int) -> None:
    """Of three weights both ranks have a gradient of one, rank 1 alone of another, nobody of the last."""
    both, single, nobody = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    both.grad = torch.full((2,), 1.0 + rank)
    if rank == 1:
        single.grad = torch.full((2,), 4.0)
    loss = Ranks(rank, 2).average([both, single, nobody], torch.tensor(2.0 + rank), 1)
    assert loss == 2.5
    assert torch.equal(both.grad, torch.full((2,), 1.5))
    assert single.grad is not None
    assert torch.equal(single.grad, torch.full((2,), 2.0))
    assert nobody.grad is None


@pytest.mark.timeout(60)
def test_tables_that_lookups_do_not_name_are_read_at_two_ranks_as_at_one(tmp_path: Path) -> None:
    mp.spawn(_rank_of_two_tower, (str(tmp_path),), nprocs=2)
    alone = _two_tower(0, 1)
    for rank in range(2):
        found = load_file(tmp_path / f"losses{rank}.safetensors")["losses"]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=0)


def test_what_no_batch_of_a_step_touched_has_no_gradient() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    used.grad = torch.full((2,), 3.0)
    assert Ranks().average([used, unused], torch.tensor(4.0), 2) == 2
    assert torch.equal(used.grad, torch.full((2,), 1.5))
    assert unused.grad is None


def test_one_rank_needs_no_process_group() -> None:
    assert Ranks().total([1.0, 2.0], torch.device("cpu")) == [1.0, 2.0]

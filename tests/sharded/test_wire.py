"""Shared memory gives what the process group gives, for any sizes; a neighbour that died is noticed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from recray.training import wire as wire_module
from recray.training.wire import AloneWire, GroupWire, SharedWire, make_wire

RANKS = 3


def _meet(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)


def _exchange(rank: int, folder: str) -> None:
    _meet(rank, RANKS, folder)
    shared, group = make_wire(torch.device("cpu")), GroupWire(torch.device("cpu"))
    assert isinstance(shared, SharedWire)
    draw = torch.Generator().manual_seed(rank)
    for turn in range(60):
        splits = torch.randint(0, 20_000 if turn % 20 == 19 else 9, (RANKS,), generator=draw).tolist()
        if turn % 3 == 0:
            splits[turn % RANKS] = 0
        send = torch.randn(sum(splits), 4, generator=draw)
        rows = send if turn % 2 else (send * 100).long()[:, 0]
        found, counts = shared.exchange(rows, splits)
        want, same = group.exchange(rows, splits)
        assert counts == same
        assert torch.equal(found, want)
        halves, _ = shared.exchange(send, splits, counts, torch.bfloat16)
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        whole, _ = group.exchange(send, splits, counts)
        assert torch.equal(halves[own], whole[own]), "what stays on a rank is not rounded"
        torch.testing.assert_close(halves, whole, rtol=1 / 128, atol=0)
    every, lengths = shared.gather(torch.full((rank + 1, 2), float(rank)))
    assert lengths == [1, 2, 3]
    assert every[:, 0].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 2.0]
    dist.barrier()
    dist.destroy_process_group()


def test_shared_memory_and_sockets_say_the_same(tmp_path: Path) -> None:
    mp.spawn(_exchange, (str(tmp_path),), nprocs=RANKS)


def _killed(rank: int, folder: str) -> None:
    _meet(rank, 2, folder)
    wire_module._SPINS, wire_module._LOOKS = 10, 64
    shared = make_wire(torch.device("cpu"))
    shared.gather(torch.zeros(1))
    read = Path(folder, "read")
    if rank == 1:
        while not read.exists():  # what a rank has said goes with it
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    read.touch()
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        shared.gather(torch.zeros(1))
    Path(folder, "noticed").touch()


def test_a_neighbour_that_died_is_noticed(tmp_path: Path) -> None:
    started = mp.spawn(_killed, (str(tmp_path),), nprocs=2, join=False)
    for process in started.processes:
        process.join(120)
    assert (tmp_path / "noticed").exists()
    assert started.processes[1].exitcode == -signal.SIGKILL


def test_one_rank_keeps_what_it_sends() -> None:
    rows = torch.arange(6.0).view(3, 2)
    found, counts = AloneWire().exchange(rows, [3])
    assert found is rows
    assert counts == [3]
    assert torch.equal(AloneWire().gather(rows)[0], rows)
    assert isinstance(make_wire(torch.device("cpu")), AloneWire)

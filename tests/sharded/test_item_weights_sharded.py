"""Item-to-item weights that two ranks make together are those of one, bit by bit."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from recray.models import build_model
from recray.models.base import Catalogue
from recray.training.wire import Wire, make_wire
from tests.models_data import ring

CASES = {
    "item-knn": {"neighbours": 5},
    "spectral": {"dim": 4, "neighbours": 6},
}


def _fit(name: str, wire: Wire | None, out: Path) -> None:
    model = build_model(name, Catalogue(23, {}), CASES[name])
    model.fit(ring(), seed=3, ranks=wire)  # type: ignore[call-arg]
    save_file(model.state_dict(), out)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for name in CASES:
        _fit(name, make_wire(torch.device("cpu")), Path(folder) / f"{name}{rank}.safetensors")
    dist.destroy_process_group()


def test_ranks_together_equal_one(tmp_path: Path) -> None:
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    torch.set_num_threads(1)
    for name in CASES:
        _fit(name, None, tmp_path / "plain.safetensors")
        plain = load_file(tmp_path / "plain.safetensors")
        for rank in range(2):
            found = load_file(tmp_path / f"{name}{rank}.safetensors")
            assert all(torch.equal(found[key], value) for key, value in plain.items())

"""iALS on two and three ranks gives the model of one, and each rank reads its own users only."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from recray.data.sequences import Histories
from recray.models import build_model
from recray.models.base import Catalogue
from recray.models.ials_descent import transposed
from recray.training.wire import Wire, make_wire

USERS, ITEMS = 50, 31
OPTIONS = {"dim": 6, "sweeps": 6, "reg": 0.02, "weighted": True}


@dataclass
class Log:
    """A dataset's reading surface; remembers which parts were asked for."""

    n_users: int = USERS
    n_items: int = ITEMS
    read: list[list[int] | None] = field(default_factory=list)

    def histories(self, split: str = "train", part: tuple[int, int] | None = None) -> Histories:
        assert split == "train"
        self.read.append(None if part is None else list(part))
        i, n = part or (0, 1)
        return _whole().take(slice(USERS * i // n, USERS * (i + 1) // n))


def _whole() -> Histories:
    """Popular items first, as rows are numbered; users 3 and 40 have none, item 30 nobody."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 12, USERS)
    lengths[[3, 40]] = 0
    rows = [np.minimum(rng.geometric(0.12, n) - 1, ITEMS - 2) for n in lengths]
    made = Histories.of(rows)
    weights = rng.uniform(0, 3, len(made.items)).astype(np.float32)
    return Histories(made.items, made.offsets, weights)


def _fit(log: Log, wire: Wire | None, out: Path) -> None:
    model = build_model("ials", Catalogue(ITEMS, {}), OPTIONS)
    measured = model.fit(log, seed=3, ranks=wire)  # type: ignore[call-arg, arg-type]
    save_file({**model.state_dict(), "pairs": torch.tensor(measured["pairs"])}, out)


def _rank(rank: int, world: int, folder: str) -> None:
    """In a process of its own: the fit, and what of the items' columns came here."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    wire, log = make_wire(torch.device("cpu")), Log()
    _fit(log, wire, Path(folder) / f"rank{rank}.safetensors")
    mine = log.histories("train", (rank, world)).to_csr(ITEMS, weighted=True)
    by_item, first, last = transposed(mine, OPTIONS["dim"], wire)
    columns = _whole().to_csr(ITEMS, weighted=True).T.tocsr()[first:last]
    here = {
        "read": log.read[0],
        "items": [first, last],
        "work": int(by_item.nnz),
        "same": bool((abs(by_item - columns) > 0).nnz == 0 and by_item.has_sorted_indices),
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(here))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_equal_one(world: int, tmp_path: Path) -> None:
    mp.spawn(_rank, (world, str(tmp_path)), nprocs=world)
    _fit(Log(), None, tmp_path / "plain.safetensors")
    plain = load_file(tmp_path / "plain.safetensors")
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in range(world)]
    for found in ranks:
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(found[name], ranks[0][name])
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(world)]
    assert [rank["read"] for rank in told] == [[rank, world] for rank in range(world)]
    assert all(rank["same"] for rank in told)
    assert [rank["items"][0] for rank in told] == [0, *(rank["items"][1] for rank in told[:-1])]
    assert told[-1]["items"][1] == ITEMS
    most = max(rank["work"] for rank in told)
    assert most < 1.5 * sum(rank["work"] for rank in told) / world  # the popular are not all rank 0's

"""Sharded = plain: at 1, 2 and 3 ranks every model with tables takes the steps of a plain reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from recray.data.sequences import Histories
from recray.errors import InputError
from recray.models import MODELS, build_model, model_class
from recray.models.base import Catalogue, Model
from recray.models.embeddings import DenseTable
from recray.training.common import CommonTable
from recray.training.parallel import Ranks
from recray.training.row_update import RowOptimizer
from recray.training.tables import make_table, shard, unshard
from recray.training.wire import AloneWire, GroupWire, SharedWire, Wire, make_wire

N_ITEMS, STEPS, LR = 101, 100, 0.002
DENSE_LR = 0.1  # plain descent: Adam makes whole steps of the rounding noise where a gradient is zero
SASREC = {"dim": 8, "blocks": 1, "heads": 1, "max_len": 6, "dropout": 0.0}
SAMPLED = {**SASREC, "loss": "sampled", "negatives": 20}
SEQUENCES = {"dim": 8, "max_len": 6, "dropout": 0.0}
DRAWN = {**SEQUENCES, "loss": "sampled", "negatives": 20, "sampling": "in-batch", "uniform_share": 0.3}
NEUMF = {"dim": 8, "hidden": (8, 4), "max_len": 6, "dropout": 0.0, "negatives": 16}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "sasrec, full softmax": ("sasrec", SASREC, "adam"),
    "sasrec, popularity": ("sasrec", {**SAMPLED, "sampling": "popularity"}, "adagrad"),
    "sasrec, uniform": ("sasrec", {**SAMPLED, "sampling": "uniform"}, "adam"),
    "sasrec, in batch": ("sasrec", {**SAMPLED, "sampling": "in-batch"}, "sgd"),
    "gru4rec, full softmax": ("gru4rec", {**SEQUENCES, "units": 8}, "adam"),
    "caser, mixed": ("caser", {**DRAWN, "window": 3, "filters": 4, "units": 8}, "adagrad"),
    "mind, full softmax": ("mind", {**SEQUENCES, "max_len": 12, "hardness": 3.0}, "sgd"),
    "two-tower, mixed": ("two-tower", {**DRAWN, "units": 8}, "adam"),
    "two-tower, half": ("two-tower", {**DRAWN, "units": 8, "history": "half"}, "adagrad"),
    "neumf, sampled": ("neumf", NEUMF, "adagrad"),
    "neumf, bpr": ("neumf", {**NEUMF, "loss": "bpr"}, "adam"),
    "neumf, half, l2": ("neumf", {**NEUMF, "history": "half", "pretrain": 1}, "adagrad"),
    "dlrm, sampled": ("dlrm", NEUMF, "adam"),
    "dcn, bce": ("dcn", {**NEUMF, "loss": "bce", "rank": 2}, "sgd"),
}


pytestmark = pytest.mark.timeout(900)  # 1,200 steps of tiny messages: quick unless the cores are busy


class Data:
    """Histories, and what is known of items: what batches and models are made of."""

    n_items = N_ITEMS
    item_features = pa.table(
        {"kind": [f"kind {i % 7}" for i in range(N_ITEMS)], "price": [i**0.5 for i in range(N_ITEMS)]}
    )

    def histories(self, split: str = "train") -> Histories:
        made = np.random.default_rng(3)
        popular = 1 / np.arange(1, N_ITEMS + 1)
        return Histories.of(
            [
                made.choice(N_ITEMS, made.integers(2, 12), p=popular / popular.sum()).tolist()
                for _ in range(60)
            ]
        )


def fresh(case: str) -> Model:
    name, options, _ = CASES[case]
    model = build_model(name, Catalogue(N_ITEMS, {}, {"kind": 8}, 1), options, seed=1)
    model.see(Data())  # type: ignore[arg-type]
    return model


def batches(model: Model, rank: int, world: int) -> Iterator[Any]:
    epoch = 0
    while True:
        epoch += 1
        yield from model.batches(Data(), batch_size=15, epoch=epoch, seed=0, rank=rank, world=world)  # type: ignore[arg-type]


def l2_of(case: str) -> float:
    """The penalty on the rows of its tables."""
    return 0.1 if case.endswith("l2") else 0.0


class Reference:
    """Dense gradients by autograd, rows and optimizer in float64 numpy, one row after another."""

    def __init__(self, model: Model, kind: str, l2: float) -> None:
        self.model, self.kind, self.l2 = model, kind, l2
        self.read: dict[str, set[int]] = {}
        self.state: dict[tuple[str, int], dict[str, Any]] = {}
        for name, table in model.tables.items():
            assert isinstance(table, DenseTable)
            table.register_forward_hook(lambda m, args, out, name=name: self._note(name, args[0]))
        in_tables = {id(p) for p in model.tables.parameters()}
        self.dense = [p for p in model.parameters() if id(p) not in in_tables]
        self.descent = torch.optim.SGD(self.dense, lr=DENSE_LR)

    def _note(self, name: str, rows: Tensor) -> None:
        self.read.setdefault(name, set()).update(rows[rows >= 0].reshape(-1).tolist())

    def step(self, batch: Any) -> float:
        self.read.clear()
        self.model.zero_grad()
        loss = self.model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.descent.step()
        for name, table in self.model.tables.items():
            full = bool(self.l2) or getattr(self.model.config, "loss", "") == "softmax"
            for row in range(table.num_rows) if full else sorted(self.read.get(name, ())):  # type: ignore[arg-type]
                self._row(name, row, table.weight)  # type: ignore[arg-type]
        return float(loss.detach())

    def _row(self, name: str, row: int, weight: Tensor) -> None:
        g = self.l2 * weight[row].detach().double().numpy()
        if weight.grad is not None:  # none where a loss leaves the table out, as one before NeuMF's MLP does
            g = g + weight.grad[row].double().numpy()
        s = self.state.setdefault((name, row), {"s": 0.0, "m": np.zeros_like(g), "v": 0.0, "t": 0})
        if self.kind == "sgd":
            change = g
        elif self.kind == "adagrad":
            s["s"] += np.mean(g**2)
            change = g / (np.sqrt(s["s"]) + 1e-8)
        else:
            s["t"] += 1
            s["m"] = 0.9 * s["m"] + 0.1 * g
            s["v"] = 0.999 * s["v"] + 0.001 * np.mean(g**2)
            change = s["m"] / (1 - 0.9 ** s["t"]) / (np.sqrt(s["v"] / (1 - 0.999 ** s["t"])) + 1e-8)
        weight.data[row] -= torch.from_numpy(LR * change).float()


def train(case: str, ranks: Ranks, wire: Wire, ahead: bool) -> dict[str, Tensor]:
    """100 steps of a sharded model: its weights with the tables whole again, and its losses."""
    model = fresh(case)
    tables = shard(model, wire, RowOptimizer(CASES[case][2], l2=l2_of(case)))  # type: ignore[arg-type]
    in_place = isinstance(wire, SharedWire)
    assert all(isinstance(table, CommonTable) is in_place for table in tables.values())
    dense = list(model.parameters())
    descent = torch.optim.SGD(dense, lr=DENSE_LR)
    losses = []
    for number, batch in zip(range(STEPS), batches(model, ranks.rank, ranks.size)):
        descent.zero_grad()
        for name, rows in model.lookups(batch).items() if ahead else ():
            tables[name].take(tables[name].route(rows))
        loss = model.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(ranks.average(dense, loss.detach(), 1))
        descent.step()
        for table in tables.values():
            table.step(LR, number=number)
    unshard(model)
    return {**model.state_dict(), "losses": torch.stack(losses)}


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    ranks, shared = Ranks(rank, world), make_wire(torch.device("cpu"))
    assert isinstance(shared, SharedWire)
    for number, case in enumerate(CASES):
        wire = GroupWire(torch.device("cpu")) if number == 2 else shared
        save_file(
            train(case, ranks, wire, ahead=number % 3 > 0), f"{folder}/{case}-{world}-{rank}.safetensors"
        )
    table = make_table(DenseTable(N_ITEMS, 4), "item", shared, RowOptimizer())
    asked = torch.tensor([N_ITEMS + 7 if rank == 1 else 0])
    with pytest.raises(InputError, match="rank 1 asks for row 108 of 101"):
        table(asked)
    dist.barrier()
    dist.destroy_process_group()


def _few_rows(rank: int, world: int, folder: str) -> None:
    """Of 4 rows over 3 ranks the last owns none; its positions are scored all the same."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/few", rank=rank, world_size=world)
    states = torch.randn(world, 5, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    plain, targets = DenseTable(4, 8), torch.arange(5) % 4
    plain.weight.data.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(2)))
    table = make_table(plain, "item", make_wire(torch.device("cpu")), RowOptimizer("sgd"))
    assert (table.start == table.stop) is (rank == 2)
    table.full_softmax(states[rank], targets).backward()  # type: ignore[no-untyped-call]
    table.step(1.0)
    found = states.grad
    assert found is not None
    found, states.grad = found[rank], None
    losses = sum(plain.full_softmax(each, targets) for each in states)
    losses.backward()  # type: ignore[union-attr]
    assert states.grad is not None
    torch.testing.assert_close(found, states.grad[rank])
    assert plain.weight.grad is not None
    stepped = (plain.weight - plain.weight.grad / world).detach()
    torch.testing.assert_close(table.dense().detach(), stepped)
    dist.barrier()
    dist.destroy_process_group()


def test_a_full_softmax_over_fewer_rows_than_every_rank_needs_one_of(tmp_path: Path) -> None:
    mp.spawn(_few_rows, (3, str(tmp_path)), nprocs=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 1, 2 and 3 ranks made of every case."""
    folder = tmp_path_factory.mktemp("sharded")
    for case in CASES:
        save_file(train(case, Ranks(), AloneWire(), ahead=True), f"{folder}/{case}-1-0.safetensors")
    for world in (2, 3):
        mp.spawn(_rank, (world, str(folder)), nprocs=world)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_sharded_equals_plain(case: str, trained: Path) -> None:
    plain = fresh(case)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    reference = Reference(plain, CASES[case][2], l2_of(case))
    losses = torch.tensor([reference.step(b) for _, b in zip(range(STEPS), batches(plain, 0, 1))])
    want = {**plain.state_dict(), "losses": losses}
    moved = [name for name in start if not torch.equal(want[name], start[name])]
    assert any(name.startswith("tables.") for name in moved)
    for world in (1, 2, 3):
        for rank in range(world):
            found = load_file(trained / f"{case}-{world}-{rank}.safetensors")
            assert set(found) == set(want)
            for name, value in want.items():
                near = (found[name] - value).abs().max() / value.abs().max().clamp(min=1e-30)
                # a dense bias that stays near zero has little to be relative to
                assert near < (1e-4 if name.startswith("network") else 1e-5), (
                    f"{name} at {world} ranks is off by {near:.1e} of its largest value"
                )


def test_every_model_with_a_table_and_a_gradient_is_among_the_cases() -> None:
    trained_by_steps = {name for name in MODELS if model_class(name).gradient}
    assert trained_by_steps == {name for name, _, _ in CASES.values()}

"""The loop: batches -> lookups -> loss -> gradients -> one step. Plain torch, no Ray.

Tables are sharded and step row by row (`sharding.py`); all else is averaged over the ranks and steps
by AdamW.

The world comes in as two numbers, the outside as one callable that takes each epoch's report and
state. A run that is resumed from a state has the losses of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from recray import progress
from recray.data.feed import Prefetched
from recray.errors import ConfigError, InputError, RecrayError
from recray.evaluation import TopK, evaluate, model_top_k
from recray.models.base import Model
from recray.recipes import Train
from recray.training.adversarial import perturbed
from recray.training.checkpoint import (
    EpochReport,
    Position,
    State,
    TableRows,
    open_state,
    read_optimizer,
    write_optimizer,
)
from recray.training.heap import keep_freed_memory
from recray.training.parallel import Ranks
from recray.training.routing import Route
from recray.training.row_update import RowOptimizer
from recray.training.tables import gathered, shard
from recray.training.wire import make_wire

if TYPE_CHECKING:
    from recray.data.dataset import Cases, Dataset

T = TypeVar("T")
Report = Callable[[EpochReport | None, State], None]  # None: a state in the middle of an epoch
Identity = Mapping[str, str]

_LONGEST = 10_000  # items of a list that is measured after an epoch
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class TrainingError(RecrayError):
    """Training cannot go on: the loss is not a number any more."""


@dataclass(frozen=True)
class FitResult:
    """The end of a fit; the model then holds the last weights, its tables spread over the ranks."""

    position: Position
    seconds: float


def fit(
    model: Model,
    data: Dataset,
    train: Train,
    *,
    rank: int = 0,
    world: int = 1,
    report: Report = lambda epoch, state: None,
    resume: Path | None = None,
    identity: Identity = MappingProxyType({}),
    bars: bool = False,
) -> FitResult:
    """Train a model with gradients in place, on this rank's share of the batches.

    `report` is called on every rank after each epoch, and each `train.save_steps` steps within one with None
    for the epoch; the state's tensors are the live ones, to be written before it returns. `resume` is a
    state's folder, of any number of ranks, and `identity` says of which run it must be.
    Raises ConfigError for a device that is not there, InputError for a dataset without batches,
    ArtefactError for a state that cannot be read, TrainingError for a loss that is not finite.
    """
    started = time.perf_counter()
    keep_freed_memory()
    with _threads(train.threads):
        run = _Run(model, data, train, Ranks(rank, world), identity)
        try:
            if resume is not None:
                run.go_on(resume)
            while not run.position.exhausted(train.epochs, train.patience):
                run.epoch(report, bars)
        finally:
            run.lane.shutdown(wait=False, cancel_futures=True)
    model.eval()
    return FitResult(run.position, time.perf_counter() - started)


def pick_device(name: str) -> torch.device:
    """cpu, cuda, or what is there. Raises ConfigError when cuda is asked for and absent."""
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ConfigError("train.device is cuda, and no such device is here", fix="set train.device=auto")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def seed_of(seed: int, epoch: int, rank: int) -> int:
    """One seed for what torch draws in an epoch on a rank (dropout, sampled negatives)."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


class _Run:
    """What lives from one epoch to the next."""

    def __init__(self, model: Model, data: Dataset, train: Train, ranks: Ranks, identity: Identity) -> None:
        self.model, self.data, self.train, self.ranks, self.identity = model, data, train, ranks, identity
        self.device = pick_device(train.device)
        self.cases = _some_cases(data, train)
        self.position = Position(seed=train.seed)
        if self.cases is not None:
            nobody = self.cases.take(np.arange(1))  # an unknown metric is told before any work
            self._metric(lambda cases, k: np.zeros((len(cases), k), np.int64), nobody)
        self.tables = shard(
            model,
            make_wire(self.device),
            RowOptimizer(train.table_optimizer, train.weight_decay, train.table_l2),
            ids_wire=make_wire(self.device),
            dtype=_DTYPES[train.table_dtype],
            wire_dtype=_DTYPES[train.wire],
            device=self.device,
            seed=train.seed,
        )
        model.to(self.device)
        self.dense = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.dense or [torch.zeros(0)], lr=train.lr, weight_decay=train.weight_decay, fused=True
        )
        ranks.same_start(model)
        # one thread of its own: what a batch looks up is told to its owners while the one before is computed
        self.lane = ThreadPoolExecutor(1, thread_name_prefix="lookups")
        self.waited = 0.0

    def go_on(self, folder: Path) -> None:
        """Take up a state. Raises ArtefactError for one that cannot be read or is of another run."""
        saved = open_state(folder, self.identity)
        self.model.load_state_dict(saved.dense())
        write_optimizer(self.optimizer, saved.optimizer())
        for name, table in self.tables.items():
            saved.rows(name, table.start, table.stop, {"weight": table.weight, **table.slots})
        self.position = saved.position

    def state(self) -> State:
        tables = {
            name: TableRows(t.num_rows, t.dim, t.start, t.stop, {"weight": t.weight, **t.slots})
            for name, t in self.tables.items()
        }
        return State(
            self.position,
            self.model.state_dict(),
            read_optimizer(self.optimizer),
            tables,
            self.identity,
            self.ranks.rank,
            lambda word: self.ranks.gather(word, self.device),
        )

    def epoch(self, report: Report, bars: bool) -> None:
        """The rest of an epoch, the validation, and the report."""
        number, first, started = self.position.epoch + 1, self.position.step, time.perf_counter()
        shown = bars and sys.stderr.isatty()
        last = self.position.history[-1].batches if self.position.history else None
        title = f"epoch {number}/{self.train.epochs}"
        with progress.bar(title, last, "batch") if shown else contextlib.nullcontext() as bar:
            self.waited = 0.0
            self._pass(number, report, bar)
            spent = time.perf_counter() - started
            value = self._validate()
            if bar is not None:
                measured = _metric_words(self.train.metric, value)
                bar.set_postfix_str(f"loss {self.position.loss_mean:.4f}{measured}")
        known = self.position.best_value
        done = EpochReport(
            epoch=number,
            loss=self.position.loss_mean,
            metric=self.train.metric,
            value=value,
            best=value is not None and (known is None or value > known),
            seconds=round(time.perf_counter() - started, 3),
            batches=self.position.batch,
            step=self.position.step,
            step_s=round(spent / max(1, self.position.step - first), 6),
            waited=round(self.waited / spent, 4),
        )
        self.position = self.position.after(done)
        report(done, self._sound_state())

    def _pass(self, number: int, report: Report, bar: progress.Bar | None) -> None:
        """All batches of an epoch that are not done yet."""
        train, ranks, skip = self.train, self.ranks, self.position.batch
        torch.manual_seed(seed_of(train.seed, number, ranks.rank))
        self.model.train()
        made = self.model.batches(
            self.data,
            batch_size=train.batch_size,
            epoch=number,
            seed=train.seed,
            rank=ranks.rank,
            world=ranks.size,
            skip=skip,
        )
        due = False  # a state, unless the epoch is over: that has one of its own
        with contextlib.closing(Prefetched(made)) as batches:
            for group in _groups(self._told(batches), train.accumulate):
                if due:
                    report(None, self._sound_state())
                loss = self._step(group)
                batch, step = self.position.batch + len(group), self.position.step + 1
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss or its gradient is {loss} at epoch {number}, batch {batch} (step {step})",
                        fix="lower train.lr or train.clip_norm; the states before are kept",
                    )
                loss_sum = self.position.loss_sum + loss * len(group)
                self.position = dataclasses.replace(self.position, batch=batch, step=step, loss_sum=loss_sum)
                if bar is not None:
                    bar.set_postfix_str(f"loss {self.position.loss_mean:.4f}")
                    bar.update(len(group))
                due = bool(train.save_steps) and step % train.save_steps == 0
            self.waited += batches.waited
        if not self.position.batch:
            raise InputError("has no history long enough to learn from", where=self.data.artefact.place)

    def _told(self, batches: Iterator[Any]) -> Iterator[tuple[Any, dict[str, Future[Route]]]]:
        """Each batch with what it looks up, told to the owners while the batch before is computed."""
        ahead: tuple[Any, dict[str, Future[Route]]] | None = None
        for batch in batches:
            asked = self.model.lookups(batch)
            routes = {name: self._route(name, rows) for name, rows in asked.items()}
            if ahead is not None:
                yield ahead
            ahead = batch, routes
        if ahead is not None:
            yield ahead

    def _route(self, name: str, rows: list[Tensor]) -> Future[Route]:
        """Told in the lane; on a GPU at once, since NCCL wants all messages of a process in one order."""
        if self.device.type == "cpu":
            return self.lane.submit(self.tables[name].route, rows)
        told: Future[Route] = Future()
        told.set_result(self.tables[name].route([each.to(self.device) for each in rows]))
        return told

    def _step(self, group: list[tuple[Any, dict[str, Future[Route]]]]) -> float:
        """One update; the mean loss over all ranks. Where it is not finite nothing is updated."""
        train, model = self.train, self.model
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for batch, routes in group:
            for name, route in routes.items():
                self.tables[name].take(route.result())
            with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
                loss = model.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            if train.adversarial:
                self._against(batch)
            if len(group) > 1:  # a step of one batch alone may change rows in place
                for table in self.tables.values():
                    table.send_back()
            total += loss.detach()
        mean = float(self.ranks.average(self.dense, total, len(group)))
        norm = float(nn.utils.clip_grad_norm_(self.dense, train.clip_norm or math.inf))
        if not math.isfinite(mean + norm):
            for table in self.tables.values():
                table.forget()
            return mean if not math.isfinite(mean) else norm
        step, share = self.position.step + 1, self._rate()
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = train.lr * share
        self.optimizer.step()
        for table in self.tables.values():
            table.step((train.table_lr or train.lr) * share, batches=len(group), number=step)
        return mean

    def _rate(self) -> float:
        """The share of the learning rates that the next step takes."""
        train, position = self.train, self.position
        warm = min(1.0, (position.step + 1) / max(train.warmup_steps, 1))
        if train.schedule == "constant":
            return warm
        return warm * (1 + math.cos(math.pi * position.epoch / train.epochs)) / 2

    def _against(self, batch: Any) -> None:
        """Add the gradients of the batch's loss at perturbed rows, see adversarial.py."""
        train = self.train
        with (
            perturbed(self.tables.values(), train.adversarial),
            torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"),
        ):
            self.model.loss(batch).backward()  # type: ignore[no-untyped-call]

    def _sound_state(self) -> State:
        """The present state. Raises TrainingError, on every rank, where a table holds what is no number."""
        broken = [not t.is_finite() for t in self.tables.values()]
        if self.ranks.total([float(sum(broken))], self.device)[0]:
            raise TrainingError(
                f"a table holds values that are not finite after step {self.position.step}",
                fix="lower train.table_lr or train.lr; the states before are kept",
            )
        return self.state()

    def _validate(self) -> float | None:
        """The mean of the metric over the validation users, each rank asking its share of them."""
        if self.cases is None:
            return None
        share = slice(self.ranks.rank, None, self.ranks.size)
        mine = self.cases.take(np.arange(len(self.cases))[share])
        with gathered(self.model) as model:
            model.eval()
            found = self._metric(model_top_k(model), mine) if len(mine.user_rows) else 0.0  # type: ignore[arg-type]
        total, users = self.ranks.total([found, float(len(mine.user_rows))], self.device)
        return total / users

    def _metric(self, top_k: TopK, cases: Cases) -> float:
        """The sum of the metric over these users."""
        words = self.train.metric.partition("@")[2]
        cutoff = int(words) if words.isdigit() else 0
        values = evaluate(top_k, cases, ks=(cutoff if 0 < cutoff <= _LONGEST else 10,)).values
        if self.train.metric not in values:
            known = ", ".join(sorted(values))
            raise ConfigError(
                f"train.metric {self.train.metric!r} is not measured", fix=f"choose one of {known}"
            )
        return float(np.sum(values[self.train.metric]))


def epoch_words(report: EpochReport, epochs: int) -> str:
    """One line for a person."""
    measured = _metric_words(report.metric, report.value) + (" (best)" if report.best else "")
    return f"epoch {report.epoch}/{epochs}: loss {report.loss:.4f}{measured}, {report.seconds:.1f} s"


def _metric_words(metric: str, value: float | None) -> str:
    return "" if value is None else f", {metric} {value:.4f}"


def _some_cases(data: Dataset, train: Train) -> Cases | None:
    """The validation cases asked after each epoch: all, or a sample that the seed decides."""
    if not train.valid_users or not data.has_split("valid"):
        return None
    cases = data.cases("valid", train.valid_users, train.seed)
    return cases if len(cases) else None


def _groups(batches: Iterator[T], size: int) -> Iterator[list[T]]:
    """`size` at a time; what is left in the end is a smaller group."""
    while group := list(itertools.islice(batches, size)):
        yield group


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run the block with so many torch threads; 0 leaves them as they are."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(min(count, os.cpu_count() or count))
    try:
        yield
    finally:
        torch.set_num_threads(before)

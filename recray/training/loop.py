"""The loop: batches -> loss -> averaged gradients -> AdamW, an epoch at a time. Plain torch, no Ray.

The world comes in as two numbers, the outside as one callable that takes each epoch's report and
state. A run that is resumed from a state has the losses of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from recray import progress
from recray.errors import ConfigError, InputError, RecrayError
from recray.evaluation import evaluate, model_top_k
from recray.models.base import Model
from recray.recipes import Train
from recray.training.checkpoint import (
    EpochReport,
    Position,
    State,
    load_state,
    read_optimizer,
    write_optimizer,
)
from recray.training.parallel import Ranks, split_parameters

if TYPE_CHECKING:
    from recray.data.dataset import Cases, Dataset

Report = Callable[[EpochReport, State], None]


class TrainingError(RecrayError):
    """Training cannot go on: the loss is not a number any more."""


@dataclass(frozen=True)
class FitResult:
    """The end of a fit; the model then holds the best epoch's weights and is in eval mode."""

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
    bars: bool = False,
) -> FitResult:
    """Train a model with gradients in place, on this rank's share of the batches.

    `report` is called after each epoch on every rank. `resume` is a state's folder.
    Raises ConfigError for a device that is not there, InputError for a dataset without batches,
    ArtefactError for a state that cannot be read, TrainingError for a loss that is not finite.
    """
    started = time.perf_counter()
    with _threads(train.threads):
        run = _Run(model, data, train, Ranks(rank, world), resume)
        while not run.position.exhausted(train.epochs, train.patience):
            run.epoch(report, bars)
    model.load_state_dict(run.state().kept)
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

    def __init__(self, model: Model, data: Dataset, train: Train, ranks: Ranks, resume: Path | None) -> None:
        self.model, self.data, self.train, self.ranks = model, data, train, ranks
        self.device = pick_device(train.device)
        self.cases = _some_cases(data, train)
        self.position = Position(seed=train.seed)
        self.best: dict[str, Tensor] | None = None
        self.before: dict[str, Tensor] | None = None  # the weights an epoch began with, if they are the best
        model.to(self.device)
        if self.cases is not None:
            self._metric(self.cases.take(np.arange(1)))  # an unknown metric is told before any work
        tables, dense = split_parameters(model)
        groups = [{"params": part} for part in (tables, dense) if part]
        self.optimizer = torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, fused=True)
        if resume is None:
            ranks.same_start(model)
        else:
            self._go_on(load_state(resume))

    def _go_on(self, state: State) -> None:
        self.model.load_state_dict(state.weights)
        write_optimizer(self.optimizer, state.optimizer)
        self.position = state.position
        if state.best is not None:
            self.best = dict(state.best)

    def state(self) -> State:
        return State(self.position, self.model.state_dict(), read_optimizer(self.optimizer), self.best)

    def epoch(self, report: Report, bars: bool) -> None:
        """One pass over the data, the validation, and the report."""
        number, started = self.position.epoch + 1, time.perf_counter()
        shown = bars and sys.stderr.isatty()
        last = self.position.history[-1].batches if self.position.history else None
        title = f"epoch {number}/{self.train.epochs}"
        with progress.bar(title, last, "batch") if shown else contextlib.nullcontext() as bar:
            loss, steps = self._pass(number, bar)
            value = self._validate()
            if bar is not None:
                bar.set_postfix_str(f"loss {loss:.4f}" + _metric_words(self.train.metric, value))
        known = self.position.best_value
        best = value is not None and (known is None or value > known)
        done = EpochReport(
            epoch=number,
            loss=loss,
            metric=self.train.metric,
            value=value,
            best=best,
            seconds=round(time.perf_counter() - started, 3),
            batches=steps,
        )
        if best:
            self.best = None  # the present weights are the best
        elif self.before is not None:
            self.best = self.before  # the epoch before this one was the best
        self.position = self.position.after(done, self.position.step + steps)
        report(done, self.state())

    def _pass(self, number: int, bar: progress.Bar | None) -> tuple[float, int]:
        """All batches of an epoch: (mean of their losses, number of them)."""
        train, ranks = self.train, self.ranks
        self.before = _copy(self.model) if self.position.best_epoch == number - 1 and number > 1 else None
        torch.manual_seed(seed_of(train.seed, number, ranks.rank))
        self.model.train()
        loss_sum, steps = 0.0, 0
        for batch in self.model.batches(
            self.data,
            batch_size=train.batch_size,
            epoch=number,
            seed=train.seed,
            rank=ranks.rank,
            world=ranks.size,
        ):
            steps += 1
            loss = self._step(batch, self.position.step + steps)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss or its gradient is {loss} at epoch {number}, step {steps}",
                    fix="lower train.lr or train.clip_norm; the epochs before are kept",
                )
            loss_sum += loss
            if bar is not None:
                bar.set_postfix_str(f"loss {loss_sum / steps:.4f}")
                bar.update()
        if not steps:
            raise InputError("has no history long enough to learn from", where=self.data.artefact.place)
        return loss_sum / steps, steps

    def _step(self, batch: Any, step: int) -> float:
        """One update; the loss over all ranks. Where it is not finite nothing is updated."""
        train, model = self.train, self.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            loss = model.loss(batch)
        mean = self.ranks.total([float(loss.detach())], self.device)[0] / self.ranks.size
        if not math.isfinite(mean):
            return mean
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.ranks.average_gradients(model)
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm or math.inf))
        if not math.isfinite(norm):
            return norm
        for group in self.optimizer.param_groups:
            group["lr"] = train.lr * min(1.0, step / max(train.warmup_steps, 1))
        self.optimizer.step()
        return mean

    def _validate(self) -> float | None:
        """The mean of the metric over the validation users, each rank asking its share of them."""
        if self.cases is None:
            return None
        self.model.eval()
        share = slice(self.ranks.rank, None, self.ranks.size)
        mine = self.cases.take(np.arange(len(self.cases))[share])
        found = self._metric(mine) if len(mine.user_rows) else 0.0
        total, users = self.ranks.total([found, float(len(mine.user_rows))], self.device)
        return total / users

    def _metric(self, cases: Cases) -> float:
        """The sum of the metric over these users."""
        cutoff = self.train.metric.partition("@")[2]
        self.model.eval()
        ks = (int(cutoff) if cutoff.isdigit() and int(cutoff) else 10,)
        values = evaluate(model_top_k(self.model), cases, ks=ks).values  # type: ignore[arg-type]
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
    if not data.has_split("valid"):
        return None
    cases = data.cases("valid")
    cases = cases.take(np.flatnonzero(cases.targets.lengths > 0))
    users = len(cases.user_rows)
    if not users:
        return None
    if users <= train.valid_users:
        return cases
    drawn = np.random.default_rng(train.seed).choice(users, train.valid_users, replace=False)
    return cases.take(np.sort(drawn))


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they are now, on the CPU."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


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

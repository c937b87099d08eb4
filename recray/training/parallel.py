"""Several ranks, one model: what is averaged over them, tables apart from the dense rest.

Data-parallel for both today. The two halves are kept apart because they scale differently: dense
weights are small and every rank needs them whole; a table grows with the catalogue and a rank needs
only the rows it reads. Sharding a table changes `_average_tables` and nothing else of the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recray.models.base import Model


@dataclass(frozen=True)
class Ranks:
    """This process among `size`; with size above 1 the default process group must be up."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if self.size > 1 and not dist.is_initialized():
            raise RuntimeError("several ranks need a process group")

    def total(self, values: list[float], device: torch.device) -> list[float]:
        """Sums over the ranks, in float64, the same on every rank."""
        if self.size == 1:
            return values
        on_wire = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(on_wire)
        found: list[float] = on_wire.tolist()
        return found

    def same_start(self, model: Model) -> None:
        """Give every rank the weights of rank 0."""
        if self.size > 1:
            with torch.no_grad():
                for value in model.state_dict().values():
                    dist.broadcast(value, src=0)

    def average_gradients(self, model: Model) -> None:
        """Replace each gradient by its mean over the ranks."""
        if self.size > 1:
            tables, dense = split_parameters(model)
            _average_dense(dense, self.size)
            _average_tables(tables, self.size)


def split_parameters(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters of the tables, all the others), each once, trainable ones only."""
    in_tables = {id(p) for p in model.tables.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [p for p in trained if id(p) in in_tables], [p for p in trained if id(p) not in in_tables]


def _average_dense(parameters: list[nn.Parameter], ranks: int) -> None:
    """One message for all dense gradients: latency, not bandwidth, is what they cost."""
    if not parameters:
        return
    gradients = [_gradient(p) for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= ranks
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _average_tables(parameters: list[nn.Parameter], ranks: int) -> None:
    """A message a table, in place: a second copy of a table may not fit."""
    waiting: list[Any] = [dist.all_reduce(_gradient(p), async_op=True) for p in parameters]
    for parameter, work in zip(parameters, waiting):
        work.wait()
        _gradient(parameter).div_(ranks)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # this rank's share did not touch it, another's may have
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad

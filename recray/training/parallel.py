"""Several ranks, one model: the dense weights are on every rank whole and their gradients averaged.

Tables are spread over the ranks instead (`sharding.py`); they have no parameters here.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def gather(self, word: bytes, device: torch.device) -> list[bytes]:
        """Every rank's word, all of the same length, in order of rank. Nobody goes on before all are here."""
        if self.size == 1:
            return [word]
        mine = torch.frombuffer(bytearray(word or b" "), dtype=torch.uint8).to(device)
        every = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(every, mine)
        return [bytes(part.cpu().numpy()) if word else b"" for part in every]

    def same_start(self, model: Model) -> None:
        """Give every rank the dense weights of rank 0."""
        if self.size > 1:
            with torch.no_grad():
                for value in model.state_dict().values():
                    dist.broadcast(value, src=0)

    def average(self, parameters: list[nn.Parameter], loss: Tensor, batches: int) -> Tensor:
        """Replace each gradient by its mean over the ranks and `batches`; gives the loss's mean.

        What no rank has a gradient of stays without: an optimizer leaves it alone, and does not count a step.
        One message for all of them: latency, not bandwidth, is what they cost.
        """
        if self.size == 1 and batches == 1:
            return loss
        there = loss.new_tensor([p.grad is not None for p in parameters])
        gradients = [_gradient(p) for p in parameters]
        flat = torch.cat([loss.reshape(1), there, *(g.reshape(-1) for g in gradients)])
        if self.size > 1:
            dist.all_reduce(flat)
        flat /= self.size * batches
        start = 1 + len(parameters)
        for parameter, gradient, ranks in zip(parameters, gradients, flat[1:start].tolist()):
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()
            if not ranks:
                parameter.grad = None
        return flat[0]


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:  # this rank's share did not touch it, another's may have
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad

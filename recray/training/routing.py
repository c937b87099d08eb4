"""Which rows a step reads, each once, and whom to ask for them.

Shapes: n looked-up positions, U distinct ones in ascending order, D dims.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from recray.training.wire import Rows

_POSITION_BITS = 32  # a table has fewer rows than 2 ** 32 (layout.LARGEST)


@dataclass(frozen=True, eq=False)
class Distinct:
    """`values[inverse]` are the positions that were given; `order` lists them grouped by value."""

    values: Tensor  # int64[U] ascending
    inverse: Tensor  # int64[n] in [0, U)
    order: Tensor  # int64[n]: places of the first value, of the second ...
    starts: Tensor  # int64[U]: where each value's places start in `order`

    def summed(self, grad_nD: Tensor) -> Tensor:
        """The rows of each value added up, [U, D]: exact under duplicates, always in the same order."""
        return Sums(self, grad_nD).read()


class Sums(Rows):
    """The gradients of distinct rows, each added up when it is asked for; the first `skip` are left out."""

    def __init__(self, found: Distinct, grad_nD: Tensor, skip: int = 0) -> None:
        self.found, self.grad_nD, self.skip = found, grad_nD, skip
        self.shape = torch.Size((len(found.values) - skip, grad_nD.shape[1]))

    def part(self, start: int, stop: int) -> Tensor:
        if start == stop:
            return self.grad_nD.new_zeros((0, self.shape[1]))
        starts = self.found.starts[start + self.skip : stop + self.skip]
        first = int(starts[0])
        last = int(self.found.starts[stop + self.skip]) if stop < self.shape[0] else len(self.found.order)
        # the pooling kernel reads each row once and writes each sum once
        return torch.nn.functional.embedding_bag(
            self.found.order[first:last], self.grad_nD, starts - first, mode="sum"
        )


def distinct(positions_n: Tensor) -> Distinct:
    """Sort and deduplicate int64[n] positions in [0, 2^32)."""
    n = len(positions_n)
    if positions_n.device.type != "cpu" or n >= 1 << (63 - _POSITION_BITS):
        return _distinct(*torch.sort(positions_n, stable=True))
    # numpy sorts one word that holds both several times quicker than torch sorts with an index
    shift = max(n - 1, 1).bit_length()
    words = positions_n.numpy() << shift
    words |= np.arange(n)
    words.sort()
    order = words & ((1 << shift) - 1)
    words >>= shift
    first = np.ones(n, np.bool_)
    np.not_equal(words[1:], words[:-1], out=first[1:])
    starts, inverse = np.flatnonzero(first), np.empty(n, np.int64)
    inverse[order] = np.cumsum(first) - 1
    return Distinct(*map(torch.from_numpy, (words[starts], inverse, order, starts)))


def _distinct(sorted_n: Tensor, order: Tensor) -> Distinct:
    first = torch.ones(len(sorted_n), dtype=torch.bool, device=sorted_n.device)
    torch.ne(sorted_n[1:], sorted_n[:-1], out=first[1:])
    starts = first.nonzero().squeeze(1)
    inverse = torch.empty_like(order)
    inverse[order] = first.cumsum(0) - 1
    return Distinct(sorted_n[starts], inverse, order, starts)


@dataclass(eq=False)
class Route:
    """One exchange: what was asked for, who owns it, and who asks this rank for what."""

    asked: list[Tensor]  # what the model will look up, int64 each, any shape
    found: Distinct  # over all of them, by position; -1 (padding) stands for itself
    padded: bool  # whether found.values[0] is padding
    splits: list[int]  # distinct positions of each owner
    local: Tensor  # int64[m] own rows that this rank (and the others, by rank) asked for
    counts: list[int]  # how many each asked for
    disputed: Tensor | None = None  # int64[d] places among the distinct rows: asked for by others, too
    rows: Tensor | None = None  # float32[U, D] once fetched
    grads: dict[int, Tensor] = field(default_factory=dict)  # number in `asked` -> float32[n, D]

    def places(self, number: int) -> slice:
        """Where the lookups of one entry of `asked` lie among all."""
        start = sum(a.numel() for a in self.asked[:number])
        return slice(start, start + self.asked[number].numel())

    def number_of(self, rows: Tensor) -> int | None:
        """Which entry of `asked` these rows are."""
        for number, known in enumerate(self.asked):
            if known.shape == rows.shape and torch.equal(known, rows):
                return number
        return None

    def summed(self) -> Sums:
        """The gradient of every distinct row that is not padding."""
        like = next(iter(self.grads.values()))
        parts = [
            self.grads[k] if k in self.grads else like.new_zeros((a.numel(), like.shape[1]))
            for k, a in enumerate(self.asked)
        ]
        return Sums(self.found, parts[0] if len(parts) == 1 else torch.cat(parts), int(self.padded))

"""Optimizers of table rows: they touch only the rows that a step read, and keep little state a row.

    sgd       w -= lr g
    adagrad   s += mean(g^2);  w -= lr g / (sqrt(s) + eps)        one number a row (Mudigere et al. 2022,
                                                                  arXiv 2104.05158, row-wise AdaGrad)
    adam      t += 1;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) mean(g^2)
              w -= lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)   v and t one number a row

A row's own count of steps corrects its first moments: with the count of the whole run, a row that
is first seen late would take a first step three times too large. Decoupled weight decay acts on the
rows that are touched. With `l2` every row is stepped on, and l2 * w is part of its gradient: under adam a row
is pulled at the more the less its data do, so that what is rarely seen stays near zero.

Shapes: n local rows, U touched rows, D dims.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 22  # numbers of a table that a step over all rows handles at a time
_MIX, _STEP = 0x9E3779B1, 0x85EBCA6B  # odd numbers without pattern, for the noise of rounding


@dataclass(frozen=True)
class Noise:
    """What the stochastic rounding of a bfloat16 table depends on."""

    step: int = 0  # of the run
    first: int = 0  # position of the rank's first row


_QUIET = Noise()


@dataclass(frozen=True)
class RowOptimizer:
    """One step of an optimizer on some rows of a local table."""

    kind: Literal["adam", "adagrad", "sgd"] = "adam"
    weight_decay: float = 0.0
    l2: float = 0.0  # of `step_all`, which then is to be asked for every step
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def slots(self, dim: int) -> dict[str, tuple[int, ...]]:
        """The shape of each row's state, float32; zeros before the first step."""
        names = {"sgd": (), "adagrad": ("sum",), "adam": ("m", "v", "steps")}[self.kind]
        return {name: (dim,) if name == "m" else () for name in names}

    def step(
        self,
        weight: Tensor,
        slots: dict[str, Tensor],
        touched: Tensor,
        grad_UD: Tensor,
        lr: float,
        noise: Noise = _QUIET,
        scale: float = 1.0,
        rows_UD: Tensor | None = None,
    ) -> None:
        """Update `weight[touched]` in place; touched int64[U] distinct, grad float32[U, D] times `scale`.

        `rows_UD` are those rows as they are, float32, where the caller has them: they are overwritten.
        """
        state = {name: _take(slot, touched) for name, slot in slots.items()}
        rate_U1, direction_UD = self._direction(state, grad_UD, scale)
        rows_UD = _take(weight, touched).float() if rows_UD is None else rows_UD
        if self.weight_decay:
            rows_UD.mul_(1 - lr * self.weight_decay)
        rows_UD.addcmul_(direction_UD, rate_U1, value=-lr)
        _put(weight, touched, rows_UD if weight.dtype == rows_UD.dtype else rounded(rows_UD, touched, noise))
        for name, slot in slots.items():
            _put(slot, touched, state[name])

    def step_all(
        self,
        weight: Tensor,
        slots: dict[str, Tensor],
        grad_nD: Tensor,
        lr: float,
        noise: Noise = _QUIET,
        scale: float = 1.0,
    ) -> None:
        """The same for every row, where a loss reads the whole table."""
        size = max(1, _CHUNK // max(1, weight.shape[1]))
        for start in range(0, len(weight), size):
            part = slice(start, start + size)
            state = {name: slot[part] for name, slot in slots.items()}  # views: updated in place
            rows = weight[part].float() if weight.dtype != torch.float32 else weight[part]
            grad = grad_nD[part].mul(scale).add_(rows, alpha=self.l2) if self.l2 else grad_nD[part]
            rate, direction = self._direction(state, grad, 1.0 if self.l2 else scale)
            if self.weight_decay:
                rows.mul_(1 - lr * self.weight_decay)
            rows.addcmul_(direction, rate, value=-lr)
            if weight.dtype != torch.float32:
                places = torch.arange(start, start + len(rows), device=weight.device)
                weight[part] = rounded(rows, places, noise)

    def _direction(self, state: dict[str, Tensor], grad_UD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(float32[U, 1], float32[U, D]) whose product the rows move against; the state is updated."""
        if self.kind == "sgd":
            return grad_UD.new_full((len(grad_UD), 1), scale), grad_UD
        square_U = torch.linalg.vector_norm(grad_UD, dim=1).square_().mul_(scale**2 / grad_UD.shape[1])
        if self.kind == "adagrad":
            total = state["sum"].add_(square_U)
            return total.sqrt().add_(self.eps).reciprocal_().mul_(scale).unsqueeze(1), grad_UD
        b1, b2 = self.betas
        steps = state["steps"].add_(1)
        moment = state["m"].mul_(b1).add_(grad_UD, alpha=(1 - b1) * scale)
        second = state["v"].lerp_(square_U, 1 - b2)
        root = (second / (1 - b2**steps)).sqrt_().add_(self.eps)
        return (root.mul_(1 - b1**steps)).reciprocal_().unsqueeze(1), moment


def rounded(rows_UD: Tensor, places_U: Tensor, noise: Noise) -> Tensor:
    """float32 -> bfloat16 such that the mean of what is rounded away is zero.

    The noise is a row's number plus a column's number modulo 2^16: uniform at each place, the same for
    the same (row, step) however many ranks there are, and nearly free. Fewer bits than an update has
    would otherwise lose every small update (Gupta et al. 2015, arXiv 1502.02551).
    """
    row_U = ((places_U + noise.first) * _MIX + noise.step * _STEP) >> 7
    generator = torch.Generator().manual_seed(noise.step)
    column_D = torch.randint(1 << 16, (rows_UD.shape[1],), generator=generator).to(rows_UD.device)
    words_UD = row_U.to(torch.int32).unsqueeze(1).add(column_D.to(torch.int32)).bitwise_and_(0xFFFF)
    words_UD.add_(rows_UD.view(torch.int32))  # infinities stay what they are, and so do the usual NaNs
    if sys.byteorder == "little":
        return words_UD.view(torch.int16).view(*rows_UD.shape, 2)[..., 1].contiguous().view(torch.bfloat16)
    return (words_UD >> 16).to(torch.int16).view(torch.bfloat16)


def _take(table: Tensor, rows: Tensor) -> Tensor:
    if table.dim() == 2 and table.dtype == torch.float32:
        return torch.nn.functional.embedding(rows, table)  # prefetches, which index_select does not
    if table.dim() == 1 and table.device.type == "cpu":
        return torch.from_numpy(np.take(table.numpy(), rows.numpy(), mode="clip"))
    return table[rows]


def _put(table: Tensor, rows: Tensor, values: Tensor) -> None:
    if table.device.type != "cpu":
        table.index_copy_(0, rows, values)
    else:  # clip: the rows are there, and numpy need not look
        np.put(_words(table), rows.numpy(), _words(values.contiguous()), mode="clip")


def _words(table: Tensor) -> NDArray[Any]:
    """A row as one word, which numpy copies several times quicker than a row of numbers."""
    plain = (table.view(torch.int16) if table.dtype == torch.bfloat16 else table).numpy()
    if plain.ndim == 1 or not plain.size:
        return plain.reshape(-1)
    return plain.view(f"V{plain.shape[1] * plain.itemsize}").reshape(-1)

"""Training for few bits: layers compute with weights as they will be rounded, gradients pass straight.

Of a linear layer with weight W, in blocks of one output channel's inputs (`quantize_weights` has the same):

    step = -w_top / 2^(bits - 1)      w_top the weight of greatest magnitude, so that it is kept exactly
    W'   = clip(round(W / step), -2^(bits - 1), 2^(bits - 1) - 1) * step

The loss is that of W', its gradient moves W (straight-through estimator: Bengio, Leonard & Courville 2013,
arXiv 1308.3432; for whole networks Jacob et al. 2018, arXiv 1712.05877). A few epochs at a small rate on from
a trained network recover what rounding it cost.

Shapes: O outputs, I inputs, G blocks of K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from recray.errors import ConfigError

BITS, BLOCK = 4, 32  # as `quantize_weights` rounds


def rounded(weight_OI: Tensor, bits: int = BITS) -> Tensor:
    """W' of a weight, of its shape."""
    half, inputs = 1 << (bits - 1), weight_OI.shape[1]
    w_OGK = nn.functional.pad(weight_OI, (0, -inputs % BLOCK)).view(
        len(weight_OI), -(-inputs // BLOCK), BLOCK
    )
    top_OG1 = w_OGK.gather(2, w_OGK.abs().argmax(dim=2, keepdim=True))
    step_OG1 = torch.where(top_OG1 == 0, 1.0, -top_OG1 / half)
    made: Tensor = (w_OGK / step_OG1).round().clamp(-half, half - 1) * step_OG1
    return made.flatten(1)[:, :inputs]


@contextmanager
def standing_in(network: nn.Module, change: Callable[[nn.Linear], Tensor]) -> Iterator[None]:
    """Inside, `layer.weight` of every linear layer is what `change` makes of it; the state is not touched."""
    layers = linear(network)
    made = [change(layer) for layer in layers]
    try:
        for layer, weight in zip(layers, made):
            layer.__dict__["weight"] = weight  # found before the parameter of that name, while it is there
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("weight", None)


@contextmanager
def rounding(network: nn.Module, bits: int = BITS) -> Iterator[None]:
    """Inside, `layer.weight` of every linear layer is its W', with W's gradient."""

    def change(layer: nn.Linear) -> Tensor:
        weight = layer.weight
        return weight + (rounded(weight.detach(), bits) - weight.detach())

    with standing_in(network, change):
        yield


def settle(network: nn.Module) -> None:
    """Round the weights of every linear layer for good."""
    with torch.no_grad():
        for layer in linear(network):
            layer.weight.copy_(rounded(layer.weight))


def learn_rounded(model: Any, bits: int = BITS) -> None:
    """Let a model's `loss` be that of its rounded network from here on.

    Raises ConfigError for one without linear layers, or bits that are not 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ConfigError(f"weights cannot be trained for {bits} bits", fix="give 2 to 8")
    if model.network is None or not linear(model.network):
        raise ConfigError(f"{model.name} has no network to round", fix="encode its tables instead")
    plain: Callable[..., Tensor] = model.loss

    def loss(batch: Any) -> Tensor:
        with rounding(model.network, bits):
            return plain(batch)

    model.loss = loss


def linear(network: nn.Module) -> list[nn.Linear]:
    """The linear layers of a network."""
    return [layer for layer in network.modules() if isinstance(layer, nn.Linear)]

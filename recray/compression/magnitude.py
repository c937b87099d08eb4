"""Unstructured pruning: the weights of least magnitude become zero, and a file holds only the others.

Of all linear layers together the smallest share goes (Han, Pool, Tran & Dally 2015, arXiv 1506.02626); a
layer keeps at least one. What is left is trained on with the zeros held. It buys bytes: a weight costs its
four only where it stands, and a bit in any case. It buys no time on a processor; `prune.py` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from recray.compression.rounding import linear, standing_in
from recray.errors import ArtefactError, ConfigError

Masks = Mapping[nn.Linear, Tensor]  # bool of each weight's shape, true where it stays
_KINDS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _KINDS.items()}


def magnitude(network: nn.Module, share: float) -> Masks:
    """Which weights stay when `share` of those of all linear layers go. Raises ConfigError for no share."""
    if not 0 <= share < 1:
        raise ConfigError(f"a share of {share} of the weights cannot go", fix="give 0 or more, and below 1")
    layers = linear(network)
    if not layers:
        raise ConfigError("the network has no linear layers", fix="encode the model's tables instead")
    sizes = [layer.weight.numel() for layer in layers]
    every = torch.cat([layer.weight.detach().abs().flatten() for layer in layers])
    stays = torch.ones(len(every), dtype=torch.bool, device=every.device)
    stays[every.argsort(stable=True)[: math.floor(share * len(every))]] = False
    made, start = {}, 0
    for layer, size in zip(layers, sizes):
        part = stays[start : start + size].clone()
        if size and not part.any():
            part[every[start : start + size].argmax()] = True
        made[layer] = part.view(layer.weight.shape)
        start += size
    return made


def zero(masks: Masks) -> None:
    """Set the weights that do not stay to zero."""
    with torch.no_grad():
        for layer, stays in masks.items():
            layer.weight.masked_fill_(~stays, 0.0)


def learn_masked(model: Any, masks: Masks) -> None:
    """Let a model's `loss` be that of its network with these zeros from here on, and `zero` them.

    They have no gradient, so that an optimizer that begins now leaves them where they are.
    """
    zero(masks)
    plain: Callable[..., Tensor] = model.loss
    there = dict(masks)

    def masked(layer: nn.Linear) -> Tensor:
        if there[layer].device != layer.weight.device:  # the model has moved since
            there[layer] = there[layer].to(layer.weight.device)
        return layer.weight * there[layer]

    def loss(batch: Any) -> Tensor:
        with standing_in(model.network, masked):
            return plain(batch)

    model.loss = loss


def sparse_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of the arrays that `save_sparse` writes, exact; the file adds its header."""
    return sum(array.numel() * array.element_size() for array in _arrays(state)[0].values())


def save_sparse(state: Mapping[str, Tensor], path: Path) -> None:
    """One safetensors file; floats of which a bit each and the others take less are stored so."""
    arrays, shapes = _arrays(state)
    save_file(arrays, path, metadata={"sparse": json.dumps(shapes, sort_keys=True)})


def load_sparse(path: Path) -> dict[str, Tensor]:
    """What `save_sparse` (or safetensors) wrote, to the last bit; anything else raises ArtefactError."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {}).get("sparse", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        made = {}
        for name, about in shapes.items():
            shape, dtype = about["shape"], _KINDS[about["kind"]]
            count = math.prod(shape)
            bits = np.unpackbits(arrays.pop(f"{name}/places").numpy(), count=count, bitorder="little")
            values = arrays.pop(f"{name}/values")
            if int(bits.sum()) != len(values) or values.dtype != dtype:
                raise ValueError(f"{name} has {len(values)} values in {int(bits.sum())} places")
            flat = torch.zeros(count, dtype=dtype)
            flat[torch.from_numpy(bits.astype(bool))] = values
            made[name] = flat.view(shape)
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise ArtefactError(f"is no file of sparse weights ({error})", where=path) from None
    return made | arrays


def _arrays(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is stored, and name -> shape and kind of those that are stored sparsely."""
    arrays, shapes = dict[str, Tensor](), dict[str, Any]()
    for name, tensor in state.items():
        value = tensor.detach().cpu().contiguous()
        if value.dtype in _NAMES:
            flat = value.flatten()
            stands = (flat != 0) | torch.signbit(flat)  # minus zero is a value of its own
            places = np.packbits(stands.numpy(), bitorder="little")
            if len(places) + int(stands.sum()) * flat.element_size() < len(flat) * flat.element_size():
                arrays[f"{name}/places"] = torch.from_numpy(places)
                arrays[f"{name}/values"] = flat[stands]
                shapes[name] = {"shape": list(value.shape), "kind": _NAMES[value.dtype]}
                continue
        arrays[name] = value
    return arrays, shapes

"""Which parts of a model's network can be left out, and which numbers of it go with them.

A unit is a head, a neuron, a hidden unit or one of a low rank: it is written into a vector that one layer
reads, so without it that layer has a column less and what wrote it a row less. What is called a size here
is the option of the model's `Config` that counts the units: "heads", "ffn_width", "rank", "hidden.0".

Shapes: U units of a group, T floats of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from recray.errors import ConfigError
from recray.models.base import Model


@dataclass(frozen=True)
class Cut:
    """Where a group's units lie in a tensor: along `axis`, from `start` on."""

    tensor: str  # its name in the state
    axis: int
    start: int = 0


@dataclass(frozen=True)
class Group:
    """U units of T floats each. All groups of one `size` keep equally many."""

    size: str
    count: int
    reader: str  # the linear layer that has them, side by side, in its input from `start` on
    cuts: tuple[Cut, ...]
    width: int = 1  # T
    start: int = 0


def groups(model: Model) -> list[Group]:
    """The groups of a model's network. Raises ConfigError for a model of which none are known."""
    if model.name not in _KNOWN:
        raise ConfigError(
            f"it is not known which parts of {model.name} can be left out",
            fix=f"prune one of {', '.join(_KNOWN)}",
        )
    return _KNOWN[model.name](model)


def sizes(model: Model) -> dict[str, int]:
    """How many units a group of each size has; of sequences' encoders also "blocks" and "dim"."""
    found = {group.size: group.count for group in groups(model)}
    if hasattr(model.network, "blocks"):
        found |= {"blocks": len(model.network.blocks), "dim": model.config.dim}  # type: ignore[arg-type,union-attr,attr-defined]
    return found


def _sasrec(model: Any) -> list[Group]:
    made = []
    for i, block in enumerate(model.network.blocks):
        name = f"network.blocks.{i}"
        inner, into = block.out.in_features, ["up"] + ["gate"] * (block.gate is not None)
        heads = [Cut(f"{name}.qkv.{part}", 0, j * inner) for part in ("weight", "bias") for j in range(3)]
        heads.append(Cut(f"{name}.out.weight", 1))
        made.append(Group("heads", block.heads, f"{name}.out", tuple(heads), block.part))
        neurons = [cut for layer in into for cut in _rows(f"{name}.{layer}")]
        neurons.append(Cut(f"{name}.down.weight", 1))
        made.append(Group("ffn_width", block.down.in_features, f"{name}.down", tuple(neurons)))
    return made


def _neumf(model: Any) -> list[Group]:
    count = len(model.config.hidden)
    first = [Cut("network.from_user.weight", 0), Cut("network.from_user.bias", 0)]
    writers = [[*first, Cut("network.from_item.weight", 0)]]
    writers += [_rows(f"network.layers.{i}") for i in range(count - 1)]
    readers = [*(f"network.layers.{i}" for i in range(count - 1)), "network.out"]
    return _hidden(model, writers, readers)


def _dlrm(model: Any) -> list[Group]:
    count = len(model.config.hidden)
    first = _rows("network.from_pair")
    if model.network.from_user is not None:
        first += _rows("network.from_user")
    places = [f"network.top.{3 * i + 2}" for i in range(count)]  # of three modules a layer, the last
    return _hidden(model, [first, *(_rows(place) for place in places[:-1])], places)


def _dcn(model: Any) -> list[Group]:
    network, count = model.network, len(model.config.hidden)
    places = [f"network.deep.{3 * i}" for i in range(count)]
    beside = network.out.in_features - model.config.hidden[-1]  # what the last layer reads before them
    readers = [*places[1:], "network.out"]
    made = _hidden(model, [_rows(place) for place in places], readers, beside)
    if model.config.rank:
        for i in range(len(network.crosses)):
            name = f"network.crosses.{i}"
            cuts = (Cut(f"{name}.0.weight", 0), Cut(f"{name}.1.weight", 1))
            made.append(Group("rank", model.config.rank, f"{name}.1", cuts))
    return made


_KNOWN: dict[str, Callable[[Any], list[Group]]] = {
    "sasrec": _sasrec,
    "neumf": _neumf,
    "dlrm": _dlrm,
    "dcn": _dcn,
}


def _hidden(model: Any, writers: list[list[Cut]], readers: list[str], beside: int = 0) -> list[Group]:
    """One group a hidden layer; the last reader has `beside` other floats in front of them."""
    made = []
    for i, (wrote, reader) in enumerate(zip(writers, readers)):
        start = beside if reader == readers[-1] else 0
        cuts = (*wrote, Cut(f"{reader}.weight", 1, start))
        made.append(Group(f"hidden.{i}", model.config.hidden[i], reader, cuts, start=start))
    return made


def _rows(layer: str) -> list[Cut]:
    return [Cut(f"{layer}.weight", 0), Cut(f"{layer}.bias", 0)]

"""Structured pruning: a smaller model of the same class, without the units that matter least.

How much a unit matters is measured on batches of training, with a its floats, g = d loss / d a:

    taylor      mean over positions of |sum_t a_t g_t|        what the loss changes by without it, to
                                                              first order
    activation  sqrt(mean of a^2) |W_u|                       what it adds to the layer that reads it, W_u

The first is Molchanov et al. 2017 (arXiv 1611.06440, equation 7) for heads as Michel et al. 2019 (arXiv
1905.10650) have it; of whole blocks a is what the block adds, and of a dimension the residual stream.
Only dense matrices of smaller sizes are left, so what is saved is saved in time as well (`units.py` says
what can go). Of several blocks each keeps its own best, all equally many.

After dimensions were left out the stream is shorter by sqrt(D' / D) everywhere, which norms take away;
what is left out of a norm's mean is not made up for. All else that is pruned had no other use, so that
leaving out what is dead changes nothing. Training on (`train.start`) is what recovers the rest.

Shapes: U units of a group, T floats of one, D dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recray.compression.units import Group, groups, sizes
from recray.errors import ConfigError
from recray.models.base import Model

Measure = Literal["taylor", "activation"]
Importance = Mapping[str, Tensor]  # size -> float32[groups, U]; "blocks" and "dim" have one group


def importance(model: Model, batches: Iterable[Any], *, measure: Measure = "taylor") -> Importance:
    """How much each unit of a trained model matters for the loss of these `batches` of its own.

    The model is left as it was. Raises ConfigError for one without known units, or without a batch.
    """
    asked = groups(model)
    watch = _Watch(model, asked, measure)
    training, learned = model.training, {p: p.requires_grad for p in model.parameters()}
    count = 0
    model.eval()
    try:
        with watch.hooked():
            for parameter in learned:
                parameter.requires_grad_(True)
            for batch in batches:
                with torch.enable_grad():
                    watch.add(model.loss(batch))
                count += 1
    finally:
        model.train(training)
        for parameter, wanted in learned.items():
            parameter.requires_grad_(wanted)
    if not count:
        raise ConfigError("there is no batch to measure importance on")
    return watch.found()


def pruned(model: Model, keep: Mapping[str, int], found: Importance) -> Model:
    """A new model with `keep` units of each size named, those that matter most by `found`; eval mode.

    Raises ConfigError for a size the model does not have, or of which it has fewer.
    """
    have = sizes(model)
    for size, count in keep.items():
        if size not in have:
            raise ConfigError(f"{model.name} has no {size!r} to prune", fix=f"choose from {', '.join(have)}")
        if not 1 <= count <= have[size]:
            raise ConfigError(f"{size} is {count}", fix=f"it must be within 1 and {have[size]}")
    keep = {size: count for size, count in keep.items() if count < have[size]}
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    stays = {
        (name, axis): torch.ones(length, dtype=torch.bool)
        for name, tensor in state.items()
        for axis, length in enumerate(tensor.shape)
    }
    for group, row in _numbered(groups(model)):
        if group.size in keep:
            alive = _best(found[group.size][row], keep[group.size]).repeat_interleave(group.width)
            for cut in group.cuts:
                stays[cut.tensor, cut.axis][cut.start : cut.start + len(alive)] &= alive
    if "dim" in keep:
        _narrow(model, state, stays, _best(found["dim"][0], keep["dim"]))
    for (name, axis), alive in stays.items():
        if not alive.all():
            state[name] = state[name].index_select(axis, alive.nonzero()[:, 0])
    if "blocks" in keep:
        state = _fewer(state, _best(found["blocks"][0], keep["blocks"]))
    made = type(model)(model.catalogue, _smaller(model, keep))
    made.load_state_dict(state)
    return made.eval()


def dense_parameters(model: Model) -> int:
    """The parameters of a model that are not in its tables."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tables."))


def _numbered(asked: Iterable[Group]) -> Iterator[tuple[Group, int]]:
    """Each group with its number among those of its size."""
    seen: dict[str, int] = {}
    for group in asked:
        seen[group.size] = seen.get(group.size, -1) + 1
        yield group, seen[group.size]


def _best(found: Tensor, count: int) -> Tensor:
    """bool: the `count` largest; among equal ones the first."""
    kept = torch.zeros(len(found), dtype=torch.bool)
    kept[found.argsort(descending=True, stable=True)[:count]] = True
    return kept


def _smaller(model: Model, keep: Mapping[str, int]) -> Any:
    """The model's options with these sizes, and what followed from one that changed written out."""
    changes: dict[str, Any] = {}
    for size, count in keep.items():
        name, _, place = size.partition(".")
        if place:
            layers = list(changes.get(name, getattr(model.config, name)))
            layers[int(place)] = count
            changes[name] = tuple(layers)
        else:
            changes[name] = count
    if hasattr(model.network, "blocks") and len(model.network.blocks):  # type: ignore[arg-type,union-attr]
        block: Any = model.network.blocks[0]  # type: ignore[index,union-attr]
        changes = {"head_dim": block.part, "ffn_width": block.down.in_features} | changes
    return dataclasses.replace(model.config, **changes)


def _narrow(
    model: Model, state: dict[str, Tensor], stays: Mapping[tuple[str, int], Tensor], alive: Tensor
) -> None:
    """Leave dimensions out of the tables and the residual stream, whose scale follows their number."""
    scale = float(alive.sum() / len(alive)) ** 0.5
    for name in state:
        into = name.rpartition(".")[0].rpartition(".")[2]  # the layer's own name
        if name.startswith("tables.") or name == "network.positions" or into in ("qkv", "up", "gate"):
            if state[name].ndim == 2:
                stays[name, 1][:] &= alive
        else:  # norms, and layers that write to the stream: their first axis is the stream's
            stays[name, 0][:] &= alive
        if into.startswith("let_") and state[name].ndim == 2:
            stays[name, 1][:] &= alive
            state[name] /= scale
        if name == "network.positions" or into in ("out", "down"):
            state[name] *= scale


def _fewer(state: Mapping[str, Tensor], alive: Tensor) -> dict[str, Tensor]:
    """The state with the blocks that stay, numbered anew."""
    numbers = {str(old): str(new) for new, old in enumerate(alive.nonzero()[:, 0].tolist())}
    made = {}
    for name, tensor in state.items():
        words = name.split(".")
        if words[:2] == ["network", "blocks"]:
            if words[2] not in numbers:
                continue
            words[2] = numbers[words[2]]
        made[".".join(words)] = tensor
    return made


class _Watch:
    """Sums up what the units of each group do while losses are worked out."""

    def __init__(self, model: Model, asked: list[Group], measure: Measure) -> None:
        self.measure, self.asked, self.model = measure, asked, model
        self.held: list[tuple[str, int, Group | None, Tensor, Tensor]] = []  # of one loss
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.positions: dict[tuple[str, int], int] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Listen to the model inside the block."""
        handles = []
        for group, row in _numbered(self.asked):
            reader = self.model.get_submodule(group.reader)
            handles.append(reader.register_forward_pre_hook(self._reading(group, row)))
        if hasattr(self.model.network, "blocks"):
            for i, block in enumerate(self.model.network.blocks):  # type: ignore[arg-type,union-attr]
                handles.append(block.register_forward_hook(self._added(i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, loss: Tensor) -> None:
        """Take up what was heard while this loss was worked out."""
        grads: tuple[Tensor | None, ...] = (None,) * len(self.held)
        if self.measure == "taylor":
            grads = torch.autograd.grad(loss, [kept for *_, kept in self.held], allow_unused=True)
        for (size, row, group, value, _), grad in zip(self.held, grads):
            if self.measure == "taylor":
                assert grad is not None
                each = value.detach() * grad
            else:
                each = value.detach() ** 2
            if size == "blocks":
                each = each.sum(-1, keepdim=True)
            elif group is not None:
                each = each[..., group.start : group.start + group.count * group.width]
                each = each.reshape(*each.shape[:-1], group.count, group.width).sum(-1)
            each = each.abs().flatten(0, -2)
            key = size, row
            self.sums[key] = self.sums.get(key, torch.zeros(each.shape[1])) + each.sum(0).cpu()
            self.positions[key] = self.positions.get(key, 0) + len(each)
        self.held.clear()

    def found(self) -> Importance:
        """The means, and of `activation` times what the reading layer makes of a unit."""
        means = {key: total / max(1, self.positions[key]) for key, total in self.sums.items()}
        if self.measure == "activation":
            means = {key: mean.sqrt() for key, mean in means.items()}
            for group, row in _numbered(self.asked):
                weight: Tensor = self.model.get_submodule(group.reader).weight  # type: ignore[assignment]
                units = weight.detach()[:, group.start : group.start + group.count * group.width]
                norms = units.reshape(-1, group.count, group.width).norm(dim=(0, 2))
                means[group.size, row] = means[group.size, row] * norms.cpu()
        rows = {size: [means[key] for key in sorted(means) if key[0] == size] for size, _ in means}
        made = {size: torch.stack(each) for size, each in rows.items()}
        if "blocks" in made:  # a block has one number, the model's dimensions a sum over its blocks
            made["blocks"] = made["blocks"].T.contiguous()
        if "dim" in made:
            made["dim"] = made["dim"].sum(0, keepdim=True)
        return made

    def _reading(self, group: Group, row: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def heard(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            self.held.append((group.size, row, group, given[0], given[0]))

        return heard

    def _added(self, row: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def heard(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            self.held.append(("blocks", row, None, made - module.idle(given[0]), made))  # type: ignore[operator]
            self.held.append(("dim", row, None, made, made))

        return heard

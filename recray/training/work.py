"""What a step of a recipe asks of tables and network: the plan's input, reckoned without training.

An upper estimate where nothing is known of the data: every history fills its window, ids are uniform.
With a dataset the windows are its own and the ids as skewed as they are there.

Shapes: P positions of a step, L of a window, N rows, n lookups.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from recray.data.batches import frequencies
from recray.errors import ConfigError, InputError
from recray.memory import free_memory
from recray.models import build_model, model_class
from recray.models.base import Catalogue
from recray.recipes import Recipe, Train
from recray.training.layout import LARGEST
from recray.training.machine import measured_machine
from recray.training.plan import Machine, TableWork, Work, check_fits, compare, make_plan

if TYPE_CHECKING:
    from recray.data.dataset import Dataset
    from recray.models.base import Model
    from recray.training.checkpoint import Position


def recipe_work(recipe: Recipe, catalogue: Catalogue, *, ranks: int = 1, data: Dataset | None = None) -> Work:
    """A step of this recipe over so many items, as `data` has them. No table is allocated.

    Raises ConfigError for a model without gradients, which is not trained in steps, and InputError for
    one whose dense part alone is larger than the memory.
    """
    if not model_class(recipe.model).gradient:
        raise ConfigError(f"{recipe.model} is fitted in closed form, not in steps", fix="plan another recipe")
    model = _dense_model(recipe, catalogue)
    train, options = recipe.train, model.config
    length = int(getattr(options, "max_len", 1))
    mean, counts = (length, None) if data is None else _log(data, length)
    full, labels = (getattr(options, "loss", "") == word for word in ("softmax", "labels"))
    drawn = not (full or labels)
    if labels:  # an interaction is an example of its own, and the log says what was not taken
        mean = 1
    positions = train.batch_size * mean
    negatives = ranks * min(int(getattr(options, "negatives", 0)), catalogue.n_items) * drawn
    tables = []
    for name, table in model.tables.items():
        of_items = name.startswith("item")
        # read as inputs; an item's also as targets, and as negatives that each rank looks up
        lookups = positions * (2 if name == "item" and drawn else 1) + of_items * negatives
        if labels:
            lookups = positions * _an_example(model, name, length)
        rows = int(table.num_rows)  # type: ignore[arg-type]
        tables.append(
            TableWork(
                name=name,
                rows=rows,
                dim=int(table.dim),  # type: ignore[arg-type]
                lookups=lookups,
                distinct=distinct_share(
                    rows if counts is None or len(counts) != rows else counts, lookups / ranks
                ),
                scored=positions if full and of_items else 0.0,
                penalized=train.table_l2 > 0,
                dtype=train.table_dtype,
                optimizer=train.table_optimizer,
            )
        )
    told = train.batch_size if getattr(options, "history", "") == "half" else positions
    flops, activations, calls = _network(model, positions, told, negatives / ranks)
    return Work(
        tables=tuple(tables),
        dense=_dense(model),
        flops=flops,
        activations=activations,
        calls=calls,
        largest=max(1.0, train.batch_size * length / positions) if positions and not labels else 1.0,
        accumulate=train.accumulate,
        wire=train.wire,
        validated=bool(train.valid_users) and (data is None or data.has_split("valid")),
    )


def _dense_model(recipe: Recipe, catalogue: Catalogue) -> Model:
    try:
        return build_model(recipe.model, catalogue, recipe.options, allocate=False)
    except RuntimeError as error:  # how torch says that there is no memory
        if "allocate" not in str(error):
            raise
        raise InputError(
            "the model without its tables is larger than this machine's memory",
            where=recipe.name,
            fix="lower options.dim or the sizes of its layers",
        ) from None


def dataset_work(recipe: Recipe, data: Dataset, *, ranks: int = 1) -> Work:
    """`recipe_work` over a dataset's items and histories."""
    return recipe_work(recipe, Catalogue.of(data), ranks=ranks, data=data)


def table_work(
    rows: float, dim: int, *, asked: float, train: Train, ranks: int = 1, distinct: float | None = None
) -> Work:
    """A step that asks one bare table for so many ids: for tables and machines that are not here.

    `distinct` is the share of a rank's ids that are distinct; by default that of uniform ids.
    """
    rows = int(max(0, min(LARGEST + 1, rows)))
    table = TableWork(
        name="table",
        rows=rows,
        dim=dim,
        lookups=asked,
        distinct=distinct_share(rows, asked / ranks) if distinct is None else distinct,
        dtype=train.table_dtype,
        optimizer=train.table_optimizer,
    )
    return Work(tables=(table,), accumulate=train.accumulate, wire=train.wire)


def check_room(
    recipe: Recipe, catalogue: Catalogue, device: torch.device, *, ranks: int = 1, here: int = 1
) -> None:
    """Refuse a run that this machine (or its GPU) has no room for, `here` of the `ranks` being on it.

    Raises InputError that says what would fit.
    """
    memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else free_memory() // here
    check_fits(make_plan(recipe_work(recipe, catalogue, ranks=ranks), ranks, Machine(memory=memory)))


def set_beside(recipe: Recipe, data: Dataset, position: Position, *, ranks: int) -> dict[str, Any]:
    """The plan's step time beside the one of the last epoch, for a report; empty where it is not known."""
    if not position.history or not position.history[-1].step_s:
        return {}
    plan = make_plan(dataset_work(recipe, data, ranks=ranks), ranks, measured_machine(shared_by=ranks))
    return compare(plan, position.history[-1].step_s)


def distinct_share(counts: int | NDArray[np.int64], lookups: float) -> float:
    """Expected share of distinct ones among so many ids: of N uniform rows, or drawn as often as counted.

    E[distinct] = sum over rows of 1 - (1 - p)^n.
    """
    if lookups <= 1:
        return 1.0
    if isinstance(counts, int):
        expected = -counts * math.expm1(lookups * math.log1p(-1 / counts)) if counts > 1 else 1.0
    else:
        p = counts[counts > 0] / max(counts.sum(), 1)
        expected = float(-np.expm1(lookups * np.log1p(-np.minimum(p, 1 - 1e-12))).sum())
    return min(1.0, max(expected, 1.0) / lookups)


def _log(data: Dataset, length: int) -> tuple[float, NDArray[np.int64]]:
    """Of the train split: (mean positions of a window of at most `length`, how often each item is there)."""
    histories = data.histories("train")
    targets = np.maximum(histories.lengths - 1, 0)
    windows = int((-(-targets // length)).sum())
    return float(targets.sum() / max(windows, 1)), frequencies(histories.items, data.n_items)


def _an_example(model: Any, name: str, length: int) -> int:
    """Rows of a table that a labelled example looks up: at most, for its history."""
    wide: dict[str, int] = {
        "history": length,
        "context": len(model.columns),
        "value": model.item_rows.shape[1],
    }
    return wide.get(name, 1)


def _dense(model: Model) -> int:
    tables = {id(p) for p in model.tables.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _network(model: Model, positions: float, told: float, negatives: float) -> tuple[float, float, int]:
    """(flops, bytes of activations, calls) of the network's forward and backward pass over P positions.

    told: how many users' states they are told from: as many, or one a window.

    A weight costs 6 flops a position. A transformer's block keeps about 26 floats a position and
    dimension, and attends to half a window; every pair of position and negative is scored.
    """
    options: Any = model.config
    if hasattr(options, "blocks"):
        dim, blocks, length = options.dim, options.blocks, options.max_len
        flops = positions * (6 * _dense(model) + blocks * 6 * length * dim)
        kept = (26 * blocks + 6) * dim + blocks * options.heads * length + 3 * negatives
        return flops + positions * negatives * 6 * dim, 4 * positions * kept, 300 + 500 * blocks
    if hasattr(options, "hidden"):
        hidden = options.hidden
        a_pair = options.dim + sum(a * b for a, b in pairwise(hidden)) + 2 * hidden[-1]
        pairs = positions + told * negatives
        flops = 6 * (told * _dense(model) + pairs * a_pair)
        return flops, 4 * pairs * (2 * sum(hidden) + 4), 1000
    pairs = told * negatives * getattr(options, "interests", 1)
    flops = 6.0 * (positions * _dense(model) + pairs * options.dim)
    return flops, 4.0 * (positions * (_dense(model) ** 0.5 + _of_windows(options)) + 3 * pairs), 300


def _of_windows(options: Any) -> float:
    """Floats a position keeps that weighs each item of its window: half of what a step took (`plan.py`)."""
    if hasattr(options, "interests"):
        a_query = 8 * options.max_len + 16 * options.dim
        return float(options.interests * a_query + 6 * options.max_len) / 2
    if hasattr(options, "pooling") and options.history == "before":
        return float(5 * options.max_len) / 2
    return 0.0

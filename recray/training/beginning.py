"""What a model is before its first step: drawn anew, or made of another checkpoint; with a teacher or not.

`train.start` names a checkpoint. Where its model has the recipe's shape its weights are gone on from; where
it is larger of its kind (more blocks, heads, neurons, dimensions), it is pruned to that shape by what matters
on some batches (`compression/prune.py`), and the training that follows is its recovery. Where the dataset is
the checkpoint's own and newer interactions (`data/extend.py`), rows keep their items and new ones are drawn.

`train.sparse` and `train.bits` let what follows be the recovery of a network that is pruned by magnitude or
will be rounded (`compression/magnitude.py`, `rounding.py`): with `train.start`, or of its first weights.

`train.teacher` names a checkpoint whose answers about the train split are worked out once for all students
and kept in the user's cache, by the hashes of teacher and dataset (`compression/distil.py`).
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from recray import progress
from recray.compression import distil, magnitude, rounding
from recray.compression.prune import importance, pruned
from recray.compression.units import sizes
from recray.errors import ArtefactError, ConfigError, RecrayError
from recray.manifest import Artefact, digest, open_artefact, write_artefact
from recray.models import build_model, model_class
from recray.models.base import Catalogue, Model
from recray.models.saved import load_model, load_state
from recray.recipes import Recipe, Train

if TYPE_CHECKING:
    from recray.data.dataset import Dataset

MEASURED = 32  # batches that importance is measured on


def behind(recipe: Recipe, dataset: Dataset) -> dict[str, Artefact]:
    """The checkpoints that a recipe begins with, by role. Raises where one is none, or of other data."""
    found = {}
    for role in ("start", "teacher"):
        uri = getattr(recipe.train, role)
        if not uri:
            continue
        if not model_class(recipe.model).gradient:
            raise ConfigError(f"train.{role} is given, and {recipe.model} is fitted in closed form")
        found[role] = open_artefact(uri, "checkpoint")
        parent = found[role].manifest.parents.get("dataset", {})
        known = {dataset.artefact.hash}
        if role == "start":  # ids only grow, so a model of what the dataset extends fits it
            known.add(dataset.artefact.manifest.parents.get("dataset", {}).get("hash", ""))
        if parent.get("hash") not in known:
            raise ConfigError(
                "was trained on another dataset", where=uri, fix=f"give a train.{role} of the same"
            )
    return found


def begun(recipe: Recipe, dataset: Dataset) -> Model:
    """The recipe's model as training finds it; its tables have no memory where their rows are to be drawn."""
    parents, train = behind(recipe, dataset), recipe.train
    catalogue, whole = Catalogue.of(dataset), "start" in parents or not model_class(recipe.model).gradient
    model = build_model(recipe.model, catalogue, recipe.options, seed=train.seed, allocate=whole)
    model.see(dataset)
    if "start" in parents:
        _take(model, parents["start"], dataset, train)
    if "teacher" in parents:
        student = distil.check(model, "student")
        taught = distil.Taught.load(
            answers(parents["teacher"], dataset, train.teach_top, train.teach_temperature)
        )
        student.lesson = distil.Lesson(
            taught, train.teach, weight=train.teach_weight, temperature=train.teach_temperature
        )
    if train.sparse:
        if model.network is None:
            raise ConfigError(f"train.sparse is given, and {model.name} has no network")
        magnitude.learn_masked(model, magnitude.magnitude(model.network, train.sparse))
    if train.bits:
        rounding.learn_rounded(model, train.bits)
    return model


def answers(teacher: Artefact, dataset: Dataset, top: int, temperature: float = 1.0) -> Path:
    """The folder of a teacher's answers in the user's cache; worked out where they are not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recray" / "answers"
    how = {"top": top, "temperature": temperature}
    key = digest({"format": 1, "teacher": teacher.hash, "dataset": dataset.artefact.hash, **how})
    goal = cache / key[:24]
    try:
        open_artefact(goal, "answers")
        return goal
    except ArtefactError:
        pass
    model = load_model(teacher)
    distil.check(model, "teacher")
    progress.say(f"asking the teacher {teacher.place} about the train split")

    def fill(folder: Path) -> None:
        distil.teach(model, dataset, folder, top=top, temperature=temperature)

    write_artefact(goal, "answers", fill, parents={"teacher": teacher, "dataset": dataset.artefact})
    return goal


def _take(model: Model, start: Artefact, dataset: Dataset, train: Train) -> None:
    """Fill the model with what matters most of the checkpoint's."""
    source = load_model(start)
    if source.name != model.name:
        raise ConfigError(f"is a {source.name}, and the recipe trains a {model.name}", where=start.place)
    if start.manifest.parents["dataset"]["hash"] != dataset.artefact.hash:
        grow(model, source, where=start.place)
        return
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (source, model)]
    if shapes[0] != shapes[1]:
        want, have = sizes(model), sizes(source)
        keep = {size: count for size, count in want.items() if count != have.get(size)}
        source.see(dataset)
        batches = source.batches(
            dataset, batch_size=train.batch_size, epoch=1, seed=train.seed, rank=0, world=1
        )
        found = importance(source, islice(batches, MEASURED))
        source = pruned(source, keep, found)
        words = ", ".join(f"{size} {have[size]} -> {count}" for size, count in keep.items())
        progress.say(f"pruned {start.place}: {words}")
    try:
        load_state(model, source.state_dict(), where=start.place)
    except RecrayError as error:
        raise ConfigError(
            f"cannot be made the recipe's model ({error})",
            where=start.place,
            fix="write out what follows from another option: options.head_dim, options.ffn_width",
        ) from None


def grow(model: Model, source: Model, *, where: object) -> None:
    """Fill the model's weights with those of one that knows its first items; rows of new items stay as drawn.

    Buffers stay what the model has seen of its own dataset. Raises ConfigError where another size differs.
    """
    old = dict(source.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            found = old.get(name)
            if found is not None and found.shape == value.shape:
                value.copy_(found)
            elif (
                found is not None
                and found.shape[1:] == value.shape[1:]
                and (len(found), len(value)) == (source.n_items, model.n_items)
            ):
                value[: len(found)] = found
            else:
                words = f"cannot be gone on from: {name} has another shape"
                raise ConfigError(words, where=where, fix="train from the start")

"""Recipes: whole configurations as functions. `recray train --recipe NAME --set train.epochs=5`.

A recipe names a model, its options and how it is trained; the resolved recipe travels with the
checkpoint. The options of a model are checked by the model's own `Config` when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from recray import config


@dataclass(frozen=True, kw_only=True)
class Train:
    """How a model with gradients is trained. Models fitted in closed form use only `seed`."""

    epochs: int = 20
    batch_size: int = 128  # sequences (or examples) a step, over all ranks
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 5.0  # of the dense part's gradient; 0 = no clipping
    warmup_steps: int = 100
    patience: int = 3  # epochs without a better validation metric before stopping; 0 = never stop
    metric: str = "ndcg@10"  # measured on the validation split after each epoch
    valid_users: int = 5000  # at most so many users are asked each epoch; 0 = none
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = "auto"
    precision: Literal["f32", "bf16"] = "f32"
    threads: int = 0  # torch threads a worker; 0 = all cores shared by the workers of a machine
    accumulate: int = 1  # batches an update: their mean is one step
    table_optimizer: Literal["adam", "adagrad", "sgd"] = "adam"  # adagrad: 4 bytes of state a row
    table_lr: float = 0.0  # 0 = lr
    table_dtype: Literal["f32", "bf16"] = "f32"  # bf16 rounds stochastically
    wire: Literal["f32", "bf16"] = "f32"  # what rows and their gradients travel in between workers
    save_steps: int = 0  # a state every so many batches, too; 0 = after epochs only
    track: str = ""  # where each epoch's numbers go: tensorboard, mlflow, wandb, or several with commas


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One whole configuration."""

    name: str
    model: str  # a key of recray.models.MODELS
    options: Mapping[str, Any] = field(default_factory=dict)  # the model's own Config
    train: Train = field(default_factory=Train)


def popularity() -> Recipe:
    """Most popular items; the yardstick everything must beat."""
    return Recipe(name="popularity", model="popularity")


def item_knn() -> Recipe:
    """Item neighbours by shrunk cosine."""
    return Recipe(name="item-knn", model="item-knn")


def ials() -> Recipe:
    """Implicit ALS with frequency-scaled regularization (Rendle et al. 2022), d = 64."""
    return Recipe(name="ials", model="ials", options={"dim": 64})


def sasrec() -> Recipe:
    """Self-attentive sequences with full softmax; the default retriever."""
    options = {"dim": 64, "blocks": 2, "max_len": 50, "dropout": 0.2}
    return Recipe(name="sasrec", model="sasrec", options=options, train=Train(epochs=30, batch_size=64))


def neumf() -> Recipe:
    """Neural matrix factorization over the history; the first ranker."""
    training = Train(epochs=15, batch_size=32, lr=5e-3)
    return Recipe(name="neumf", model="neumf", options={"dim": 32, "negatives": 256}, train=training)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "popularity": popularity,
    "item-knn": item_knn,
    "ials": ials,
    "sasrec": sasrec,
    "neumf": neumf,
}


def recipe(name: str, changes: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of that name with `key=value` changes: `train.epochs=5`, `options.dim=128`.

    Raises ConfigError for an unknown name or key, with the nearest one.
    """
    if name not in RECIPES:
        raise config.unknown_name("recipe", name, RECIPES)
    return config.override(RECIPES[name](), changes)

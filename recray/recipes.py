"""Recipes: whole configurations as functions. `recray train --recipe NAME --set train.epochs=5`.

A recipe names a model, its options and how it is trained; the resolved recipe travels with the
checkpoint. The options of a model are checked by the model's own `Config` when it is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from recray import config
from recray.tuned import TUNED


@dataclass(frozen=True, kw_only=True)
class Train:
    """How a model with gradients is trained. Models fitted in closed form use only `seed`."""

    epochs: int = 20
    batch_size: int = 128  # sequences (or examples) a step, over all ranks
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_norm: float = 5.0  # of the dense part's gradient; 0 = no clipping
    warmup_steps: int = 100
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: each epoch slower, the last near nothing
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
    table_l2: float = 0.0  # half of it times the squares of all rows is added to the loss; reads them all
    table_dtype: Literal["f32", "bf16"] = "f32"  # bf16 rounds stochastically
    wire: Literal["f32", "bf16"] = "f32"  # what rows and their gradients travel in between workers
    candidates: int = 100  # of a retriever, that a ranker is trained on and later asked about
    save_steps: int = 0  # a state every so many updates, too; 0 = after epochs only
    adversarial: float = 0.0  # length of a perturbation of embeddings, as a share of a row's; 0 = none
    start: str = ""  # a checkpoint to go on from; of a larger model of the same kind what matters most of it
    teacher: str = ""  # a checkpoint whose answers are learned, too: see compression/distil.py
    teach: Literal["scores", "list", "states"] = "scores"  # what of them
    teach_weight: float = 0.5
    teach_top: int = 32  # items of an answer
    teach_temperature: float = 1.0
    bits: int = 0  # the network learns to be rounded to so many (4: for an onnx-int4 graph); 0 = it does not
    sparse: float = 0.0  # this share of the network's weights, the smallest, becomes zero and stays so
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


def item_ratings() -> Recipe:
    """Item neighbours that predict ratings: adjusted cosine, all similarities above zero kept."""
    options = {"similarity": "adjusted", "neighbours": 1000, "shrink": 100.0}
    return Recipe(name="item-ratings", model="item-knn", options=options)


def user_knn() -> Recipe:
    """User neighbours by shrunk cosine."""
    return Recipe(name="user-knn", model="user-knn")


def user_ratings() -> Recipe:
    """User neighbours that predict ratings: Pearson, from the baseline."""
    options = {"similarity": "pearson", "weighted": True, "centre": "baseline", "neighbours": 40}
    return Recipe(name="user-ratings", model="user-knn", options=options)


def ease() -> Recipe:
    """Linear item-to-item weights in closed form (Steck 2019); memory grows with the items squared."""
    return Recipe(name="ease", model="ease")


def spectral() -> Recipe:
    """A graph filter: item neighbours, a low-pass and a sharpening, served as one sparse product."""
    return Recipe(name="spectral", model="spectral")


def content() -> Recipe:
    """Items like those of the history, by text, categories and numbers."""
    return Recipe(name="content", model="content")


def ials() -> Recipe:
    """Implicit ALS with frequency-scaled regularization (Rendle et al. 2022), d = 64."""
    return Recipe(name="ials", model="ials", options={"dim": 64})


def sasrec() -> Recipe:
    """Self-attentive sequences with full softmax; the default retriever."""
    options = {"dim": 64, "blocks": 2, "max_len": 50, "dropout": 0.2}
    return Recipe(name="sasrec", model="sasrec", options=options, train=Train(epochs=30, batch_size=64))


def esasrec() -> Recipe:
    """SASRec with gates and mixed sampled negatives (after Tikhonovich et al. 2025)."""
    options = {"dim": 64, "blocks": 2, "max_len": 50, "dropout": 0.2, "ffn": "gated", "gates": True}
    options |= {"loss": "sampled", "sampling": "in-batch", "negatives": 512, "uniform_share": 0.5}
    return Recipe(name="esasrec", model="sasrec", options=options, train=Train(epochs=30, batch_size=64))


def gru4rec() -> Recipe:
    """A recurrent network over the history, with full softmax."""
    options = {"dim": 64, "units": 128, "max_len": 50}
    return Recipe(name="gru4rec", model="gru4rec", options=options, train=Train(epochs=30, batch_size=64))


def caser() -> Recipe:
    """Convolutions over the newest items, with full softmax."""
    options = {"dim": 64, "window": 5, "max_len": 50}
    return Recipe(name="caser", model="caser", options=options, train=Train(epochs=30, batch_size=64))


def mind() -> Recipe:
    """Four interests a user by dynamic routing, served as four queries."""
    options = {"dim": 64, "interests": 4, "max_len": 50}
    return Recipe(name="mind", model="mind", options=options, train=Train(epochs=30, batch_size=64))


def two_tower() -> Recipe:
    """A user tower over the history and an item tower over id and features, negatives from the batch."""
    options = {"dim": 64, "history": "before", "negatives": 1024}
    training = Train(epochs=30, batch_size=128, lr=2e-3)
    return Recipe(name="two-tower", model="two-tower", options=options, train=training)


def bpr() -> Recipe:
    """Matrix factorization by pairwise ranking; users are folded in."""
    return Recipe(name="bpr", model="bpr", options={"dim": 64, "epochs": 60, "draws": 4})


def neumf() -> Recipe:
    """Neural matrix factorization over the history; the first ranker."""
    training = Train(epochs=15, batch_size=32, lr=5e-3)
    return Recipe(name="neumf", model="neumf", options={"dim": 32, "negatives": 256}, train=training)


def dlrm() -> Recipe:
    """Dot products of mixed features (Naumov et al. 2019), with an attention over the history."""
    return Recipe(name="dlrm", model="dlrm", train=Train(epochs=15, batch_size=32, lr=5e-3))


def dcn() -> Recipe:
    """Crosses of mixed features (DCN-V2, Wang et al. 2021), with an attention over the history."""
    return Recipe(name="dcn", model="dcn", train=Train(epochs=15, batch_size=32, lr=5e-3))


RECIPES: dict[str, Callable[[], Recipe]] = {
    "popularity": popularity,
    "item-knn": item_knn,
    "item-ratings": item_ratings,
    "user-knn": user_knn,
    "user-ratings": user_ratings,
    "ease": ease,
    "spectral": spectral,
    "content": content,
    "ials": ials,
    "bpr": bpr,
    "two-tower": two_tower,
    "sasrec": sasrec,
    "esasrec": esasrec,
    "gru4rec": gru4rec,
    "caser": caser,
    "mind": mind,
    "neumf": neumf,
    "dlrm": dlrm,
    "dcn": dcn,
}


NAMES = (*RECIPES, *TUNED)


def recipe(name: str, changes: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of that name with `key=value` changes: `train.epochs=5`, `options.dim=128`.

    Raises ConfigError for an unknown name or key, with the nearest one.
    """
    if name in TUNED:
        base, tuned = TUNED[name]
        return replace(recipe(base, (*tuned, *changes)), name=name)
    if name not in RECIPES:
        raise config.unknown_name("recipe", name, NAMES)
    return config.override(RECIPES[name](), changes)

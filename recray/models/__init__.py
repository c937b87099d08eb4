"""Models by name. Adding one: a file beside this, and a line here; the contract tests then run on it."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recray import config

if TYPE_CHECKING:
    from recray.models.base import Catalogue, Model

MODELS = {  # name -> module:class, imported when asked for
    "popularity": "recray.models.popularity:Popularity",
    "item-knn": "recray.models.item_knn:ItemKNN",
    "user-knn": "recray.models.user_knn:UserKNN",
    "ease": "recray.models.linear:EASE",
    "spectral": "recray.models.spectral:Spectral",
    "content": "recray.models.content:ContentBased",
    "ials": "recray.models.ials:IALS",
    "sasrec": "recray.models.sasrec:SASRec",
    "neumf": "recray.models.neumf:NeuMF",
    "dlrm": "recray.models.dlrm:DLRM",
    "dcn": "recray.models.dcn:DCN",
    "gru4rec": "recray.models.gru4rec:GRU4Rec",
    "caser": "recray.models.caser:Caser",
    "mind": "recray.models.mind:MIND",
    "bpr": "recray.models.bpr:BPR",
    "two-tower": "recray.models.two_tower:TwoTower",
}


def model_class(name: str) -> type[Model]:
    """The class of a registered model; an unknown name raises ConfigError naming the nearest."""
    if name not in MODELS:
        raise config.unknown_name("model", name, MODELS)
    module, _, attribute = MODELS[name].partition(":")
    found: type[Model] = getattr(importlib.import_module(module), attribute)
    return found


def build_model(
    name: str, catalogue: Catalogue, options: Mapping[str, Any], *, seed: int = 0, allocate: bool = True
) -> Model:
    """A fresh, untrained model, the same for the same seed; unknown options raise ConfigError.

    With `allocate` false its tables have a shape and no memory.
    """
    from recray.models.base import seeded
    from recray.models.embeddings import unallocated_tables

    cls = model_class(name)
    settings = config.build(cls.Config, options, where="options")
    with seeded(seed), contextlib.nullcontext() if allocate else unallocated_tables():
        return cls(catalogue, settings)

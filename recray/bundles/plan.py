"""What a bundle is built with: the codec of each table, the graph of each network, the index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from recray.compression.codec import CODECS, codec_named
from recray.errors import ConfigError
from recray.models.base import Model, Ranker, Retriever
from recray.retrieval.index import INDEXES, index_params

Codecs = str | Mapping[str, str]
"""A codec for all tables of a model, or table -> codec; a table that is not named stays f32."""
Graph = Literal["eager", "onnx", "onnx-int8", "onnx-static", "onnx-int4"]
GRAPHS: tuple[Graph, ...] = get_args(Graph)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One way to pack a retriever and maybe a ranker. `Plan()` compresses nothing.

    retriever_codec, ranker_codec: how tables are stored (`recray.compression.codec.CODECS`), all alike or
        each its own way.
    encoder_graph, ranker_graph: what runs the networks; onnx-int8 quantizes matrix products with scales that
        follow each request, onnx-static with scales measured beforehand, onnx-int4 their weights alone.
    index, index_params: how item vectors are searched (`recray.retrieval.index.INDEXES`).
    candidates: how many items the retriever gives the ranker.
    blend: the retriever's share in the final score (see `Recommender.rank`), 0 = the ranker's alone.
    filter: what every answer's items must hold besides a request's own filter (see `bundles.filters`).
    """

    retriever_codec: Codecs = "f32"
    ranker_codec: Codecs = "f32"
    encoder_graph: Graph = "eager"
    ranker_graph: Graph = "eager"
    index: str = "exact"
    index_params: Mapping[str, Any] = field(default_factory=dict)
    candidates: int = 200
    blend: float = 0.8
    filter: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for codecs in (self.retriever_codec, self.ranker_codec):
            for codec in _written(codecs):
                codec_named(codec)
        for graph in (self.encoder_graph, self.ranker_graph):
            if graph not in GRAPHS:
                raise ConfigError(f"unknown graph {graph!r}", fix=f"choose one of {', '.join(GRAPHS)}")
        index_params(self.index, self.index_params)
        if self.candidates < 1:
            raise ConfigError(f"candidates is {self.candidates}", fix="it must be at least 1")
        if not 0 <= self.blend <= 1:
            raise ConfigError(f"blend is {self.blend}", fix="it must be within 0 and 1")

    def check(self, retriever: Retriever, ranker: Ranker | None) -> None:
        """Raise ConfigError where this plan asks for what these models do not have."""
        allowed = choices(retriever, ranker)
        for name, values in allowed.items():
            stage = "ranker" if name.startswith("ranker") else "retriever"
            model = ranker if stage == "ranker" else retriever
            given = getattr(self, name)
            asked = {text.partition(":")[0] for text in _written(given)} if "codec" in name else {given}
            known = set() if model is None else set(model.tables.keys())
            if isinstance(given, Mapping) and not set(given) <= known:
                raise ConfigError(
                    f"{name} names tables {', '.join(given)}",
                    fix=f"the {stage} has {', '.join(sorted(known)) or 'none'}",
                )
            if not asked <= set(values):
                whose = f"the {stage} {model.name}" if model is not None else f"no {stage} and it"
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r} but {whose} has nothing it applies to",
                    fix=f"choose {' or '.join(values)}",
                )


def codec_of(codecs: Codecs, table: str) -> str:
    """How one table is stored."""
    return codecs if isinstance(codecs, str) else codecs.get(table, "f32")


def _written(codecs: Codecs) -> tuple[str, ...]:
    return (codecs,) if isinstance(codecs, str) else tuple(codecs.values())


def choices(retriever: Retriever, ranker: Ranker | None) -> dict[str, tuple[str, ...]]:
    """The values of each plan field that mean something for these models; one value = no choice."""
    return {
        "retriever_codec": _codecs(retriever),
        "ranker_codec": _codecs(ranker),
        "encoder_graph": _graphs(retriever),
        "ranker_graph": _graphs(ranker),
        "index": tuple(INDEXES) if retriever.has_vectors else ("exact",),
    }


def _codecs(model: Model | None) -> tuple[str, ...]:
    return tuple(CODECS) if model is not None and len(model.tables) else ("f32",)


def _graphs(model: Model | None) -> tuple[Graph, ...]:
    return GRAPHS if model is not None and model.network is not None else ("eager",)

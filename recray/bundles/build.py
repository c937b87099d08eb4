"""Build a bundle: encode, export, index, and put beside it what a replica must know of the data."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from recray import config
from recray.bundles.bundle import Bundle, item_table, open_bundle
from recray.bundles.filters import Filters
from recray.bundles.plan import Plan
from recray.bundles.stage import read_stage, write_stage
from recray.columns import SPLITS
from recray.compression.askers import SHOWN, Askers
from recray.compression.graph import Inputs
from recray.data.dataset import Dataset
from recray.data.sequences import Histories, append
from recray.errors import ConfigError
from recray.manifest import Artefact, digest, write_artefact
from recray.models.base import Model, Ranker, Retriever
from recray.models.saved import check_items, load_model
from recray.retrieval.index import build_index, index_params
from recray.storage import Place

SAMPLED = 64  # users by whom the range of a network's activations is measured
CANDIDATES = 50  # of each, for a ranker
ASKING = 50_000  # users for whom a table's codes are chosen
_ENCODED = 1024  # of them at a time
_RARE = 20  # so many times the items of a list must there be, or lists hardly tell items apart
_LISTED = 1 << 32  # scores of users for items, of which their lists are made: about a minute


def build(
    out: str | os.PathLike[str] | Place,
    retriever_ckpt: Artefact,
    ranker_ckpt: Artefact | None,
    dataset: Dataset,
    plan: Plan | None = None,
    *,
    pieces: Path | None = None,
    parent: Artefact | None = None,
    told: Mapping[str, Any] | None = None,
) -> Bundle:
    """Write the bundle of these checkpoints by `plan` (default: nothing compressed) and open it.

    pieces: a folder where encoded models and indexes are kept, so that plans which share one make
    it once. parent: the bundle that this one follows; told: what the report says besides. Raises
    ConfigError for models that do not fit the plan, the dataset or each other, InputError for a filter
    that the items' features cannot answer, and GraphError for a network that has no graph.
    """
    plan = plan or Plan()
    retriever, ranker = models_of(retriever_ckpt, ranker_ckpt, dataset)
    plan.check(retriever, ranker)
    Filters(dataset.item_features, dataset.n_items).checked(plan.filter)

    def fill(folder: Path) -> Mapping[str, Any]:
        measured = {"retriever": _retriever(folder, retriever, retriever_ckpt, dataset, plan, pieces)}
        if ranker is not None and ranker_ckpt is not None:
            measured["ranker"] = _ranker(folder, ranker, ranker_ckpt, dataset, plan, pieces)
        _data(folder, dataset)
        sizes = {part: _weight(folder / part) for part in ("retriever", "ranker", "index")}
        return {"bytes": sizes, "model_bytes": sum(sizes.values()), "graphs": measured}

    parents = {"dataset": dataset.artefact, "checkpoint": retriever_ckpt}
    if ranker_ckpt is not None:
        parents["ranker"] = ranker_ckpt
    if parent is not None:
        parents["bundle"] = parent
    names = {"retriever": retriever.name, "ranker": None if ranker is None else ranker.name}
    artefact = write_artefact(
        out,
        "bundle",
        fill,
        parents=parents,
        recipe={"plan": config.as_dict(plan), "models": names},
        report=told,
    )
    return open_bundle(artefact.place)


def known_histories(dataset: Dataset) -> Histories:
    """Everything that is known of each user: training, validation and test, oldest first."""
    made: Histories | None = None
    for split in SPLITS:
        if dataset.has_split(split):
            more = dataset.histories(split)
            made = more if made is None else append(made, more)
    assert made is not None
    return made


def models_of(
    retriever: Artefact, ranker: Artefact | None, dataset: Dataset
) -> tuple[Retriever, Ranker | None]:
    """The models of both checkpoints. Raises ConfigError where they are not that, or of another catalogue."""
    first = _stage_of(retriever, Retriever, "retriever", dataset)
    return first, None if ranker is None else _stage_of(ranker, Ranker, "ranker", dataset)


def _stage_of(checkpoint: Artefact, cls: type[Any], stage: str, dataset: Dataset) -> Any:
    model = load_model(checkpoint)
    if not isinstance(model, cls):
        raise ConfigError(f"{model.name} is not a {stage}", where=checkpoint.place)
    check_items(checkpoint, dataset)
    return model


def _retriever(
    folder: Path,
    retriever: Retriever,
    checkpoint: Artefact,
    dataset: Dataset,
    plan: Plan,
    pieces: Path | None,
) -> Mapping[str, Any]:
    what = {"of": checkpoint.hash, "codec": plan.retriever_codec, "graph": plan.encoder_graph}
    measured = _piece(folder / "retriever", pieces, what, _writer(retriever, dataset, what, pieces))

    def write_index(goal: Path) -> Mapping[str, Any]:
        goal.mkdir()
        if retriever.has_vectors:
            coded = read_stage(folder / "retriever")
            assert isinstance(coded, Retriever)
            build_index(plan.index, item_table(coded), plan.index_params).save(goal)
        return {}

    params = config.as_dict(index_params(plan.index, plan.index_params))
    key = {"of": checkpoint.hash, "codec": plan.retriever_codec, "index": plan.index, "params": params}
    _piece(folder / "index", pieces, key, write_index)
    return measured


def _ranker(
    folder: Path, ranker: Ranker, checkpoint: Artefact, dataset: Dataset, plan: Plan, pieces: Path | None
) -> Mapping[str, Any]:
    what = {"of": checkpoint.hash, "codec": plan.ranker_codec, "graph": plan.ranker_graph}
    return _piece(folder / "ranker", pieces, what, _writer(ranker, dataset, what, pieces))


def _writer(
    model: Model, dataset: Dataset, what: Mapping[str, Any], pieces: Path | None
) -> Callable[[Path], Mapping[str, Any]]:
    exported = None if pieces is None else pieces / f"{what['of'][:24]}.onnx"

    def samples() -> list[Inputs]:
        return sample_inputs(model, dataset)

    def write(goal: Path) -> Mapping[str, Any]:
        wanted = torch.from_numpy(_popularity(dataset))
        return write_stage(
            goal,
            model,
            what["codec"],
            what["graph"],
            weights=wanted,
            askers=lambda: asking(model, dataset),
            exported=exported,
            samples=samples,
        )

    return write


def asking(model: Model, dataset: Dataset, users: int = ASKING) -> Askers | None:
    """Who asks a retriever for which items: some users of the train split, as it encodes them.

    None for a model that has no item vectors, or several vectors a user. What each would be shown counts too,
    unless there are too many items to work that out, or so few that a list holds most of them.
    """
    if not isinstance(model, Retriever) or not model.has_vectors:
        return None
    known = dataset.histories("train")
    there = np.flatnonzero(known.lengths)
    some = known.take(np.sort(np.random.default_rng(0).permutation(there)[:users])).known()
    starts = range(0, len(some), _ENCODED)
    parts = [model.encode(some.take(np.arange(at, min(at + _ENCODED, len(some))))) for at in starts]
    if not parts or parts[0].shape[1] != 1:
        return None
    n = dataset.n_items
    with torch.inference_mode():
        table = model.item_vectors().cpu() if n > _RARE * SHOWN and len(some) * n <= _LISTED else None
    return Askers.of(torch.cat(parts)[:, 0].cpu(), some.offsets, some.items, n, table)


def sample_inputs(model: Any, dataset: Dataset) -> list[Inputs]:
    """What the network eats for some users of the dataset, a user at a time; candidates by popularity.

    The network's own tables are read, before they are encoded.
    """
    known, draw = dataset.histories("train"), np.random.default_rng(0)
    some = known.take(np.sort(draw.permutation(np.flatnonzero(known.lengths))[:SAMPLED]))
    made: list[Inputs] = []
    with torch.no_grad():
        for b in range(len(some)):
            one = some.take([b])
            if isinstance(model, Ranker):
                asked = draw.choice(known.items, (1, CANDIDATES)).astype(np.int64)
                sizes = dataset.context_sizes.items()
                context = {name: draw.integers(0, size, 1).astype(np.int32) for name, size in sizes}
                made.append(model.inputs(one, asked, context))
            else:
                made.append(model.inputs(one))
    return made


def _piece(
    goal: Path, pieces: Path | None, what: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """Let `write` fill the folder `goal`, or copy it from `pieces` where the same was made before."""
    if pieces is None:
        return write(goal)
    kept = pieces / digest({"part": goal.name, **what})[:24]
    if kept.is_dir():
        shutil.copytree(kept / "files", goal)
        found: Mapping[str, Any] = json.loads((kept / "measured.json").read_text())
        return found
    pieces.mkdir(parents=True, exist_ok=True)
    measured = write(goal)
    aside = Path(tempfile.mkdtemp(prefix=".piece.", dir=pieces))
    shutil.copytree(goal, aside / "files")
    (aside / "measured.json").write_text(json.dumps(measured))
    try:
        aside.rename(kept)
    except OSError:  # another process kept the same piece first
        shutil.rmtree(aside)
    return measured


def _data(folder: Path, dataset: Dataset) -> None:
    (folder / "histories").mkdir()
    dataset.items.save(folder / "ids" / "items.parquet")
    dataset.users.save(folder / "ids" / "users.parquet")
    known = known_histories(dataset)
    for name in ("items", "offsets", "weights", "times"):
        array = getattr(known, name)
        if array is not None:
            np.save(folder / "histories" / f"{name}.npy", array, allow_pickle=False)
    if dataset.item_features is not None:
        pq.write_table(dataset.item_features, folder / "items.parquet", compression="zstd")
    context = {column: list(values) for column, values in dataset.context_values.items()}
    (folder / "context.json").write_text(json.dumps(context))
    np.save(folder / "popularity.npy", _popularity(dataset), allow_pickle=False)


def _popularity(dataset: Dataset) -> NDArray[np.float32]:
    """How often each item was taken, float32[N]."""
    counts = np.bincount(dataset.histories("train").items, minlength=dataset.n_items)
    return counts.astype(np.float32)


def _weight(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

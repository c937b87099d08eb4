"""One stage of a bundle on disk: a model with its tables encoded and its network as a graph.

model.json (name, options, catalogue, graph) · tables/<name>.safetensors (encoded) ·
weights.safetensors (everything learned that is neither a table nor in the graph) · network.onnx
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from recray import config
from recray.bundles.plan import Codecs, Graph, codec_of
from recray.compression.askers import Askers
from recray.compression.codec import CodedTable, codec_named, encode_table
from recray.compression.graph import (
    GraphError,
    Inputs,
    OnnxNetwork,
    export_onnx,
    parity,
    quantize_dynamic,
)
from recray.compression.magnitude import load_sparse, save_sparse
from recray.compression.quantize import quantize_static, quantize_weights
from recray.data.sequences import Histories
from recray.errors import ArtefactError
from recray.models import build_model
from recray.models.base import Catalogue, Model, Ranker
from recray.models.embeddings import Table, replace_tables
from recray.models.saved import catalogue_report
from recray.storage import scratch, write_file

NETWORK = "network.onnx"
Samples = Callable[[], Sequence[Inputs]]
ALLOWED = {"onnx": 1e-3, "onnx-int8": 0.5, "onnx-static": 0.5, "onnx-int4": 0.5}
"""The difference from the network's output, as a share of its greatest, above which a graph is broken."""
SIZES = ((2, 3, 5), (3, 4, 7), (1, 1, 1), (7, 9, 2))  # (users, length, candidates) of the examples


def write_stage(
    folder: Path,
    model: Model,
    codec: Codecs,
    graph: Graph,
    *,
    weights: Tensor | None = None,
    askers: Callable[[], Askers | None] | None = None,
    exported: Path | None = None,
    samples: Samples | None = None,
) -> dict[str, float]:
    """Write a model with its tables encoded and its network as asked; the model is left as it was.

    weights: how often each item is wanted, float32[N], for the tables of items.
    askers: gives who asks for them, for a table of items that is coded with `fit`.
    exported: where the network's graph lies or is to be kept, since exporting takes seconds. samples: gives
    what the network eats for real users, where it is wanted; by default random rows.
    Returns what was measured: `parity`, the greatest difference of the graph's output from the
    network's. Raises GraphError when the network has no graph.
    """
    (folder / "tables").mkdir(parents=True)
    for name, table in model.tables.items():
        assert isinstance(table, Table)
        wanted = weights if weights is not None and table.num_rows == len(weights) else None
        how, asking = codec_named(codec_of(codec, name)), None
        if how.fits and wanted is not None and askers is not None:
            asking = askers()
        if asking is not None and asking.dim != table.dim:
            asking = None
        coded = encode_table(how, table.dense(), wanted, asking)
        coded.save(folder / "tables" / f"{name}.safetensors")
    measured: dict[str, float] = {}
    gone = ["tables."]
    if graph != "eager":
        measured["parity"] = write_graph(folder / NETWORK, model, graph, exported=exported, samples=samples)
        gone.append("network.")
    rest = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if not name.startswith(tuple(gone))
    }
    save_sparse(rest, folder / "weights.safetensors")
    about = {
        "model": model.name,
        "options": config.as_dict(model.config),
        "catalogue": catalogue_report(model.catalogue),
        "tables": sorted(model.tables),
        "graph": graph,
    }
    (folder / "model.json").write_text(json.dumps(about, indent=1, sort_keys=True))
    return measured


def write_graph(
    path: Path, model: Model, graph: Graph, *, exported: Path | None = None, samples: Samples | None = None
) -> float:
    """Export a model's network (and quantize it); returns its greatest difference from the network.

    Raises GraphError for a network that has no graph, and for a graph that computes something else.
    """
    assert model.network is not None
    examples = example_inputs(model)
    with scratch() as folder:
        whole = exported or folder / NETWORK
        if not whole.exists():
            export_onnx(model.network, examples[:2], folder / NETWORK)
            if exported is not None:
                write_file(exported, (folder / NETWORK).read_bytes())
        if graph == "onnx":
            shutil.copyfile(whole, path)
        elif graph == "onnx-static":
            quantize_static(whole, path, examples if samples is None else samples())
        elif graph == "onnx-int4":
            quantize_weights(whole, path)
        else:
            quantize_dynamic(whole, path)
    found = parity(model.network, OnnxNetwork(path), examples)
    with torch.inference_mode():
        scale = max(float(model.network(*given).abs().max()) for given in examples)
    if found > ALLOWED[graph] * scale:
        raise GraphError(
            f"the {graph} graph of {model.name} differs by {found:.2g} from outputs of up to {scale:.2g}",
            fix="take another graph for it",
        )
    return found


def example_inputs(model: Any) -> list[Inputs]:
    """What the network eats for histories and candidates of several sizes, from random rows."""
    made: list[Inputs] = []
    draw = np.random.default_rng(0)
    context = {
        name: np.zeros(max(users for users, _, _ in SIZES), np.int32) for name in model.catalogue.context
    }
    with torch.no_grad():
        for users, length, wide in SIZES:
            rows = draw.integers(0, model.n_items, (users, length))
            histories = Histories.of(rows.tolist())
            if isinstance(model, Ranker):
                candidates = draw.integers(0, model.n_items, (users, wide))
                asked = {name: values[:users] for name, values in context.items()}
                made.append(model.inputs(histories, candidates, asked))
            else:
                made.append(model.inputs(histories))
    return made


def read_stage(folder: Path, *, threads: int | None = None) -> Model:
    """The model that `write_stage` wrote, ready to answer. Raises ArtefactError for anything else.

    No float32 table is made: encoded ones take their places before anything is read.
    """
    try:
        about = json.loads((folder / "model.json").read_bytes())
        catalogue = Catalogue(**about["catalogue"])
        tables = {
            name: CodedTable.load(folder / "tables" / f"{name}.safetensors") for name in about["tables"]
        }
        state = load_sparse(folder / "weights.safetensors")

        def make() -> Model:
            return build_model(about["model"], catalogue, about["options"])

        model = _filled(make, tables, state, about["graph"] != "eager")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"is not a stage of a bundle ({error})", where=folder) from None
    if about["graph"] != "eager":
        model.network = OnnxNetwork(folder / NETWORK, threads=threads)
    return model.eval().requires_grad_(False)


def _filled(
    make: Callable[[], Model], tables: dict[str, CodedTable], state: dict[str, Any], graph: bool
) -> Model:
    """Make the model without memory, then give it its arrays. A model that computes constants of its
    own when it is made would have them without values, so that one is made again with memory."""
    with torch.device("meta"):
        model = make()
    for attempt in ("lean", "whole"):
        if attempt == "whole":
            model = make()
        replace_tables(model, dict(tables))
        if graph:
            model.network = nn.Identity()
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
        lost = [name for name in missing if not name.startswith("tables.")]
        if lost or unexpected:
            raise ValueError(f"weights do not fit the model: {', '.join([*lost, *unexpected][:3])}")
        if not _hollow(model):
            break
    return model


def _hollow(model: Model) -> bool:
    """Whether any tensor of the model has no values."""
    held = [*model.parameters(), *model.buffers()]
    loose = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    return any(t.is_meta for t in (*held, *loose))

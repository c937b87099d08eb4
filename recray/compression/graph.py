"""The dense part of a model as an ONNX graph: exported, quantized, run by ONNX Runtime.

A graph takes the tensors that the model's `inputs` gives, with any batch, length and number of
candidates. What cannot be exported raises GraphError; the model itself is never changed.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recray.errors import ArtefactError, RecrayError

QUANTIZED = "recray.quantized"  # key of a graph's metadata
Inputs = tuple[Tensor, ...]
SLOW = ["SkipLayerNormFusion"]  # its kernel takes seven times as long as the norm and the addition it fuses
_FOLDED = 1 << 28  # bytes of a constant that is worked out when the graph is written


class GraphError(RecrayError):
    """A network has no graph: an operator that ONNX lacks, or a shape that does not stay free."""


def export_onnx(network: nn.Module, examples: Sequence[Inputs], path: Path) -> None:
    """Write `network` to `path` as ONNX.

    Give two or more examples of other sizes: a dimension that differs between them stays free, one
    that is the same in all is fixed. Sizes of 1 would be taken as fixed, so examples avoid them.
    Raises GraphError, naming the operator where there is one.
    """
    from onnxscript import optimizer

    free = tuple(
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, sizes in enumerate(zip(*(t.shape for t in tensors)))
            if len(set(sizes)) > 1
        }
        for tensors in zip(*examples)
    )
    network.eval()
    with quiet(), torch.inference_mode(False), torch.no_grad():
        given = tuple(t.clone() for t in examples[0])
        try:
            program = torch.onnx.export(
                network, given, dynamo=True, dynamic_shapes=free, verbose=False, optimize=True
            )
            assert program is not None
            # what is cut out of a weight is a weight of its own: only such are quantized
            optimizer.fold_constants(program.model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
            optimizer.remove_unused_nodes(program.model)
            path.write_bytes(_bare(program.model_proto).SerializeToString(deterministic=True))
        except Exception as error:  # the exporter raises many kinds, all meaning the same here
            raise GraphError(_reason(network, error), fix="use the eager graph for this model") from error


def quantize_dynamic(path: Path, out: Path) -> None:
    """Weights of matrix products to int8 per output channel, activations as they come (ONNX Runtime)."""
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as quantize

    with quiet():
        try:
            graph = onnx.load(str(path))
            del graph.graph.value_info[:]  # shapes of weights that the quantizer is about to transpose
            quantize(graph, str(out), per_channel=True, weight_type=QuantType.QInt8)
            made = onnx.load(str(out))
            onnx.helper.set_model_props(made, {QUANTIZED: "dynamic"})
            onnx.save(made, str(out))
        except Exception as error:
            raise GraphError(f"the graph cannot be quantized ({one_line(error)})", where=path) from error


class OnnxNetwork(nn.Module):
    """A network run by ONNX Runtime on the CPU; takes and gives what the exported network did.

    threads: of one call, by default those of torch in this process. Safe to call from several
    threads. Raises ArtefactError for a graph that cannot be loaded.

    alone: true of a dynamically quantized graph, whose activations are scaled by the range of the
    whole batch: who wants answers that do not depend on their neighbours asks for one user a call.
    """

    def __init__(self, graph: Path | bytes, *, threads: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # without VNNI the product of unsigned by signed bytes saturates at 16 bits and answers wrongly
        options.add_session_config_entry("session.x64quantprecision", "1")
        source = graph if isinstance(graph, bytes) else str(graph)
        try:
            self.session: Any = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW
            )
        except Exception as error:
            where = None if isinstance(graph, bytes) else graph
            raise ArtefactError(f"is not a graph we can run ({one_line(error)})", where=where) from None
        self._names = [given.name for given in self.session.get_inputs()]
        self.alone = self.session.get_modelmeta().custom_metadata_map.get(QUANTIZED) == "dynamic"

    def forward(self, *tensors: Tensor) -> Tensor:
        given = {name: t.detach().numpy() for name, t in zip(self._names, tensors)}
        return torch.from_numpy(self.session.run(None, given)[0])


def parity(network: nn.Module, graph: nn.Module, examples: Sequence[Inputs]) -> float:
    """The greatest absolute difference of the two networks' outputs over the examples.

    Raises GraphError when a shape differs or a value is not finite on one side only.
    """
    worst = 0.0
    network.eval()
    with torch.inference_mode():
        for given in examples:
            try:
                ours, theirs = network(*given).float().numpy(), graph(*given).float().numpy()
            except Exception as error:
                raise GraphError(f"the graph fails on a shape it should take ({one_line(error)})") from error
            if ours.shape != theirs.shape:
                raise GraphError(f"the graph gives shape {theirs.shape}, the network {ours.shape}")
            whole = np.isfinite(ours)
            if not np.array_equal(whole, np.isfinite(theirs)):
                raise GraphError("the graph gives values that are not finite")
            worst = max(worst, float(np.abs(ours[whole] - theirs[whole]).max(initial=0.0)))
    return worst


def _bare(model: Any) -> Any:
    """Without the exporter's notes: they are most of a small file, and name paths of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        if part is not model:
            part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block: the exporters warn and log about themselves; none of it is about the user's model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(network: nn.Module, error: BaseException) -> str:
    """One line with the operator's name, dug out of the exporter's chain of causes."""
    chain: BaseException | None = error
    words = []
    while chain is not None:
        words.append(str(chain))
        chain = chain.__cause__ or chain.__context__
    found = re.search(r"\b(?:aten|prims|torchvision|recray)[.:]+\w+(?:\.\w+)?", " ".join(reversed(words)))
    name = type(network).__name__
    if found:
        return f"{name} cannot be exported to ONNX: operator {found[0]}"
    return f"{name} cannot be exported to ONNX ({one_line(error)})"


def one_line(error: BaseException) -> str:
    """An error of another library in a line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__

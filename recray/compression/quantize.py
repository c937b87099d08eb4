"""A graph in fewer bits: what ONNX Runtime's own dynamic int8 leaves to be had.

`quantize_static` replaces each product with a learned matrix by one in int8. Weights are symmetric, one
scale an output channel; activations asymmetric uint8, one scale a tensor, measured on samples:

    y = s_x s_w (q_x - z_x) q_w + b        q_x = clip(round(x / s_x) + z_x, 0, 255)

The scale is the one of least squared error among some that clip a little (as Banner et al. 2019, arXiv
1810.05723, choose it). It is fixed, so an answer does not depend on who else is in the batch, as it does
where scales follow the batch; one quantized tensor serves all products that read it. What is added after a
product is done in its kernel. Everything else stays in float32, so do products too small to be worth it.

`quantize_weights` rounds weights alone, to int4 in blocks: an eighth of the bytes at float32's speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recray.compression.graph import QUANTIZED, GraphError, Inputs, one_line, quiet
from recray.compression.rounding import BITS, BLOCK

LEAST = 1024  # weights of a product that is worth quantizing
CLIPS = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6)  # shares of the range that are tried
_SAMPLED = 1 << 16  # values of an activation that are kept of each sample
_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class Product:
    """A product of the graph, x @ weight [+ bias]."""

    node: Any
    x: str
    weight: str
    transposed: bool
    bias: str  # "" where there is none
    add: Any  # the node that adds it, where it is one of its own

    @property
    def output(self) -> str:
        found: str = (self.add or self.node).output[0]
        return found


def quantize_static(path: Path, out: Path, samples: Sequence[Inputs]) -> None:
    """Write the graph at `path` in int8, its scales measured on `samples` of what it takes.

    Raises GraphError where it holds no product to quantize, or there are no samples.
    """
    import onnx

    if not samples:
        raise GraphError("there are no samples to measure a graph's range on", where=path)
    with quiet():
        try:
            model = onnx.load(str(path))
            weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
            products = list(_products(model, weights))
            if products:
                ranges = _ranges(model, {product.x for product in products}, samples)
                _rewrite(model, products, weights, ranges)
                onnx.save(model, str(out))
        except Exception as error:
            raise GraphError(f"the graph cannot be quantized ({one_line(error)})", where=path) from error
    if not products:
        raise GraphError("the graph has no product with a learned matrix of any size", where=path)


def quantize_weights(path: Path, out: Path) -> None:
    """Write the graph at `path` with the weights of its MatMuls in BITS, a scale for each BLOCK of inputs of
    an output channel. Raises GraphError for a graph that cannot be."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with quiet():
        try:
            model = onnx.load(str(path))
            made = MatMulNBitsQuantizer(model, bits=BITS, block_size=BLOCK, is_symmetric=True)
            made.process()
            onnx.helper.set_model_props(made.model.model, {QUANTIZED: f"weights-{BITS}"})
            onnx.save(made.model.model, str(out))
        except Exception as error:
            raise GraphError(f"the graph cannot be quantized ({one_line(error)})", where=path) from error


def weight_scales(weight_KN: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8[K, N], scales float32[N]): symmetric, one scale an output channel."""
    scale_N = np.maximum(np.abs(weight_KN).max(axis=0), 1e-12).astype(np.float32) / np.float32(127)
    return np.clip(np.rint(weight_KN / scale_N), -127, 127).astype(np.int8), scale_N


def activation_scale(values: NDArray[np.float32]) -> tuple[np.float32, np.uint8]:
    """(scale, zero point) of uint8 for values like these, of least squared error among `CLIPS`."""
    low, high = min(float(values.min(initial=0.0)), 0.0), max(float(values.max(initial=0.0)), 0.0)
    best: tuple[float, np.float32, np.uint8] | None = None
    for clip in CLIPS:
        scale = np.float32(max((high - low) * clip, 1e-8) / 255)
        zero = np.uint8(np.clip(np.rint(-low * clip / scale), 0, 255))
        q = np.clip(np.rint(values / scale) + zero, 0, 255)
        wrong = float(np.square((q - zero) * scale - values).mean()) if values.size else 0.0
        if best is None or wrong < best[0]:
            best = wrong, scale, zero
    assert best is not None
    return best[1], best[2]


def _products(model: Any, weights: Mapping[str, NDArray[Any]]) -> Iterator[Product]:
    """The products that are worth it, with the addition of a learned vector behind each."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results = {each.name for each in model.graph.output}
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
            continue
        weight, transposed, bias = weights[node.input[1]], False, ""
        if weight.ndim != 2 or weight.size < LEAST:
            continue
        if node.op_type == "Gemm":
            given = {each.name: each.f or each.i for each in node.attribute}
            plain = (
                given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA")
            )
            bias = node.input[2] if len(node.input) > 2 else ""
            if not plain or (bias and (bias not in weights or weights[bias].ndim != 1)):
                continue
            transposed = bool(given.get("transB"))
        add, after = None, readers.get(node.output[0], [])
        if not bias and len(after) == 1 and after[0].op_type == "Add" and node.output[0] not in results:
            other = [name for name in after[0].input if name != node.output[0]]
            columns = weight.shape[0 if transposed else 1]
            if other and other[0] in weights and weights[other[0]].shape == (columns,):
                add, bias = after[0], other[0]
        yield Product(node, node.input[0], node.input[1], transposed, bias, add)


def _ranges(model: Any, names: set[str], samples: Sequence[Inputs]) -> dict[str, tuple[Any, Any]]:
    """The scale and zero point of each of these tensors, over the samples."""
    import onnx
    import onnxruntime

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    given = {each.name for each in watched.graph.input}
    asked = sorted(names - given)
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    draw = np.random.default_rng(0)
    kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for tensors in samples:
        feed = {each.name: t.detach().numpy() for each, t in zip(session.get_inputs(), tensors)}
        found = dict(zip(asked, session.run(asked, feed))) if asked else {}
        for name in names:
            values = (found[name] if name in found else feed[name]).reshape(-1)
            if values.size:
                ends = np.array([values.min(), values.max()], np.float32)  # they are never missed
                some = draw.integers(0, values.size, min(values.size, _SAMPLED))
                kept[name].append(np.concatenate([ends, values[some]]))
    return {name: activation_scale(np.concatenate(parts)) for name, parts in kept.items() if parts}


def _rewrite(
    model: Any,
    products: Sequence[Product],
    weights: Mapping[str, NDArray[Any]],
    ranges: Mapping[str, tuple[Any, Any]],
) -> None:
    """Put int8 products in the places of these, in the graph itself."""
    import onnx

    graph, helper, quantized = model.graph, onnx.helper, dict[str, str]()
    made: dict[int, list[Any]] = {}  # the nodes that stand for one that goes, by its id
    gone = set()

    def keep(name: str, value: Any) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
        return name

    for number, product in enumerate(products):
        if product.x not in ranges:
            continue
        nodes = made.setdefault(id(product.node), [])
        if product.x not in quantized:
            scale, zero = ranges[product.x]
            quantized[product.x] = f"{product.x}_q8"
            parts = [keep(f"{product.x}_scale", scale), keep(f"{product.x}_zero", zero)]
            nodes.append(helper.make_node("QuantizeLinear", [product.x, *parts], [f"{product.x}_q8"]))
        weight = weights[product.weight].astype(np.float32)
        q, scales = weight_scales(np.ascontiguousarray(weight.T if product.transposed else weight))
        inputs = [
            quantized[product.x],
            keep(f"weight_{number}_q8", q),
            f"{product.x}_scale",
            keep(f"weight_{number}_scale", scales),
            f"{product.x}_zero",
            "",  # weights are symmetric
            product.bias,
        ]
        last = helper.make_node(
            "MatMulIntegerToFloat", inputs if product.bias else inputs[:5], [product.output], domain=_CONTRIB
        )
        nodes.append(last)
        gone |= {id(product.node)} | ({id(product.add)} if product.add is not None else set())
    if len({each.domain for each in model.opset_import} & {_CONTRIB}) == 0:
        model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
    order = [new for node in graph.node for new in (made.get(id(node), []) if id(node) in gone else [node])]
    del graph.node[:]
    graph.node.extend(order)
    used = {name for node in graph.node for name in node.input}
    left = [each for each in graph.initializer if each.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)
    del graph.value_info[:]
    helper.set_model_props(model, {QUANTIZED: "static"})

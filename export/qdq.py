"""Put what is quantized of a part into its graph.

One description (model/quantized.py), several engines: ONNX Runtime's own integer kernels, or QuantizeLinear and
DequantizeLinear around float operators, which is what OpenVINO, TensorRT and QNN compile from. Attention stays in
float: an integer softmax and products of two activations are slower than float ones on every engine measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from ..model.model import Part
from ..model.quantized import Activations, Layer, Quantized, Weights
from ..runtime.errors import BadInput, CheckpointError
from .clean import MICROSOFT
from .codes import dequantized, embedded, fits_int8, floats
from .corrections import fold_smoothing, subtract_drift
from .integers import BLOCKS, Window, block_matmul, convolution, linear
from .nodes import Writer, integer, integers

__all__ = ["HEXAGON", "ONNXRUNTIME", "PORTABLE", "TENSORRT", "Convention", "hide", "quantize"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Convention:
    """How an engine takes integers."""

    activations: str
    """u8: bytes as they are described. s8: signed bytes whose zero is 0; a range that lies otherwise is widened until
    it is symmetric. u16: the described range in 256 times finer steps, what layers give alike where
    that is described."""
    kernels: bool = False
    """ONNX Runtime's integer kernels, which no other engine reads, in place of Q/DQ."""
    tables: bool = True
    """Whether Gather takes integers; where not, tables are float16."""


ONNXRUNTIME = Convention("u8", kernels=True)
PORTABLE = Convention("u8")
TENSORRT = Convention("s8")
HEXAGON = Convention("u16", tables=False)


@dataclass(frozen=True, eq=False)
class _Site:
    """One place where a layer computes."""

    name: str
    layer: Layer
    node: ir.Node
    """Conv, Gemm, MatMul or Gather."""
    output: ir.Value
    """Of the node, or of the Add of its bias."""
    bias: ir.Value | None


def hide(model: ir.Model, part: Part) -> None:
    """Make inputs of the graph of the weights of quantized layers, so that nothing folds them into something else.

    Parameters that a pass replaced are replaced first. `quantize` takes the inputs away again. Raises BadInput for a
    layer that the part does not have, or that shares its weights with another.
    """
    assert part.quantized is not None
    graph, modules = model.graph, dict(part.module.named_modules())
    names = {id(parameter): name for name, parameter in part.module.named_parameters()}  # each once
    for name, array in part.quantized.params.items():
        _set(graph, name, array)
    for name, layer in part.quantized.layers.items():
        if name not in modules:
            raise BadInput(f"{part.name} has no layer {name}", expected="the name of a module of the part")
        if names[id(modules[name].weight)] != f"{name}.weight":
            raise BadInput(
                f"{part.name}: {name} shares its weights with {names[id(modules[name].weight)]}",
                fix="leave one of the two in float",
            )
        if layer.bias is not None and f"{name}.bias" in graph.initializers:
            _set(graph, f"{name}.bias", layer.bias)
        value = graph.initializers.pop(f"{name}.weight", None)
        if value is not None:  # else the network never reads it
            value.const_value = None
            graph.inputs.append(value)


def _set(graph: ir.Graph, name: str, array: Array) -> None:
    if name in graph.initializers:
        data = np.ascontiguousarray(array, np.float32)
        graph.initializers[name].const_value = ir.tensor(data, name=name)


def quantize(model: ir.Model, part: Part, convention: Convention) -> None:
    """Write every layer of part.quantized, and the drift of its output, into a graph that `hide` has seen.

    Raises CheckpointError for weights that reach an operator this knows no integer form of, and BadInput for a layer
    that the convention cannot say.
    """
    quantized, graph = part.quantized, model.graph
    assert quantized is not None
    weights = {value: value.name.removesuffix(".weight") for value in graph.inputs if value.name is not None}
    weights = {value: name for value, name in weights.items() if name in quantized.layers}
    for value in weights:
        graph.inputs.remove(value)
    writer, pixels = Writer(graph, "q"), dict[Any, ir.Value]()
    if convention.activations == "u16" and writer.opset < 21:
        raise BadInput(f"inputs of 16 bits in opset {writer.opset}", expected="opset 21 or later")
    taken = {value.name for node in graph for value in node.outputs}
    taken |= {spec.name for spec in (*part.inputs, *part.outputs)}
    for site in _sites(graph, weights, quantized, part.name):
        writer.before = site.node
        _write(writer, site, f"{site.name}.codes" if site.name in taken else site.name, convention, pixels)
    common.RemoveUnusedNodesPass()(model)  # what was replaced still reads the norms
    fold_smoothing(writer)
    if quantized.drift is not None:
        writer.before = None
        subtract_drift(writer, quantized.drift, part)
    for value, name in weights.items():
        if value.uses():
            raise CheckpointError(f"{part.name}: the float weights of {name} are still read by the graph")
    if convention.kernels:
        model.graph.opset_imports[MICROSOFT] = 1


def _sites(graph: ir.Graph, weights: dict[ir.Value, str], quantized: Quantized, part: str) -> list[_Site]:
    """In the order of the graph."""
    place = {node: number for number, node in enumerate(graph)}
    found = []
    for value, name in weights.items():
        for use in value.uses():
            node, where = use.node, use.idx
            ends = [(node, where)]
            if node.op_type == "Transpose":
                ends = [(after.node, after.idx) for after in node.outputs[0].uses()]
            for end, index in ends:
                column = end is not node
                expected = {
                    "MatMul": column and index == 1,
                    "Gemm": index == 1
                    and bool(integer(end, "transB")) != column
                    and not integer(end, "transA"),
                    "Conv": index == 1 and not column and _text(end, "auto_pad") in ("", "NOTSET"),
                    "Gather": index == 0 and not column and not integer(end, "axis"),
                }
                if not expected.get(end.op_type, False):
                    raise CheckpointError(
                        f"{part}: the weights of {name} are read by {end.op_type}, which has no integer form here",
                        fix="leave that layer out of the quantization",
                    )
                found.append(_site(graph, name, quantized.layers[name], end))
    return sorted(found, key=lambda site: place[site.node])


def _site(graph: ir.Graph, name: str, layer: Layer, node: ir.Node) -> _Site:
    output, bias = node.outputs[0], None
    if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2:
        bias = node.inputs[2]
    elif node.op_type == "MatMul":
        uses = list(output.uses())
        add = uses[0].node if len(uses) == 1 else None
        if add is not None and add.op_type == "Add":
            other = add.inputs[1 - uses[0].idx]
            if other is not None and other.name == f"{name}.bias":
                output, bias = add.outputs[0], other
    return _Site(name, layer, node, output, bias)


def _write(
    graph: Writer, site: _Site, name: str, convention: Convention, pixels: dict[Any, ir.Value]
) -> None:
    """Replace what the site computes; the codes are called `name`."""
    node, layer, weights = site.node, site.layer, site.layer.weights
    x, how, bias = node.inputs[0], layer.input, site.bias
    assert x is not None
    if node.op_type == "Gather":
        assert node.inputs[1] is not None
        if convention.tables:
            rows = embedded(graph, weights, name, node.inputs[1])
        else:
            table = graph.weight(name, weights.floats().astype(np.float16))
            rows = graph.add("Gather", table, node.inputs[1])
            rows = graph.add("Cast", rows, attributes={"to": int(ir.DataType.FLOAT)})
        _replace(site.output, rows)
        return
    if layer.smooth is not None:
        inverse = (1 / layer.smooth).astype(np.float32)
        smoothed = graph.add("Mul", x, graph.constant(inverse.reshape(-1, *[1] * (len(weights.shape) - 2))))
        smoothed.shape = x.shape
        x = smoothed
    if how is not None and how.bits > 8 and convention.activations != "u16":
        raise BadInput(f"{name}: inputs of {how.bits} bits", expected="at most 8 bits for this engine")
    if bias is None and layer.bias is not None:
        bias = graph.weight(f"{name}.b", layer.bias)
    if convention.kernels:
        result = _by_kernel(graph, node, x, how, weights, name, bias, pixels)
        if result is not None:
            _replace(site.output, result)
            return
    by_column = _by_column(node)
    shape = weights.shape[::-1] if by_column else weights.shape
    matrix = (floats if convention.kernels else dequantized)(graph, weights, name, shape, by_column=by_column)
    if how is not None:
        x = _rounded(graph, x, how, convention.activations)
    inputs = [x, matrix] if bias is None or node.op_type == "MatMul" else [x, matrix, bias]
    result = graph.add(node.op_type, *inputs, attributes=node.attributes)
    if bias is not None and node.op_type == "MatMul":
        result = graph.add("Add", result, bias)
    if layer.output is not None:
        result = _rounded(graph, result, layer.output, convention.activations)
    _replace(site.output, result)


def _by_kernel(
    graph: Writer,
    node: ir.Node,
    x: ir.Value,
    how: Activations | None,
    weights: Weights,
    name: str,
    bias: ir.Value | None,
    pixels: dict[Any, ir.Value],
) -> ir.Value | None:
    """The layer by one of ONNX Runtime's kernels for integers, or None where it has none for it."""
    if how is None:
        whole = weights.group in BLOCKS and weights.bits == 4 and weights.multiplier is None
        return block_matmul(graph, x, weights, name, bias) if whole and node.op_type == "MatMul" else None
    if not fits_int8(weights):
        return None
    if node.op_type != "Conv":
        return linear(graph, x, how, weights, name, bias)
    if len(weights.shape) not in (3, 4) or integer(node, "group", 1) != 1:
        return None
    if len(weights.shape) == 4:
        return convolution(graph, x, how, weights, name, bias, _window(node), pixels)
    flat = graph.add("Unsqueeze", x, graph.sizes(2))  # a line is an image of height 1
    result = convolution(graph, flat, how, weights, name, bias, _window(node), pixels)
    return graph.add("Squeeze", result, graph.sizes(2))


def _window(node: ir.Node) -> Window:
    """Of a Conv of images or, as if of height 1, of lines."""
    weights = node.inputs[1]
    assert weights is not None
    assert weights.shape is not None
    space = len(weights.shape) - 2
    flat = (1,) * (2 - space)
    *_, height, width = (*flat, *(int(size) for size in list(weights.shape)[2:]))  # type: ignore[arg-type]
    down, across = (*flat, *integers(node, "strides", (1,) * space))
    far, wide = (*flat, *integers(node, "dilations", (1,) * space))
    pads = integers(node, "pads", (0,) * 2 * space)
    still = (0,) * (2 - space)
    top, left, bottom, right = (*still, *pads[:space], *still, *pads[space:])
    return Window((height, width), (down, across), (far, wide), (top, left, bottom, right))


def _by_column(node: ir.Node) -> bool:
    """Whether the weights lie [in, out]."""
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not integer(node, "transB"))


def _rounded(graph: Writer, x: ir.Value, how: Activations, activations: str) -> ir.Value:
    """x behind QuantizeLinear and DequantizeLinear."""
    top = 2**how.bits - 1
    low, high = (np.array((end - how.zero) * how.scale, np.float32) for end in (0, top))
    if how.bits < 8:  # the stored type holds more codes than there are
        x = graph.add("Clip", x, graph.constant(low), graph.constant(high))
    scale, zero = how.scale, np.array(how.zero, np.uint8 if how.bits <= 8 else np.uint16)  # as described
    if activations == "s8":
        if 2 * how.zero != top + 1:
            scale = float(max(-low, high)) / 127  # 127: the largest byte with a sign
        zero = np.array(0, np.int8)
    elif activations == "u16" and how.bits < 16:
        scale, zero = how.scale * top / 65535, np.array(round(how.zero * 65535 / top), np.uint16)
    ends = graph.constant(np.array(scale, np.float32)), graph.constant(zero)
    return graph.add("DequantizeLinear", graph.add("QuantizeLinear", x, *ends), *ends)


def _text(node: ir.Node, name: str) -> str:
    attribute: Any = node.attributes.get(name)
    return "" if attribute is None else str(attribute.as_string())


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

"""A graph whose types say what is computed in half precision, for engines that take them literally.

TensorRT builds networks strongly typed, WebGPU's and Hexagon's kernels go by the types of their inputs: nothing is
converted that the graph does not convert. So float16 is written into it, and what must stay exact stays float32 there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..runtime.errors import BadInput
from .nodes import Writer

__all__ = ["LEAST_HALF", "MAX_HALF", "halve", "types_of"]

Array = NDArray[Any]

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

MAX_HALF = 65504.0
"""The largest finite float16 (IEEE 754-2019, binary16)."""

LEAST_HALF = 2.0**-24
"""The least float16 above 0 (IEEE 754-2019, binary16): a scale must not become 0."""

ENDLESS = 1e30
"""A constant beyond this stands for infinity: masks hold float32's lowest number, -3.4e38."""

PRODUCTS = {"MatMul", "Gemm", "Conv", "QuantizeLinear"}
"""What ends the exact beginning of a graph: from there on its numbers are no better than its weights."""

SCALED = {"QuantizeLinear", "DequantizeLinear"}
TRUTH = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf", "And", "Or", "Not"}
COUNTS = {"Shape", "Size", "ArgMax", "ArgMin", "NonZero"}
FLOAT_ONLY = {"Resize": (1, 2)}
"""Operator -> inputs that are float32 whatever the first one is: scales and the region of interest."""


def halve(model: ir.Model) -> None:
    """Compute in float16 and store weights in it; inputs and outputs keep their types. In place.

    float32 stays where a timestep becomes an embedding, up to the first product: 999 as an angle keeps no digit behind
    the point in float16, and sines of it are others. Raises BadInput for a weight that float16 cannot hold.
    """
    graph = model.graph
    exact, types = _exact(graph), _given(graph)
    twins: dict[ir.Value, ir.Value] = {}
    wanted = [output.dtype for output in graph.outputs]
    writer = Writer(graph, "h")
    for node in list(graph):
        if node not in exact and node.op_type != "Cast":
            writer.before = node
            for place, value in enumerate(node.inputs):
                if (
                    value is not None
                    and types[value] == FLOAT
                    and place not in FLOAT_ONLY.get(node.op_type, ())
                ):
                    if value not in twins:
                        scale = node.op_type in SCALED and place == 1
                        twins[value] = _half(writer, value, LEAST_HALF if scale else 0.0)
                        types[twins[value]] = HALF
                    node.replace_input_with(place, twins[value])
        if node not in exact:
            _retype(node)
        for place, output in enumerate(node.outputs):
            types[output] = _type_of(node, place, types)
            if output.type is not None:
                output.type = ir.TensorType(types[output])
    writer.before = None
    for place, (output, dtype) in enumerate(zip(graph.outputs, wanted, strict=True)):
        if types[output] == HALF and dtype == FLOAT:
            graph.outputs[place] = _whole(writer, output)


def types_of(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Of every value, whether the file says so or not."""
    types = _given(graph)
    for node in graph:
        types.update({output: _type_of(node, place, types) for place, output in enumerate(node.outputs)})
    return types


def _given(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Of inputs and initializers."""
    types = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        held = value.const_value if value.is_initializer() else value
        assert held is not None
        assert held.dtype is not None
        types[value] = held.dtype
    return types


def _exact(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that compute from the timestep alone, up to the first product."""
    known = {value for value in graph.inputs if value.name == "timestep"}
    constants = set(graph.initializers.values())
    exact = set()
    for node in graph:
        inputs = {value for value in node.inputs if value is not None}
        if inputs & known and inputs <= known | constants and node.op_type not in PRODUCTS:
            exact.add(node)
            known.update(node.outputs)
    return exact


def _half(writer: Writer, value: ir.Value, least: float) -> ir.Value:
    """The value in float16: another initializer, converted when it is written, or a Cast.

    least  of any of its numbers, where that is above 0
    """
    tensor = value.const_value if value.is_initializer() else None
    if tensor is None:
        return writer.add("Cast", value, attributes={"to": int(HALF)})
    name = f"{value.name}.half"
    largest = float(np.abs(_finite(tensor.numpy())).max(initial=0.0))
    if largest > MAX_HALF:
        raise BadInput(
            f"{value.name} holds {largest:.3g}, more than float16 can ({MAX_HALF:.0f})",
            fix='precision = "float32" in a --recipe',
        )
    # converted one at a time, while the file is written: a U-Net of 3.4 GB is never there twice
    lazy = ir.LazyTensor(
        lambda: ir.tensor(_rounded(tensor.numpy(), least), name=name),
        dtype=HALF,
        shape=tensor.shape,
        name=name,
    )
    twin = ir.Value(name=name, const_value=lazy, shape=value.shape, type=ir.TensorType(HALF))
    writer.graph.register_initializer(twin)
    return twin


def _finite(array: Array) -> Array:
    return np.where(np.abs(array) > ENDLESS, np.float32(0), array)


def _rounded(array: Array, least: float = 0.0) -> Array:
    """float16, and the largest number of either sign in place of what stands for infinity."""
    endless = np.abs(array) > ENDLESS
    if endless.any():
        array = np.where(endless, np.copysign(np.float32(MAX_HALF), array), array)
    return array.astype(np.float16) if least == 0.0 else np.maximum(array, least).astype(np.float16)


def _retype(node: ir.Node) -> None:
    """Attributes that name float32."""
    for name in ("to", "dtype"):
        attribute: Any = node.attributes.get(name)
        if attribute is not None and attribute.as_int() == int(FLOAT):
            node.attributes.add(ir.AttrInt64(name, int(HALF)))
    held: Any = node.attributes.get("value")
    if held is not None and held.type == ir.AttributeType.TENSOR and held.value.dtype == FLOAT:
        node.attributes.add(ir.AttrTensor("value", ir.tensor(_rounded(held.value.numpy()))))


def _type_of(node: ir.Node, place: int, types: dict[ir.Value, ir.DataType]) -> ir.DataType:
    """Of an output, by the rules of ONNX for the operators that torch.onnx and export/qdq.py write."""

    def of(number: int) -> ir.DataType:
        value = node.inputs[number]
        assert value is not None, f"{node.op_type} needs its input {number}"
        return types[value]

    operator = node.op_type
    if operator == "Cast":
        to: Any = node.attributes["to"]
        return ir.DataType(to.as_int())
    if operator in TRUTH:
        return ir.DataType.BOOL
    if operator in COUNTS or (operator == "TopK" and place == 1):
        return ir.DataType.INT64
    if operator in ("Constant", "ConstantOfShape"):
        held: Any = node.attributes.get("value")
        return FLOAT if held is None else ir.DataType(held.value.dtype)
    if operator == "QuantizeLinear":
        return of(2)
    return of(1 if operator in ("DequantizeLinear", "Where") else 0)


def _whole(writer: Writer, output: ir.Value) -> ir.Value:
    """A float32 output of the name that `output` has."""
    name, whole = output.name, writer.add("Cast", output, attributes={"to": int(FLOAT)})
    output.name = f"{name}.half"
    whole.name, whole.shape, whole.type = name, output.shape, ir.TensorType(FLOAT)
    return whole

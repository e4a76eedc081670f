"""The flatbuffer of a .tflite graph, between the converter and the bundle: integer weights in, notes and names out.

A layer whose input is rounded becomes a hybrid kernel: FULLY_CONNECTED or CONV_2D of int8 weights and float tensors,
which XNNPACK runs as a product of integers, rounding the input to 8 bits by its own range at each call. A layer of
rounded weights alone reads them through DEQUANTIZE, which the engine computes once, when it loads the graph.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import library
from ..model.quantized import Layer
from ..runtime.errors import CheckpointError

__all__ = ["Found", "find", "read", "store", "tidy", "written"]

Array = NDArray[Any]

ALIGNMENT = 16
"""Of constants: `force_align` of Buffer.data in LiteRT's schema, which flatbuffers' Python writer does not know."""
HYBRID = ("FULLY_CONNECTED", "CONV_2D")
"""Operators that XNNPACK has a kernel for with int8 weights and a float input."""
VERSIONS = {"FULLY_CONNECTED": 9, "CONV_2D": 5, "DEQUANTIZE": 5, "EMBEDDING_LOOKUP": 3}
"""The first version of each that takes int8 weights with a scale a row, as LiteRT's converter numbers them."""


@dataclass(frozen=True)
class Stored:
    """A buffer with its bytes aligned; the generated ModelT calls `Pack`, as it does of its own."""

    data: Any = b""
    """Bytes, or an array of uint8."""

    def Pack(self, builder: Any) -> int:
        schema, at = _schema(), 0
        if len(self.data):
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = memoryview(self.data)
            at = builder.EndVector()
        schema.BufferStart(builder)
        if at:
            schema.BufferAddData(builder, at)
        return int(schema.BufferEnd(builder))


@dataclass(frozen=True)
class Found:
    """A layer's weights in a graph."""

    name: str
    tensor: int
    codes: Array
    """As the tensor has them."""
    axis: int
    """Of the output channels."""


def read(data: bytes) -> Any:
    """The model as objects of the generated schema."""
    schema = _schema()
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data))


def find(model: Any, marked: Mapping[float, tuple[str, Layer]]) -> dict[str, Found]:
    """Where the weights of layers lie, by their names.

    marked  first value of a layer's weights, in place of the right one -> the layer
    Raises CheckpointError where some are not there as they were: the converter computed something from them.
    """
    float32 = _schema().TensorType.FLOAT32
    found: dict[str, Found] = {}
    for number, tensor in enumerate(model.subgraphs[0].tensors):
        data = model.buffers[tensor.buffer].data
        if tensor.type != float32 or data is None or len(data) < 4:
            continue
        mark = float(np.frombuffer(data[:4], np.float32)[0])
        if mark not in marked:
            continue
        name, layer = marked[mark]
        weights = layer.weights
        floats = weights.floats()
        floats.reshape(-1)[0] = mark
        there = np.frombuffer(data, np.float32).reshape(tensor.shape)
        for order in _orders(floats.ndim):
            if floats.size == there.size and np.array_equal(
                floats.transpose(order).reshape(there.shape), there
            ):
                codes = weights.codes.reshape(weights.shape).transpose(order).reshape(there.shape)
                axis = 0 if order[0] == 0 else there.ndim - 1
                if there.shape[axis] == len(weights.codes):
                    found[name] = Found(name, number, codes, axis)
                    break
    if missing := sorted({name for name, _ in marked.values()} - found.keys()):
        raise CheckpointError(
            f"the LiteRT graph holds the weights of {', '.join(missing[:3])} in no form that takes integers",
            fix=f'leave them in floating point: keep = ["*.{missing[0]}"] under [quantize] of a --recipe',
        )
    return found


def _orders(rank: int) -> list[tuple[int, ...]]:
    """Of the axes of torch's weights: as they are, channels last, and any other."""
    last = (0, *range(2, rank), 1)
    rest = [order for order in permutations(range(rank)) if order not in (tuple(range(rank)), last)]
    return [tuple(range(rank)), last, *rest]


@dataclass
class _Writer:
    """Adds to a model."""

    model: Any
    reciprocals: dict[tuple[int, bytes], int] = field(default_factory=dict)
    """(tensor, its divisors) -> the tensor divided."""

    def constant(self, data: Array, kind: int, quantization: Any = None) -> int:
        self.model.buffers.append(Stored(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))
        return self.tensor(data.shape, kind, len(self.model.buffers) - 1, quantization)

    def tensor(self, shape: Any, kind: int, buffer: int = 0, quantization: Any = None) -> int:
        tensor = _schema().TensorT()
        tensor.shape, tensor.type, tensor.buffer, tensor.quantization = (
            list(shape),
            kind,
            buffer,
            quantization,
        )
        self.model.subgraphs[0].tensors.append(tensor)
        return len(self.model.subgraphs[0].tensors) - 1

    def operator(self, name: str, options: str, inputs: list[int], output: int) -> Any:
        schema = _schema()
        code = getattr(schema.BuiltinOperator, name)
        codes = self.model.operatorCodes
        number = next((i for i, known in enumerate(codes) if known.builtinCode == code), len(codes))
        if number == len(codes):
            codes.append(schema.OperatorCodeT())
            codes[-1].builtinCode, codes[-1].deprecatedBuiltinCode, codes[-1].version = code, code, 1
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = number, inputs, [output]
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
        operator.builtinOptions = getattr(schema, f"{options}T")()
        return operator


def store(model: Any, found: Mapping[str, Found], layers: Mapping[str, Layer]) -> None:
    """Put the integers of `layers` where their marked floats are, and the operators around them."""
    schema, graph, writer = _schema(), model.subgraphs[0], _Writer(model)
    names = operator_names(model)
    by_tensor = {each.tensor: each for each in found.values()}
    integers: dict[str, int] = {}
    floats: dict[str, int] = {}
    operators = []
    for operator in graph.operators:
        inputs = [int(number) for number in operator.inputs]
        for place, number in enumerate(inputs):
            if number not in by_tensor:
                continue
            where, kind = by_tensor[number], names[operator.opcodeIndex]
            layer = layers[where.name]
            if where.name not in integers:
                how = schema.QuantizationParametersT()
                how.scale, how.quantizedDimension = layer.weights.scale[:, 0], where.axis
                how.zeroPoint = np.zeros(len(how.scale), np.int64)
                integers[where.name] = writer.constant(where.codes, schema.TensorType.INT8, how)
            hybrid = kind in HYBRID and place == 1 and where.axis == 0 and _ungrouped(graph, inputs)
            if kind == "EMBEDDING_LOOKUP" and where.axis == 0:
                inputs[place] = integers[where.name]
            elif hybrid and layer.input is not None:
                inputs[place] = integers[where.name]
                if kind == "FULLY_CONNECTED":
                    operator.builtinOptions.asymmetricQuantizeInputs = True
            else:
                if where.name not in floats:
                    floats[where.name] = writer.tensor(where.codes.shape, schema.TensorType.FLOAT32)
                    operators.append(
                        writer.operator(
                            "DEQUANTIZE", "DequantizeOptions", [integers[where.name]], floats[where.name]
                        )
                    )
                inputs[place] = floats[where.name]
            if layer.smooth is not None:
                key = inputs[0], layer.smooth.tobytes()
                if key not in writer.reciprocals:
                    factor = (1.0 / layer.smooth.astype(np.float64)).astype(np.float32)
                    factor_at = writer.constant(factor, schema.TensorType.FLOAT32)
                    even = writer.tensor(graph.tensors[inputs[0]].shape, schema.TensorType.FLOAT32)
                    operators.append(writer.operator("MUL", "MulOptions", [inputs[0], factor_at], even))
                    writer.reciprocals[key] = even
                inputs[0] = writer.reciprocals[key]
        operator.inputs = inputs
        operators.append(operator)
    graph.operators = operators
    names = operator_names(model)
    for number, code in enumerate(model.operatorCodes):
        code.version = max(code.version, VERSIONS.get(names[number], 1))


def _ungrouped(graph: Any, inputs: list[int]) -> bool:
    """Whether every channel of the input reaches every output."""
    x, weights = (graph.tensors[number].shape for number in inputs[:2])
    return int(x[-1]) == int(weights[-1])


def operator_names(model: Any) -> list[str]:
    """Of the model's operator codes."""
    known = {code: name for name, code in vars(_schema().BuiltinOperator).items() if not name.startswith("_")}
    return [known[code.builtinCode] for code in model.operatorCodes]


def tidy(model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Name inputs and outputs, drop every other name and note, and whatever no operator reads; equal constants once.

    The converter names each tensor after the modules and the source files it came from: a fiftieth of a small file.
    """
    graph = model.subgraphs[0]
    ends = [[int(number) for number in numbers] for numbers in (graph.inputs, graph.outputs)]
    used = [
        *ends[0],
        *(int(n) for each in graph.operators for n in (*each.inputs, *each.outputs) if n >= 0),
        *ends[1],
    ]
    order = {number: place for place, number in enumerate(dict.fromkeys(used))}
    buffers: list[Stored] = [Stored()]
    known: dict[bytes, int] = {}
    tensors = []
    for number in order:
        tensor = graph.tensors[number]
        data = model.buffers[tensor.buffer].data
        place = 0
        if data is not None and len(data):
            key = hashlib.sha256(memoryview(data)).digest()
            place = known.setdefault(key, len(buffers))
            if place == len(buffers):
                buffers.append(Stored(data))
        tensor.buffer, tensor.name = place, None
        tensor.shapeSignature = None  # the sizes are fixed: it says the same
        if tensor.quantization is not None and tensor.quantization.scale is None:
            tensor.quantization = None
        tensors.append(tensor)
    for operator in graph.operators:
        operator.inputs, operator.outputs = (
            [order[int(n)] if n >= 0 else -1 for n in numbers]
            for numbers in (operator.inputs, operator.outputs)
        )
        operator.intermediates = operator.mutatingVariableInputs = None
        operator.debugMetadataIndex = -1
    codes: dict[int, int] = {}
    for operator in graph.operators:
        operator.opcodeIndex = codes.setdefault(operator.opcodeIndex, len(codes))
    signature = model.signatureDefs[0]
    for names, numbers, maps in zip(
        (inputs, outputs), ends, (signature.inputs, signature.outputs), strict=True
    ):
        maps.sort(
            key=lambda each: str(each.name)
        )  # b'args_0', ...: the order of the arguments, below ten of them
        for name, each in zip(names, maps, strict=True):
            each.tensorIndex = order[int(each.tensorIndex)]
            each.name = tensors[each.tensorIndex].name = name
        numbers[:] = [each.tensorIndex for each in maps]
    graph.inputs, graph.outputs = ends
    graph.tensors, graph.name, graph.debugMetadataIndex = tensors, None, -1
    model.operatorCodes = [model.operatorCodes[number] for number in codes]
    model.buffers, model.description = buffers, "fewstep"
    model.metadata = model.metadataBuffer = None


def written(model: Any) -> bytes:
    """The model as the bytes of a file."""
    builder = library("flatbuffers").Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _schema() -> Any:
    return library("ai_edge_litert.schema_py_generated")

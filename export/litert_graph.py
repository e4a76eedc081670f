"""The part's own integers in a converted graph, in the place of the floats it was converted with.

A layer whose input is rounded becomes a hybrid kernel: FULLY_CONNECTED or CONV_2D of int8 weights and float tensors,
which XNNPACK runs as a product of integers, rounding the input to 8 bits by its own range at each call. A layer of
rounded weights alone reads them through DEQUANTIZE, which the engine computes once, when it loads the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.quantized import Layer
from ..runtime.errors import CheckpointError
from .litert_file import Stored, operator_names, schema

__all__ = ["BOUND", "mark", "store"]

Array = NDArray[Any]

HYBRID = ("FULLY_CONNECTED", "CONV_2D")
"""Operators that XNNPACK has a kernel for with int8 weights and a float input."""
MARK = 2.0**20
"""First of a quantized layer's weights while they are converted; no weight of a network is a million."""
STEPS = 8192
"""The last is larger by the number of the layer in steps of this fraction: far above what rounding does to a ratio."""
BOUND = 3e38
"""Above what any input of a layer can be in float32; `store` takes such bounds away."""
VERSIONS = {"FULLY_CONNECTED": 9, "CONV_2D": 5, "DEQUANTIZE": 5, "EMBEDDING_LOOKUP": 3}
"""The first version of each that takes int8 weights with a scale a row, as LiteRT's converter numbers them."""


@dataclass(frozen=True)
class Found:
    """A layer's weights in a graph."""

    name: str
    codes: Array
    """As the tensor has them."""
    axis: int
    """Of the output channels."""
    scale: Array
    """Of each of these, with what the converter multiplied the weights by."""


def mark(weights: Any, number: int) -> None:
    """Change the first and the last of `weights`, flat, to what `find` knows layer `number` by."""
    weights[0], weights[-1] = MARK, MARK * (1 + number / STEPS)


def find(model: Any, layers: Mapping[str, Layer]) -> dict[int, Found]:
    """Number of a tensor -> the layer whose marked weights it holds, whatever the order of its axes.

    layers  numbered in their order
    Raises CheckpointError where some are not there up to one factor: the converter computed something else from them.
    """
    float32, names = schema().TensorType.FLOAT32, list(layers)
    found: dict[int, Found] = {}
    for number, tensor in enumerate(model.subgraphs[0].tensors):
        data = model.buffers[tensor.buffer].data
        if tensor.type != float32 or data is None or len(data) < 8:
            continue
        there = np.frombuffer(data, np.float32).reshape(tensor.shape)
        first, last = float(there.flat[0]), float(there.flat[-1])
        if first < 1:  # a mark by any factor there is, attention's for one, is thousands
            continue
        place = round((last / first - 1) * STEPS)
        if 0 <= place < len(names) and (where := _same(there, names[place], layers[names[place]], place)):
            found[number] = where
    if missing := [name for name in names if name not in {each.name for each in found.values()}]:
        raise CheckpointError(
            f"the LiteRT graph holds the weights of {', '.join(missing[:3])} in no form that takes integers",
            fix=f'leave them in floating point: keep = ["*.{missing[0]}"] under [quantize] of a --recipe',
        )
    return found


def _same(there: Array, name: str, layer: Layer, number: int) -> Found | None:
    weights = layer.weights
    floats = weights.floats()
    if floats.size != there.size:
        return None
    mark(floats.reshape(-1), number)
    factor = np.float32(there.flat[0] / MARK)
    for order in _orders(floats.ndim):
        rows = [place for place, size in enumerate(there.shape) if size == len(weights.codes)]
        if not rows:
            return None
        axis = rows[0 if order[0] == 0 else -1]
        if order[0] == 0 and any(size > 1 for size in there.shape[:axis]):
            continue
        if np.allclose(there, factor * floats.transpose(order).reshape(there.shape), rtol=1e-6, atol=0):
            codes = weights.codes.reshape(weights.shape).transpose(order).reshape(there.shape)
            return Found(name, codes, axis, factor * weights.scale[:, 0])
    return None


def _orders(rank: int) -> list[tuple[int, ...]]:
    """Of the axes of torch's weights: as they are, channels last, and any other."""
    last = (0, *range(2, rank), 1)
    rest = [order for order in permutations(range(rank)) if order not in (tuple(range(rank)), last)]
    return [tuple(range(rank)), last, *rest]


@dataclass
class _Writer:
    """Adds to a model; what it makes is made once."""

    model: Any
    operators: list[Any] = field(default_factory=list)
    """In their order, to replace those of the graph."""
    made: dict[Any, int] = field(default_factory=dict)
    """What -> its tensor."""

    def integers(self, where: Found) -> int:
        """The weights as int8 with a scale a row."""
        generated, key = schema(), (where.name, where.axis, where.codes.shape, float(where.scale[0]))
        if key not in self.made:
            how = generated.QuantizationParametersT()
            how.scale, how.zeroPoint = where.scale, np.zeros(len(where.scale), np.int64)
            how.quantizedDimension = where.axis
            self.made[key] = self._constant(where.codes, generated.TensorType.INT8, how)
        return self.made[key]

    def floats(self, where: Found) -> int:
        """The same behind DEQUANTIZE."""
        integers = self.integers(where)
        if ("floats", integers) not in self.made:
            made = self._tensor(where.codes.shape, schema().TensorType.FLOAT32)
            self._operator("DEQUANTIZE", "DequantizeOptions", [integers], made)
            self.made["floats", integers] = made
        return self.made["floats", integers]

    def divided(self, tensor: int, divisors: Array) -> int:
        """A tensor [..., channels] over divisors [channels]."""
        key = tensor, divisors.tobytes()
        if key not in self.made:
            float32 = schema().TensorType.FLOAT32
            factors = self._constant((1.0 / divisors.astype(np.float64)).astype(np.float32), float32)
            made = self._tensor(self.model.subgraphs[0].tensors[tensor].shape, float32)
            self._operator("MUL", "MulOptions", [tensor, factors], made)
            self.made[key] = made
        return self.made[key]

    def _constant(self, data: Array, kind: int, quantization: Any = None) -> int:
        self.model.buffers.append(Stored(np.ascontiguousarray(data).reshape(-1).view(np.uint8)))
        return self._tensor(data.shape, kind, len(self.model.buffers) - 1, quantization)

    def _tensor(self, shape: Any, kind: int, buffer: int = 0, quantization: Any = None) -> int:
        tensor = schema().TensorT()
        tensor.shape, tensor.type, tensor.buffer, tensor.quantization = (
            list(shape),
            kind,
            buffer,
            quantization,
        )
        self.model.subgraphs[0].tensors.append(tensor)
        return len(self.model.subgraphs[0].tensors) - 1

    def _operator(self, name: str, options: str, inputs: list[int], output: int) -> None:
        generated = schema()
        code, codes = getattr(generated.BuiltinOperator, name), self.model.operatorCodes
        number = next((i for i, known in enumerate(codes) if known.builtinCode == code), len(codes))
        if number == len(codes):
            codes.append(generated.OperatorCodeT())
            codes[-1].builtinCode, codes[-1].deprecatedBuiltinCode, codes[-1].version = (
                code,
                min(code, 127),
                1,
            )
        operator = generated.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = number, inputs, [output]
        operator.builtinOptionsType = getattr(generated.BuiltinOptions, options)
        operator.builtinOptions = getattr(generated, f"{options}T")()
        self.operators.append(operator)


def store(model: Any, layers: Mapping[str, Layer]) -> None:
    """Put the integers of `layers` where their marked floats are, and the operators around them. Raises as `find`."""
    graph, writer, found = model.subgraphs[0], _Writer(model), find(model, layers)
    names, unbound = operator_names(model), dict[int, int]()
    for operator in graph.operators:
        operator.inputs = [unbound.get(int(number), int(number)) for number in operator.inputs]
        if (
            names[operator.opcodeIndex] == "MINIMUM"
            and (tensor := _bounded(model, operator.inputs)) is not None
        ):
            unbound[int(operator.outputs[0])] = tensor
            continue
        for place, number in enumerate(operator.inputs):
            if number not in found:
                continue
            where, kind = found[number], names[operator.opcodeIndex]
            layer = layers[where.name]
            hybrid = kind in HYBRID and place == 1 and where.axis == 0 and _ungrouped(graph, operator.inputs)
            if kind == "EMBEDDING_LOOKUP" or (hybrid and layer.input is not None):
                operator.inputs[place] = writer.integers(where)
            else:
                operator.inputs[place] = writer.floats(where)
            if kind == "FULLY_CONNECTED" and layer.input is not None:
                operator.builtinOptions.asymmetricQuantizeInputs = True
            if layer.smooth is not None:
                operator.inputs[0] = writer.divided(operator.inputs[0], layer.smooth)
        writer.operators.append(operator)
    graph.operators = writer.operators
    names = operator_names(model)
    for number, code in enumerate(model.operatorCodes):
        code.version = max(code.version, VERSIONS.get(names[number], 1))


def _bounded(model: Any, inputs: list[int]) -> int | None:
    """The tensor that BOUND bounds, of the two inputs of a MINIMUM."""
    for tensor, bound in (inputs, inputs[::-1]):
        data = model.buffers[model.subgraphs[0].tensors[bound].buffer].data
        if data is not None and len(data) == 4 and np.frombuffer(data, np.float32)[0] == np.float32(BOUND):
            return tensor
    return None


def _ungrouped(graph: Any, inputs: list[int]) -> bool:
    """Whether every channel of the input reaches every output."""
    x, weights = (graph.tensors[number].shape for number in inputs[:2])
    return int(x[-1]) == int(weights[-1])

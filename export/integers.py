"""A quantized layer by ONNX Runtime's own integer kernels.

ONNX Runtime makes an integer kernel of Q/DQ around a Conv only where the output is rounded to 8 bits as well, which
costs as much quality again as rounding the input. com.microsoft.MatMulIntegerToFloat takes u8 x s8 and gives floats,
scale and bias in the same pass; a convolution is that behind a gather of its pixels, which are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..model.quantized import Activations, Weights
from .clean import MICROSOFT
from .codes import int8
from .nodes import Writer, integers

__all__ = ["BLOCKS", "Window", "block_matmul", "convolution", "grid", "linear", "quantized"]

Array = NDArray[Any]

BLOCKS = (16, 32, 64, 128, 256)
"""Sizes of block com.microsoft.MatMulNBits has kernels for."""


@dataclass(frozen=True)
class Window:
    """What a convolution of images looks at: each pair is (height, width)."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    """top, left, bottom, right"""

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def quantized(graph: Writer, x: ir.Value, how: Activations) -> ir.Value:
    """Codes of x, uint8, none above 2^bits - 1."""
    codes = graph.add("QuantizeLinear", x, *grid(graph, how))
    if how.bits < 8:
        ends = (graph.constant(np.array(end, np.uint8)) for end in (0, 2**how.bits - 1))
        codes = graph.add("Clip", codes, *ends)
    return codes


def grid(graph: Writer, how: Activations) -> tuple[ir.Value, ir.Value]:
    scale, zero = np.array(how.scale, np.float32), np.array(how.zero, np.uint8)
    return graph.constant(scale), graph.constant(zero)


def linear(
    graph: Writer, x: ir.Value, how: Activations, weights: Weights, name: str, bias: ir.Value | None
) -> ir.Value:
    """x [..., in] -> [..., out], float."""
    matrix = int8(graph, weights, name, by_column=True)
    return _product(graph, quantized(graph, x, how), how, matrix, weights, name, bias)


def convolution(
    graph: Writer,
    x: ir.Value,
    how: Activations,
    weights: Weights,
    name: str,
    bias: ir.Value | None,
    window: Window,
    pixels: dict[Any, ir.Value],
) -> ir.Value:
    """x [batch, in, height, width] -> [batch, out, height, width], float.

    pixels  what `_pixels` made for the graph so far
    """
    transpose = x.producer()
    if (
        transpose is not None
        and transpose.op_type == "Transpose"
        and integers(transpose, "perm") == (0, 3, 1, 2)
    ):
        codes = quantized(graph, transpose.inputs[0], how)  # it lies as the kernel wants it
    else:
        codes = graph.add("Transpose", quantized(graph, x, how), attributes={"perm": [0, 2, 3, 1]})
    if any(window.pads):
        top, left, bottom, right = window.pads
        codes = graph.add(
            "Pad", codes, graph.sizes(0, top, left, 0, 0, bottom, right, 0), grid(graph, how)[1]
        )
    if window.taps > 1 or max(window.strides) > 1:
        flat = graph.add("Reshape", codes, graph.sizes(0, -1, weights.shape[1]))
        seen = graph.add("Gather", flat, _pixels(graph, x, window, pixels), attributes={"axis": 1})
        codes = graph.add("Reshape", seen, graph.sizes(0, 0, 0, window.taps * weights.shape[1]))
    matrix = _by_tap(graph, weights, name)
    result = _product(graph, codes, how, matrix, weights, name, bias)
    return graph.add("Transpose", result, attributes={"perm": [0, 3, 1, 2]})


def _product(
    graph: Writer,
    codes: ir.Value,
    how: Activations,
    matrix: ir.Value,
    weights: Weights,
    name: str,
    bias: ir.Value | None,
) -> ir.Value:
    scale, zero = grid(graph, how)
    inputs = [codes, matrix, scale, graph.weight(f"{name}.s", weights.scale[:, 0]), zero, None, bias]
    return graph.add("MatMulIntegerToFloat", *inputs, domain=MICROSOFT)


def _by_tap(graph: Writer, weights: Weights, name: str) -> ir.Value:
    """Weights of a convolution [taps * in, out]: the pixels that `_pixels` gathers have their channels together."""
    out, channels = weights.shape[:2]
    taps = weights.codes.shape[1] // channels
    if weights.groups == 1 or taps == 1:
        codes = weights.codes.reshape(out, channels, taps).transpose(0, 2, 1).reshape(out, -1)
        return int8(graph, replace(weights, codes=codes), name, by_column=True)
    whole = int8(graph, weights, name, by_column=False)  # groups count as torch does
    whole = graph.add("Reshape", whole, graph.sizes(out, channels, taps))
    whole = graph.add("Transpose", whole, attributes={"perm": [2, 1, 0]})
    return graph.add("Reshape", whole, graph.sizes(taps * channels, out))


def _pixels(graph: Writer, x: ir.Value, window: Window, pixels: dict[Any, ir.Value]) -> ir.Value:
    """Numbers [height, width, taps] of the pixels, row by row, that each output pixel sees in the padded image."""
    sizes = tuple(str(size) for size in x.shape[2:]) if x.shape is not None else ()
    key = (sizes if sizes and "None" not in sizes else x, window)
    if key in pixels:
        return pixels[key]
    top, left, bottom, right = window.pads
    shape = graph.add("Shape", x, attributes={"start": 2})
    padded = graph.add("Add", shape, graph.sizes(top + bottom, left + right))
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilations, window.kernel, strict=True)]
    counts = graph.add("Sub", padded, graph.sizes(*reach))
    counts = graph.add("Div", counts, graph.sizes(*window.strides))
    counts = graph.add("Add", counts, graph.sizes(1, 1))
    width = graph.add("Gather", padded, graph.constant(np.array(1)))
    ends = [graph.add("Gather", counts, graph.constant(np.array(axis))) for axis in (0, 1)]
    zero, one = graph.constant(np.array(0)), graph.constant(np.array(1))
    down, across = (graph.add("Range", zero, end, one) for end in ends)
    down = graph.add("Mul", down, graph.constant(np.array(window.strides[0])))
    down = graph.add("Reshape", graph.add("Mul", down, width), graph.sizes(-1, 1, 1))
    across = graph.add("Mul", across, graph.constant(np.array(window.strides[1])))
    across = graph.add("Reshape", across, graph.sizes(-1, 1))
    taps = np.stack(np.meshgrid(*(np.arange(k) for k in window.kernel), indexing="ij")).reshape(2, -1)
    taps = taps * np.array(window.dilations)[:, None]
    tap = graph.add("Add", graph.add("Mul", graph.constant(taps[0]), width), graph.constant(taps[1]))
    total = graph.add("Add", graph.add("Add", down, across), tap)
    pixels[key] = graph.add("Cast", total, attributes={"to": int(ir.DataType.INT32)})
    return pixels[key]


def block_matmul(graph: Writer, x: ir.Value, weights: Weights, name: str, bias: ir.Value | None) -> ir.Value:
    """x [..., in] times weights of 4 bits that stay so in memory, float: com.microsoft.MatMulNBits.

    As fast as a product of floats; of 8 bits it takes 1.3 to 2.5 times as long (ONNX Runtime 1.31.1, SD-1.5's shapes).
    """
    out, inner = weights.codes.shape
    data = _pairs((weights.codes + np.int16(8)).reshape(out, weights.groups, -1))
    zero = None if weights.zero is None else graph.weight(f"{name}.z", _pairs(weights.zero + np.int16(8)))
    inputs = [x, graph.weight(name, data), graph.weight(f"{name}.s", weights.scale), zero, None, bias]
    attributes = {
        "K": inner,
        "N": out,
        "bits": 4,
        "block_size": weights.group,
        "accuracy_level": 1,
    }  # 1: float32
    return graph.add("MatMulNBits", *inputs, attributes=attributes, domain=MICROSOFT)


def _pairs(unsigned: Array) -> Array:
    """Codes of 4 bits [..., n] as bytes [..., ceil(n / 2)], the first in the lower half."""
    even = np.pad(unsigned, [(0, 0)] * (unsigned.ndim - 1) + [(0, unsigned.shape[-1] % 2)])
    return np.asarray(even[..., 0::2] | (even[..., 1::2] << 4), np.uint8)

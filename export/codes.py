"""Integer weights as values of a graph: stored in as many bits as they have, computed from constants where need be.

A layer's codes lie as its operator wants them: [out, inner] for Conv, Gemm and Gather, [inner, out] for MatMul, which
is called by column here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..model.quantized import Weights
from .nodes import Writer
from .packing import packs_by_row, unpacked

__all__ = ["dequantized", "embedded", "fits_int8", "floats", "int8"]

Array = NDArray[Any]


def fits_int8(weights: Weights) -> bool:
    """Whether one float scale a row and integers of 8 bits say all: what integer kernels take."""
    if weights.scale.shape[1] > 1:
        return False
    return weights.bits < 8 or (weights.zero is None and weights.multiplier is None)


def int8(graph: Writer, weights: Weights, name: str, *, by_column: bool) -> ir.Value:
    """multiplier (codes - zero) as int8, [out, inner] or [inner, out]. Only where `fits_int8`."""
    shape = weights.codes.shape[::-1] if by_column else weights.codes.shape
    whole = _whole(graph, weights, name, shape, by_column)
    return whole if weights.groups == 1 else _shaped(graph, whole, shape)


def floats(
    graph: Writer, weights: Weights, name: str, shape: tuple[int, ...], *, by_column: bool
) -> ir.Value:
    """The weights that the integers mean, in `shape`, by operators ONNX Runtime folds when it loads the graph.

    DequantizeLinear is none of them: its output would be computed anew at every call.
    """
    whole = _cast(graph, _whole(graph, weights, name, shape, by_column), "FLOAT")
    scale = graph.weight(f"{name}.s", _beside(weights.scale, weights.groups, shape, by_column))
    value = graph.add("Mul", whole, scale)
    return value if weights.groups == 1 else _shaped(graph, value, shape)


def dequantized(
    graph: Writer, weights: Weights, name: str, shape: tuple[int, ...], *, by_column: bool
) -> ir.Value:
    """The weights in `shape` behind DequantizeLinear, which is what compilers know integers by.

    A scale a row: int8 or int4 of `shape`. Groups of 8 or 4 bits: blocks of [out, inner], then a Reshape. Operator sets
    before 21 take int8 of `shape` alone; what that cannot say is floats there.
    """
    kept = weights.multiplier is None and weights.bits in (4, 8)
    if graph.opset < 21 and (weights.bits == 4 or weights.groups > 1):  # which has neither int4 nor blocks
        kept = False
    if not kept and not fits_int8(weights):
        return floats(graph, weights, name, shape, by_column=by_column)
    zero: ir.Value | None = None
    axis = 1 if by_column else 0
    if kept:
        dtype = ir.DataType.INT4 if weights.bits == 4 else ir.DataType.INT8
        codes = weights.codes.T if by_column else weights.codes
        if weights.groups == 1:
            codes = codes.reshape(shape)
        value = graph.weight(name, codes, dtype)
        if weights.zero is not None:
            side = weights.zero.T if by_column else weights.zero
            zero = graph.weight(f"{name}.z", side.ravel() if weights.groups == 1 else side, dtype)
    else:
        value = _shaped(graph, int8(graph, weights, name, by_column=by_column), shape)
    if weights.scale.shape[1] == 1:
        scale = graph.weight(f"{name}.s", weights.scale[:, 0])
        return graph.add("DequantizeLinear", value, scale, zero, attributes={"axis": axis})
    scale = graph.weight(f"{name}.s", weights.scale.T if by_column else weights.scale)
    blocks = {"axis": 1 - axis, "block_size": weights.group}
    return _shaped(graph, graph.add("DequantizeLinear", value, scale, zero, attributes=blocks), shape)


def embedded(graph: Writer, weights: Weights, name: str, rows: ir.Value) -> ir.Value:
    """The rows of a table that `rows` numbers, [..., width]: only they are unpacked and scaled."""
    axes = [0] * len(rows.shape or ())  # 0: as it is
    offset = np.int16(0)
    if weights.bits < 8 and packs_by_row(weights.codes.shape[1], weights.bits):
        offset = np.int16(2 ** (weights.bits - 1))
        codes = unpacked(graph, weights.codes + offset, weights.bits, name, rows)
    else:
        codes = graph.add("Gather", graph.weight(name, weights.codes), rows)
    value = graph.add(
        "Reshape", _cast(graph, codes, "FLOAT"), graph.sizes(*axes, weights.groups, weights.group)
    )

    def side(array: Array, label: str) -> ir.Value:
        table = graph.weight(f"{name}.{label}", array.astype(np.float32))
        return graph.add("Unsqueeze", graph.add("Gather", table, rows), graph.sizes(-1))

    if weights.zero is not None:
        value = graph.add("Sub", value, side(weights.zero + offset, "z"))
    elif offset:
        value = graph.add("Sub", value, graph.constant(np.array(offset, np.float32)))
    scale = weights.scale if weights.multiplier is None else weights.scale * weights.multiplier
    value = graph.add("Mul", value, side(scale, "s"))
    return graph.add("Reshape", value, graph.sizes(*axes, -1))


def _whole(graph: Writer, weights: Weights, name: str, shape: tuple[int, ...], by_column: bool) -> ir.Value:
    """multiplier (codes - zero), int8, or float where that can be beyond; laid out by `_grouped`.

    All that ONNX Runtime folds stays in memory until it has folded everything, so few and narrow steps count: an int4
    that is cast costs a byte and a half a weight, planes of 3 bits ten.
    """
    bits, groups = weights.bits, weights.groups
    codes, offset = weights.codes.astype(np.int16), 0
    if bits == 8:
        value = graph.weight(name, _grouped(weights.codes, groups, shape, by_column))
    elif bits == 4 and graph.opset >= 21:
        stored = graph.weight(name, _grouped(weights.codes, groups, shape, by_column), ir.DataType.INT4)
        value = _cast(graph, stored, "INT8")
    else:
        offset = 2 ** (bits - 1)
        value = unpacked(graph, _grouped(codes + offset, groups, shape, by_column), bits, name)
        value = _cast(graph, value, "INT8")
    wide = bits == 8 and not (weights.zero is None and weights.multiplier is None)
    dtype = np.float32 if wide else np.int8
    if wide:
        value = _cast(graph, value, "FLOAT")
    if weights.zero is not None:
        zero = _beside(weights.zero.astype(np.int16) + offset, groups, shape, by_column)
        value = graph.add("Sub", value, graph.weight(f"{name}.z", zero.astype(dtype)))
    elif offset:
        value = graph.add("Sub", value, graph.constant(np.array(offset, np.int8)))
    if weights.multiplier is not None:
        multiplier = _beside(weights.multiplier, groups, shape, by_column)
        value = graph.add("Mul", value, graph.weight(f"{name}.m", multiplier.astype(dtype)))
    return value


def _grouped(codes: Array, groups: int, shape: tuple[int, ...], by_column: bool) -> Array:
    """[out, inner] in `shape`, with more than one group [out, groups, group]; or that with the rows last."""
    if groups == 1:
        return (codes.T if by_column else codes).reshape(shape)
    split = codes.reshape(len(codes), groups, -1)
    return split.transpose(1, 2, 0) if by_column else split


def _beside(side: Array, groups: int, shape: tuple[int, ...], by_column: bool) -> Array:
    """[out, groups or 1] so that it multiplies what `_grouped` made."""
    if groups == 1:
        return side.T if by_column else side.reshape(-1, *[1] * (len(shape) - 1))
    return side.T[:, None, :] if by_column else side[:, :, None]


def _cast(graph: Writer, value: ir.Value, dtype: str) -> ir.Value:
    return graph.add("Cast", value, attributes={"to": int(ir.DataType[dtype])})


def _shaped(graph: Writer, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    return graph.add("Reshape", value, graph.sizes(*shape))

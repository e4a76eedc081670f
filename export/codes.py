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
from .packing import packs_by_row, unpacked, unpacked_rows

__all__ = ["dequantized", "embedded", "fits_int8", "floats", "int8"]

Array = NDArray[Any]


def fits_int8(weights: Weights) -> bool:
    """Whether one float scale a row and integers of 8 bits say all: what integer kernels take."""
    if weights.scale.shape[1] > 1:
        return False
    return weights.bits < 8 or (weights.zero is None and weights.multiplier is None)


def int8(graph: Writer, weights: Weights, name: str, *, by_column: bool) -> ir.Value:
    """multiplier (codes - zero) as int8, [out, inner] or [inner, out]. Only where `fits_int8`."""
    codes = weights.codes.T if by_column else weights.codes
    if weights.bits == 8:
        return graph.weight(name, codes)
    return _shaped(graph, _cast(graph, _whole(graph, weights, name, by_column), "INT8"), codes.shape)


def floats(
    graph: Writer, weights: Weights, name: str, shape: tuple[int, ...], *, by_column: bool
) -> ir.Value:
    """The weights that the integers mean, in `shape`, by operators ONNX Runtime folds when it loads the graph.

    DequantizeLinear is none of them: its output would be computed anew at every call.
    """
    whole = _cast(graph, _whole(graph, weights, name, by_column), "FLOAT")
    scale = graph.weight(f"{name}.s", _beside(weights.scale, by_column))
    return _shaped(graph, graph.add("Mul", whole, scale), shape)


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
        codes = unpacked_rows(graph, weights.codes + offset, weights.bits, name, rows)
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


def _whole(graph: Writer, weights: Weights, name: str, by_column: bool) -> ir.Value:
    """multiplier (codes - zero), int32 [out, groups, group] or [groups, group, out], from constants."""
    offset = np.int16(2 ** (weights.bits - 1) if weights.bits < 8 else 0)
    codes = _grouped(weights.codes + offset, weights.groups, by_column)
    if weights.bits < 8:
        value = unpacked(graph, codes, weights.bits, name)
    else:
        value = graph.weight(name, codes.astype(np.int8))
    value = _cast(graph, value, "INT32")
    if weights.zero is not None:
        zero = _beside(weights.zero + offset, by_column)
        stored = graph.weight(f"{name}.z", zero.astype(np.uint8 if weights.bits < 8 else np.int8))
        value = graph.add("Sub", value, _cast(graph, stored, "INT32"))
    elif offset:
        value = graph.add("Sub", value, graph.constant(np.array(offset, np.int32)))
    if weights.multiplier is not None:
        stored = graph.weight(f"{name}.m", _beside(weights.multiplier, by_column))
        value = graph.add("Mul", value, _cast(graph, stored, "INT32"))
    return value


def _grouped(codes: Array, groups: int, by_column: bool) -> Array:
    """[out, inner] as [out, groups, group], or that with the rows last."""
    split = codes.reshape(len(codes), groups, -1)
    return split.transpose(1, 2, 0) if by_column else split


def _beside(side: Array, by_column: bool) -> Array:
    """[out, groups or 1] so that it multiplies what `_grouped` made."""
    return side.T[:, None, :] if by_column else side[:, :, None]


def _cast(graph: Writer, value: ir.Value, dtype: str) -> ir.Value:
    return graph.add("Cast", value, attributes={"to": int(ir.DataType[dtype])})


def _shaped(graph: Writer, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    return graph.add("Reshape", value, graph.sizes(*shape))

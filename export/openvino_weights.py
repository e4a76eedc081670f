"""Integer weights of fewer than 8 bits in OpenVINO IR: stored in as many bits as they have.

OpenVINO has constants of 2, 3, 4 and 6 bits, and Convert unpacks them. Its CPU takes an integer kernel where the
weights are 8-bit constants times a float a row, so each layer becomes

    stored:  codes (u2, u3, i4, u6) -> Convert i8 [-> Subtract zero] [-> Multiply multiplier] -> Reshape -> Convert i8
    then:    -> Convert f32 -> Multiply scale of the row -> Convolution, MatMul

and the runtime computes what ends in that last i8 when it loads the graph (2026.4: 0.15 core seconds for 16 M weights;
left to the engine, a subgraph with more than one Convert costs it the integer kernel and four bytes a weight).
Groups with float scales of their own cannot be so: they are for float products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import library
from ..model.quantized import Layer, Quantized, Weights

__all__ = ["fill", "packed", "stand_ins"]

Array = NDArray[Any]

OFFSETS = {2: 2, 3: 4, 4: 0, 5: 16, 6: 32, 7: 0, 8: 0}
"""Bits of a code -> what is added to it to be stored: only 4 and 8 bits have a type with a sign."""
TYPES = {2: "u2", 3: "u3", 4: "i4", 5: "u6", 6: "u6", 7: "i8", 8: "i8"}
"""Bits of a code -> the least OpenVINO type that holds it."""


def stand_ins(quantized: Quantized, tables: frozenset[str]) -> tuple[Quantized, dict[str, Layer]]:
    """The description with plain 8-bit weights where OpenVINO has a shorter form, and the layers whose those are.

    tables  names of embeddings: single rows of them are read, unpacked where they are read
    The codes of a stand-in only serve to be found in the graph; its scale is the row's, or 1 for groups of floats.
    """
    shorter = {
        name: layer
        for name, layer in quantized.layers.items()
        if name not in tables and (layer.weights.bits < 8 or layer.weights.scale.shape[1] > 1)
    }
    layers = dict(quantized.layers)
    for number, (name, layer) in enumerate(shorter.items()):
        weights = layer.weights
        codes = weights.codes.copy()
        mark = np.array([number], np.int32).view(np.int8)  # no two alike: equal constants are merged
        codes.reshape(-1)[: mark.size] = mark[: codes.size]
        scale = weights.scale if weights.scale.shape[1] == 1 else np.ones((len(codes), 1), np.float32)
        layers[name] = replace(layer, weights=Weights(8, codes, scale, weights.shape))
    return replace(quantized, layers=layers), shorter


def fill(model: Any, layers: Mapping[str, Layer]) -> None:
    """Replace the stand-ins of these layers in an openvino.Model by the weights themselves, in the bits they take."""
    ops = library("openvino.opset13")
    for node in model.get_ordered_ops():
        name = node.get_friendly_name()
        if (
            node.get_type_name() != "Constant"
            or name not in layers
            or node.get_element_type().to_string() != "i8"
        ):
            continue
        weights, shape = layers[name].weights, list(node.shape)
        # torch's shape, or [in, out] for a MatMul; square ones are told apart by their codes
        column = len(shape) == 2 and not _by_row(node.data, weights)
        if weights.scale.shape[1] == 1:
            whole = _shaped(ops, _integers(ops, weights), weights, column, shape)
            old, new = node, ops.convert(whole, np.int8)
        else:
            float_codes = _codes(ops, weights, np.float32)
            scaled = ops.multiply(float_codes, weights.scale[:, :, None])
            old, new = _scaled(node), _shaped(ops, scaled, weights, column, shape)
        new.set_friendly_name(f"{name}.weight")
        for port in old.output(0).get_target_inputs():
            port.replace_source_output(new.output(0))


def _by_row(stand_in: Array, weights: Weights) -> bool:
    codes = weights.codes
    return stand_in.shape == codes.shape and np.array_equal(stand_in.reshape(-1)[4:], codes.reshape(-1)[4:])


def _scaled(node: Any) -> Any:
    """Behind a constant of integers: the Multiply by their scale."""
    while node.get_type_name() != "Multiply":
        (port,) = node.output(0).get_target_inputs()
        node = port.get_node()
    return node


def _integers(ops: Any, weights: Weights) -> Any:
    """multiplier (codes - zero), int32 or int8 [out, groups, group]."""
    simple = weights.multiplier is None and weights.zero is None
    if simple and not OFFSETS[weights.bits]:
        return _constant(weights.codes, weights.bits, (len(weights.codes), weights.groups, weights.group))
    whole = _codes(ops, weights, np.int32)
    if weights.multiplier is not None:
        multiplier = ops.constant(weights.multiplier[:, :, None])
        whole = ops.multiply(whole, ops.convert(multiplier, np.int32))
    return whole


def _codes(ops: Any, weights: Weights, dtype: Any) -> Any:
    """codes - zero, in `dtype`, [out, groups, group]."""
    bits, offset = weights.bits, OFFSETS[weights.bits]
    stored = _constant(weights.codes + offset, bits, (len(weights.codes), weights.groups, weights.group))
    whole = ops.convert(stored, dtype)
    if weights.zero is not None:
        zero = _constant(weights.zero + offset, bits, (*weights.zero.shape, 1))
        return ops.subtract(whole, ops.convert(zero, dtype))
    return ops.subtract(whole, np.array(offset, dtype)) if offset else whole


def _shaped(ops: Any, whole: Any, weights: Weights, column: bool, shape: list[int]) -> Any:
    """[out, groups, group] in the shape the operator takes."""
    if column:
        rows = ops.reshape(whole, np.array(weights.codes.shape), False)
        return ops.transpose(rows, np.array([1, 0]))
    return ops.reshape(whole, np.array(shape), False)


def _constant(codes: Array, bits: int, shape: tuple[int, ...]) -> Any:
    openvino = library("openvino")
    kind = getattr(openvino.Type, TYPES[bits])
    data = packed(codes.reshape(-1), TYPES[bits])
    return library("openvino.op").Constant(openvino.Tensor(data, openvino.Shape(shape), kind), False)


def packed(codes: Array, kind: str) -> Array:
    """Codes [n] as the bytes of OpenVINO's constants of that type, the last ones filled up with zeros.

    i4, u2  the first code in the lowest bits
    u3      8 codes in 3 bytes: their lower two bits, four a byte, then their upper bits; the first code in the highest
    u6      4 codes in 3 bytes: their lower four bits, two a byte, then their upper two; the first in the highest
    (openvino's element iterator, found by unpacking random bytes with 2026.4)
    """
    if kind == "i8":
        return codes.astype(np.int8)
    bits = int(kind[1])
    count = {"u2": 4, "i4": 2, "u3": 8, "u6": 4}[kind]
    unsigned = np.pad(codes.astype(np.uint8) & (2**bits - 1), (0, -codes.size % count)).reshape(-1, count)
    if kind in ("u2", "i4"):
        shifts = (bits * np.arange(count)).astype(np.uint8)
        return np.asarray(np.bitwise_or.reduce(unsigned << shifts, axis=1), np.uint8)
    low = 2 if kind == "u3" else 4
    lower = _from_the_top(unsigned & (2**low - 1), low)
    upper = _from_the_top(unsigned >> low, bits - low)
    return np.concatenate([lower, upper], axis=1).reshape(-1)


def _from_the_top(parts: Array, bits: int) -> Array:
    """[n, count] parts of so many bits as [n, count bits / 8] bytes, the first part in the highest bits."""
    each = 8 // bits
    shifts = (8 - bits * (1 + np.arange(each))).astype(np.uint8)
    return np.asarray(np.bitwise_or.reduce(parts.reshape(len(parts), -1, each) << shifts, axis=2), np.uint8)

"""Codes of fewer than 8 bits as bytes of exactly that many bits, and the subgraph that unpacks them.

ONNX has a type of 4 bits and, before opset 25, none of 2. So codes are split into planes of 4, 2 and 1 bits: 3 bits are
a plane of 2 and one of 1. Shifts, masks and ors put them together; where they are constants an engine does that once,
when it loads the graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .nodes import Writer

__all__ = ["PLANES", "packs_by_row", "planes", "unpacked"]

Array = NDArray[Any]

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
"""Bits of a code -> bits of its planes, the highest bits first."""


def planes(codes: Array, bits: int) -> list[tuple[int, Array]]:
    """Split whole numbers below 2^bits into planes: (bits of the plane, its bytes), the highest bits first.

    codes  [..., n] -> bytes [..., ceil(n bits_of_plane / 8)], the first code in the lowest bits
    """
    unsigned, left, found = codes.astype(np.uint8), bits, []
    for width in PLANES[bits]:
        left -= width
        part = (unsigned >> left) & (2**width - 1)
        count = 8 // width
        tail = [(0, 0)] * (part.ndim - 1) + [(0, -part.shape[-1] % count)]
        part = np.pad(part, tail).reshape(*part.shape[:-1], -1, count)
        shifts = (width * np.arange(count)).astype(np.uint8)
        found.append((width, np.bitwise_or.reduce(part << shifts, axis=-1).astype(np.uint8)))
    return found


def packs_by_row(width: int, bits: int) -> bool:
    """Whether rows of so many codes begin at whole bytes."""
    return all(width * plane % 8 == 0 for plane in PLANES[bits])


def unpacked(graph: Writer, codes: Array, bits: int, name: str, rows: Any = None) -> Any:
    """Value of the unsigned codes, uint8 of their own shape, computed from their planes.

    rows  numbers of the rows wanted: the value is [*rows.shape, width] of codes [count, width] that `packs_by_row`,
          and no other row is unpacked. None: all, from constants alone
    """
    shape = codes.shape if rows is None else (*[0] * len(rows.shape), codes.shape[-1])  # 0: as it is
    parts = []
    for width, data in planes(codes.ravel() if rows is None else codes, bits):
        stored = graph.weight(f"{name}.{width}", data)
        parts.append((width, stored if rows is None else graph.add("Gather", stored, rows)))
    joined, left = None, bits
    for width, data in parts:
        left -= width
        count = 8 // width
        shifts = graph.constant((width * np.arange(count)).astype(np.uint8))
        part = graph.add("Unsqueeze", data, graph.sizes(-1))
        part = graph.add("BitShift", part, shifts, attributes={"direction": "RIGHT"})
        part = graph.add("BitwiseAnd", part, graph.constant(np.array(2**width - 1, np.uint8)))
        if codes.size * width % 8 and rows is None:  # the last byte is not full
            part = graph.add("Reshape", part, graph.sizes(-1))
            part = graph.add("Slice", part, graph.sizes(0), graph.sizes(codes.size))
        part = graph.add("Reshape", part, graph.sizes(*shape))
        if left:
            shift = graph.constant(np.array(left, np.uint8))
            part = graph.add("BitShift", part, shift, attributes={"direction": "LEFT"})
        joined = part if joined is None else graph.add("BitwiseOr", joined, part)
    return joined

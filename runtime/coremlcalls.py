"""Calling a Core ML package: its sizes are fixed, its layout may be that of Apple's Swift package, it may be chunks.

The same adaptation for the package on a Mac (backends/coreml.py) and for its evaluation elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput

__all__ = ["Call", "chained", "fitted"]

Array = NDArray[Any]
Call: TypeAlias = Callable[[Mapping[str, Array]], dict[str, Array]]
"""Named arrays of exactly the package's shapes in, named arrays out."""


def chained(calls: Sequence[Call]) -> Call:
    """Chunks of one network as one call: each gets the network's inputs and what the chunks before it put out."""

    def call(feeds: Mapping[str, Array]) -> dict[str, Array]:
        known, found = dict(feeds), dict[str, Array]()
        for each in calls:
            found = each(known)
            known |= found
        return found

    return call


def fitted(
    call: Call, shapes: Mapping[str, tuple[int, ...]], feeds: Mapping[str, Array], outputs: Sequence[str]
) -> dict[str, Array]:
    """Run a batch of any size through a package of a fixed one.

    shapes  input -> the package's shape, its batch first; of a condition [batch, width, 1, length] where the feed is
            [batch, length, width]: the layout in which the Neural Engine and Apple's Swift package have it
    The last group is filled up with copies of its last sample. Raises BadInput for an input that does not fit.
    """
    given = {name: _laid_out(name, feeds, shape) for name, shape in shapes.items()}
    size = next(iter(shapes.values()))[0]
    count = len(next(iter(given.values())))
    found: dict[str, list[Array]] = {name: [] for name in outputs}
    for start in range(0, count, size):
        group = {name: _filled(value[start : start + size], size) for name, value in given.items()}
        result = call(group)
        for name in outputs:
            found[name].append(result[name][: count - start])
    return {name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}


def _laid_out(name: str, feeds: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
    value = feeds[name]
    if value.ndim == 3 and len(shape) == 4 and shape[2] == 1:
        value = np.ascontiguousarray(value.transpose(0, 2, 1)[:, :, None])
    if value.shape[1:] != shape[1:]:
        raise BadInput(
            f"{name} of shape {feeds[name].shape}",
            expected=f"that of the package, {shape}",
            fix="ask for the size the bundle was exported for",
        )
    return value


def _filled(value: Array, size: int) -> Array:
    missing = size - len(value)
    return np.concatenate([value, np.repeat(value[-1:], missing, axis=0)]) if missing else value

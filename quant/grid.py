"""Grids of codes for what a layer is fed: the one of least error over a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.quantized import Activations

__all__ = ["BINS", "codes_of_range", "codes_of_values", "errors", "search"]

Array = NDArray[Any]

BINS = 4096
"""Of a histogram: 16 for a code of 8 bits over the whole range, one where the search takes a sixteenth of it."""

POWER = 2.4
"""Of the error in the search, as for weights: clipped values weigh a little more than in a square (Q-Diffusion)."""

SHRINKS = np.geomspace(1, 1 / 64, 64)
"""Of the range, both ends together; outliers of trained networks reach some tens of times the rest."""

STRETCHES = np.geomspace(0.5, 2, 33)
"""Of each end alone, around the best of those: one end is often a short tail (SiLU's -0.28)."""


def codes_of_range(low: float, high: float, bits: int) -> Activations:
    """The grid of 2^bits codes over a range, which is stretched to 0: code `zero` is exactly 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    top = 2**bits - 1
    scale = np.float32((high - low) / top)
    if not scale >= np.finfo(np.float32).tiny:  # nothing but zeros: any scale will do
        return Activations(1.0, 0, bits)
    return Activations(float(scale), int(np.clip(np.rint(-low / scale), 0, top)), bits)


def codes_of_values(values: Array, bits: int) -> Activations:
    """The grid of least sum |x - x^|^2.4 over values at hand."""
    bound = float(np.abs(values).max()) or 1.0
    counts, edges = np.histogram(values, BINS, (-bound, bound))
    used = np.flatnonzero(counts)
    low, high = float(values.min()), float(values.max())
    return search(edges[used] + bound / BINS, counts[used], 2 * bound / BINS, low, high, bits)


def search(values: Array, counts: Array, width: float, low: float, high: float, bits: int) -> Activations:
    """The grid of least error over a histogram: both ends are shrunk together first, and then each alone.

    values, counts, width  of its bins
    low, high              least and largest of all that was counted
    """
    low, high = min(low, 0.0), max(high, 0.0)

    def best(ends: Sequence[tuple[float, float]]) -> tuple[float, float]:
        tried = [codes_of_range(*pair, bits) for pair in ends]
        return ends[int(np.argmin(errors(values, counts, width, tried, POWER)))]

    least, most = best([(low * s, high * s) for s in SHRINKS])
    for _ in range(2):
        least, most = best([(max(low, least * s), most) for s in STRETCHES] + [(least, most)])
        least, most = best([(least, min(high, most * s)) for s in STRETCHES] + [(least, most)])
    return codes_of_range(least, most, bits)


def errors(
    values: Array, counts: Array, width: float, tried: Sequence[Activations], power: float
) -> NDArray[np.float64]:
    """[tried] sum of |x - x^|^power. Where steps are finer than two bins, values are taken as spread evenly in them."""
    scale = np.array([how.scale for how in tried])[:, None]
    zero = np.array([how.zero for how in tried])[:, None]
    top = 2 ** tried[0].bits - 1
    code = np.rint(values / scale) + zero
    inside = (code >= 0) & (code <= top)
    error = np.abs(scale * (np.clip(code, 0, top) - zero) - values) ** power
    even = np.broadcast_to((scale / 2) ** power / (power + 1), error.shape)
    error = np.where(inside & (scale < 2 * width), even, error)
    return np.asarray(error @ counts, np.float64)

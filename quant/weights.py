"""Integer weights by rounding to nearest: which grid a row or group of weights lies on, and its codes there.

The grid is found by search (Li et al. 2021, BRECQ, arXiv:2102.05426, as Q-Diffusion uses it): the range of the weights
is shrunk in steps, and the one of least sum |w - w^|^2.4 is kept. No layer's inputs are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.quantized import Weights
from ..runtime.errors import BadInput

__all__ = ["codes_on", "group_size", "nearest", "smoothed", "steps_of"]

Array = NDArray[Any]

POWER = 2.4
"""Of the error in the search: weighs clipped values a little more than squares do (Q-Diffusion's code)."""

SHRINKS = tuple(1 - i / 100 for i in range(80))
"""Of the range, the same search's."""

SHRINKS_8 = SHRINKS[:1]
"""At 8 bits: the range as it is. All 80 gain 0.05 dB on the weights of emoji-64's U-Net, 0.06 on its decoder's."""

BASES = (1.0, 0.96, 0.92, 0.88, 0.84, 1.06)
"""Row scales tried where groups have multipliers, as shares of the smallest with which no multiplier is too large."""

CACHED = 1 << 16
"""Entries worked on at once, so that the temporaries (256 KiB each) stay in a core's second cache."""


def nearest(
    weight: Array,
    bits: int,
    *,
    group: int = 0,
    symmetric: bool = True,
    multiplier: bool = False,
    importance: Array | None = None,
    name: str = "a layer",
) -> Weights:
    """Every weight rounded to the nearest value of its row's or group's grid.

    weight      [out, ...] as torch lays it out; an Embedding's rows are its entries
    group       entries of a row that share a scale, at most (see group_size); 0: all of it
    symmetric   the grid has no zero point. At 8 bits -127 to 127, below that one code more on the negative side
    multiplier  groups at whole multiples of one float scale a row: with it 8-bit kernels can take what was stored in 4
                bits (the progressive groups of QServe, Lin et al. 2024, arXiv:2405.04532)
    importance  [inner] of each entry of a row, its input's mean square say: weighs the errors in the search
    name        of the layer, for messages
    Raises BadInput for weights that are not finite, and for a number of bits or a group there is no grid for.
    """
    rows = _rows(weight, bits, group, name)
    size = group_size(rows.shape[1], group)
    out, groups = len(rows), rows.shape[1] // size
    if importance is not None:
        importance = np.asarray(importance, np.float32).reshape(groups, size)
        importance = importance / max(float(importance.max()), float(np.finfo(np.float32).tiny))
    # at 8 bits a multiplier can only be 1
    multiplier = multiplier and groups > 1 and bits < 8
    scale = np.empty((out, 1 if multiplier else groups), np.float32)
    zero = None if symmetric else np.empty((out, groups), np.int8)
    whole = np.empty((out, groups), np.uint8) if multiplier else None
    for part in _chunks(out, rows.shape[1]):
        w = rows[part].reshape(-1, groups, size)
        # in units of the largest weight of a row nothing over- or underflows
        unit = np.abs(w).max(axis=(1, 2), keepdims=True)
        unit[unit == 0] = 1
        w = w / unit
        grid = _Search(w, bits, symmetric, importance)
        step = grid.search(SHRINKS_8 if bits == 8 else SHRINKS)
        if zero is not None:
            zero[part] = grid.zero[:, :, 0]
        if whole is not None:
            step, whole[part] = grid.multiples(step)
        scale[part] = np.maximum(step * unit[:, :, 0], np.finfo(np.float32).tiny)
    empty = Weights(
        bits, np.empty(rows.shape, np.int8), scale, tuple(np.shape(weight)), zero=zero, multiplier=whole
    )
    return replace(empty, codes=codes_on(rows, empty))


def smoothed(weight: Array, smooth: Array | None) -> Array:
    """The weights whose input is divided by `smooth`: [in channels], counted over all groups of a convolution; None: as
    they are.
    """
    if smooth is None:
        return weight
    groups, kernel = len(smooth) // weight.shape[1], [1] * (weight.ndim - 2)
    times = smooth.reshape(groups, 1, -1, *kernel)
    return (weight.reshape(groups, -1, *weight.shape[1:]) * times).reshape(weight.shape)


def group_size(inner: int, group: int) -> int:
    """Entries in a group, a divisor of a row of `inner`: the largest up to `group`, or, where a row has none of at
    least a quarter of that, the smallest above; a scale for every few weights would cost more than their codes.
    """
    if group == 0 or group >= inner:
        return inner
    divisors = [size for size in range(1, inner + 1) if inner % size == 0]
    below = max(size for size in divisors if size <= group)
    return below if below >= group / 4 else min(size for size in divisors if size > group)


def steps_of(grid: Weights) -> NDArray[np.float32]:
    """[out, groups]: what one code is worth in each group."""
    if grid.multiplier is None:
        return grid.scale
    return grid.scale * grid.multiplier.astype(np.float32)


def lowest_code(bits: int, symmetric: bool) -> int:
    return -127 if bits == 8 and symmetric else -(2 ** (bits - 1))


def codes_on(rows: Array, grid: Weights) -> NDArray[np.int8]:
    """[out, inner] codes of the nearest values of a grid that is there already.

    rows  [out, inner]
    """
    step = steps_of(grid)
    low, high = lowest_code(grid.bits, grid.zero is None), 2 ** (grid.bits - 1) - 1
    codes: NDArray[np.int8] = np.empty_like(grid.codes)
    for part in _chunks(len(codes), codes.shape[1]):
        q = rows[part].reshape(-1, step.shape[1], codes.shape[1] // step.shape[1]) / step[part, :, None]
        np.rint(q, out=q)
        if grid.zero is not None:
            q += grid.zero[part, :, None]
        codes[part] = np.clip(q, low, high).reshape(len(q), -1)
    return codes


def _rows(weight: Array, bits: int, group: int, name: str) -> NDArray[np.float32]:
    if not 2 <= bits <= 8:
        raise BadInput(f"{name}: weights of {bits} bits", expected="2 to 8")
    if group < 0:
        raise BadInput(f"{name}: groups of {group} weights", expected="0 for whole rows, or a number above 0")
    weight = np.asarray(weight, np.float32)
    if weight.ndim == 0 or weight.size == 0:
        raise BadInput(f"{name}: weights of shape {weight.shape}", expected="at least one row of them")
    if not np.isfinite(weight).all():
        raise BadInput(
            f"{name}: {np.count_nonzero(~np.isfinite(weight)):,} of {weight.size:,} weights are not finite",
            expected="numbers",
            fix="the checkpoint is damaged or was trained to divergence: take another",
        )
    return weight.reshape(len(weight), -1)


def _chunks(rows: int, inner: int) -> Iterator[slice]:
    many = max(1, CACHED // inner)
    return (slice(begin, begin + many) for begin in range(0, rows, many))


class _Search:
    """Grids for some rows of weights in units of their largest, w [rows, groups, size]; buffers are used again."""

    def __init__(self, w: NDArray[np.float32], bits: int, symmetric: bool, importance: Array | None) -> None:
        self.w, self.importance = w, importance
        self.low, self.high = lowest_code(bits, symmetric), 2 ** (bits - 1) - 1
        self.q = np.empty_like(w)
        if symmetric:
            self.widest = np.abs(w).max(axis=2, keepdims=True) / self.high
            self.zero = np.zeros((*w.shape[:2], 1), np.float32)
        else:
            # 0 stays inside the range and exactly on the grid: padding and pruned weights mean it
            least, most = (f(w, axis=2, keepdims=True) for f in (np.min, np.max))
            least, most = np.minimum(least, 0), np.maximum(most, 0)
            self.widest = (most - least) / (self.high - self.low)
            empty = np.where(self.widest > 0, self.widest, 1)
            self.zero = np.clip(np.rint(self.low - least / empty), self.low, self.high).astype(np.float32)
        # whatever is this far below its row's largest weight may round to 0, but must not divide by it
        self.widest = np.where(self.widest > 0, np.maximum(self.widest, np.float32(1e-30)), np.float32(1))
        self.asymmetric = not symmetric

    def error(self, step: Array) -> Array:
        """[rows, groups] sum of |w - w^|^p with codes worth `step` [rows, groups, 1]."""
        q = np.multiply(self.w, 1 / step, out=self.q)
        np.rint(q, out=q)
        if self.asymmetric:
            np.clip(q, self.low - self.zero, self.high - self.zero, out=q)
        else:
            np.clip(q, self.low, self.high, out=q)
        q *= step
        q -= self.w
        if self.importance is None:
            np.abs(q, out=q)
            np.power(q, np.float32(POWER), out=q)
        else:
            np.square(q, out=q)
            q *= self.importance
        error: Array = np.add.reduce(q, axis=2, dtype=np.float64)
        return error

    def search(self, shrinks: tuple[float, ...]) -> Array:
        """[rows, groups] the step of least error."""
        best: Array = self.widest
        if len(shrinks) > 1:
            least = np.full(self.w.shape[:2], np.inf)
            best = self.widest.copy()
            for shrink in shrinks:
                step = self.widest * np.float32(shrink)
                error = self.error(step)
                better = error < least
                least[better], best[better] = error[better], step[better]
        best = best[:, :, 0]
        return best

    def multiples(self, step: Array) -> tuple[Array, Array]:
        """One step a row [rows, 1] and whole multiples of it near the steps wanted [rows, groups]."""
        # multiplier (code - zero) must stay within the 127 of a byte
        most = 127 // np.maximum(self.high - self.zero, self.zero - self.low)[:, :, 0]
        used = np.abs(self.w).max(axis=2) > 0
        smallest = np.where(used, step / most, 0).max(axis=1, keepdims=True)
        smallest[smallest == 0] = 1
        least = np.full((len(step), 1), np.inf)
        best, whole = smallest.copy(), np.ones(step.shape, np.uint8)
        for share in BASES:
            base = (smallest * share).astype(np.float32)
            error = np.full(step.shape, np.inf)
            taken = np.ones(step.shape, np.float32)
            for beside in (-1, 0, 1):
                m = np.clip(np.rint(step / base) + beside, 1, most).astype(np.float32)
                found = self.error((base * m)[:, :, None])
                better = found < error
                error[better], taken[better] = found[better], m[better]
            total = error.sum(axis=1, keepdims=True)
            better = (total < least)[:, 0]
            least[better], best[better], whole[better] = total[better], base[better], taken[better]
        return best, whole

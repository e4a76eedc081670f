"""Weights between two neighbouring codes each, with a gradient: the rectified sigmoid of AdaRound."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.quantized import Layer
from .weights import lowest_code, steps_of

__all__ = ["Soft"]

Array = NDArray[Any]

STRETCH = (-0.1, 1.1)
"""gamma and zeta of the rectified sigmoid h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) (AdaRound, eq. 23)."""


@dataclass(frozen=True, eq=False)
class Soft:
    """Weights of one layer between two neighbouring codes each."""

    v: Any
    """[out, inner], learned."""
    floor: Any
    """[out, inner], the lower of the two, as code minus zero."""
    step: Any
    """[out, groups, 1]"""
    ends: tuple[Any, Any]
    """Lowest and highest code minus zero, [out, groups, 1] or numbers."""
    shape: tuple[int, ...]

    @classmethod
    def at(cls, weight: Array, layer: Layer) -> Soft:
        """At the weight itself, as far as the layer's grid goes: `hard` gives the nearest codes."""
        th, w = torch(), layer.weights
        step = steps_of(w)[:, :, None]
        zero = np.zeros((1, 1, 1), np.float32) if w.zero is None else w.zero.astype(np.float32)[:, :, None]
        low, high = lowest_code(w.bits, w.zero is None), 2 ** (w.bits - 1) - 1
        unit = np.clip(weight.reshape(len(step), step.shape[1], -1) / step, low - zero, high - zero)
        # the highest code is the upper of two, so that it can be left
        floor = np.minimum(np.floor(unit), high - zero - 1)
        # h exactly 0 or 1 has no gradient
        h = np.clip(unit - floor, 0.01, 0.99)
        v = -np.log((STRETCH[1] - STRETCH[0]) / (h - STRETCH[0]) - 1)
        ends = (th.from_numpy(low - zero), th.from_numpy(high - zero))
        v = th.from_numpy(v.astype(np.float32)).requires_grad_(True)
        return cls(v, th.from_numpy(floor.astype(np.float32)), th.from_numpy(step), ends, w.shape)

    def h(self) -> Any:
        return (self.v.sigmoid() * (STRETCH[1] - STRETCH[0]) + STRETCH[0]).clamp(0, 1)

    def weight(self) -> Any:
        whole = (self.floor + self.h()).clamp(*self.ends)
        return (whole * self.step).reshape(self.shape)

    def hard(self, layer: Layer) -> Layer:
        """With the code that is nearer."""
        w = layer.weights
        with torch().no_grad():
            whole = (self.floor + (self.h() >= 0.5)).clamp(*self.ends).numpy()
        zero = 0 if w.zero is None else w.zero.astype(np.float32)[:, :, None]
        return replace(layer, weights=replace(w, codes=(whole + zero).astype(np.int8).reshape(w.codes.shape)))

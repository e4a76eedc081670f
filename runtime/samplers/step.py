"""What samplers take and give, and the two frames most of them work in; see the package's docstring."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..process import Array, Process
from ..step import Denoise, Noise, Step

__all__ = ["NO_SIGNAL", "Denoise", "Noise", "Step", "frame", "frame_times", "noise_to_signal"]

NO_SIGNAL = 1e-6
"""alpha at or below it counts as 0: x / alpha would lose the ten digits that float64 keeps above it."""


def frame(process: Process, times: ArrayLike) -> tuple[Array, Array]:
    """Scale s and noise level c such that y = x / s obeys dy/dc = (y - x0) / c.

    Where alpha stays positive, s = alpha gives y = x0 + c noise (EDM's frame, Karras et al. 2022, section 2). Where
    it reaches 0 (rectified flow, zero terminal SNR) that frame has no start, and s = alpha + sigma gives
    y = (1 - c) x0 + c noise; both have the same ODE.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    s = alpha if process.alpha(process.t_max) > NO_SIGNAL else alpha + sigma
    return s, sigma / s


def frame_times(process: Process, c: ArrayLike) -> Array:
    """The times of noise levels c > 0 of `frame`."""
    c = np.asarray(c)
    if process.alpha(process.t_max) <= NO_SIGNAL:
        with np.errstate(divide="ignore"):
            return process.t_of_lam(np.log1p(-c) - np.log(c))
    return process.t_of_lam(-np.log(c))


def noise_to_signal(process: Process, times: ArrayLike) -> Array:
    """sigma / alpha, EDM's noise level; inf where there is no signal."""
    alpha, sigma = process.alpha(times), process.sigma(times)
    return np.where(alpha > NO_SIGNAL, sigma / np.maximum(alpha, NO_SIGNAL), np.inf)

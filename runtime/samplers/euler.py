"""Euler and Heun on the probability-flow ODE dx/dsigma = (x - x0) / sigma."""

from __future__ import annotations

from collections.abc import Iterator

from ..process import Array, Process
from .step import Denoise, Noise, Step


def _frame(process: Process, times: Array) -> tuple[Array, Array]:
    """Scale s and noise level c such that y = x / s obeys dy/dc = (y - x0) / c.

    Where alpha stays positive, s = alpha gives y = x0 + c noise (EDM's frame, Karras et al. 2022, section 2). Where
    it reaches 0 (rectified flow, zero terminal SNR) that frame has no start, and s = alpha + sigma gives
    y = (1 - c) x0 + c noise; both have the same ODE.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    s = alpha if process.alpha(process.t_max) > 0 else alpha + sigma
    return s, sigma / s


def euler(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """Euler's method. Karras et al. 2022, algorithm 1 without the correction <arXiv:2206.00364>.

    The same steps as DDIM with eta 0; they differ in the time grids that people use them with.
    """
    s, c = _frame(process, times)
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        d = (x / s[i] - x0) / c[i]
        x = s[i + 1] * (x / s[i] + (c[i + 1] - c[i]) * d)
        yield Step(i, x, x0)


def heun(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """Heun's second-order method. Karras et al. 2022, algorithm 1 <arXiv:2206.00364>.

    Two network calls a step, one for a last step onto sigma 0. Not Heun's third-order method.
    """
    s, c = _frame(process, times)
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        y = x / s[i]
        d = (y - x0) / c[i]
        y_next = y + (c[i + 1] - c[i]) * d
        if c[i + 1] > 0:
            x0 = denoise(s[i + 1] * y_next, float(times[i + 1]))
            d_next = (y_next - x0) / c[i + 1]
            y_next = y + (c[i + 1] - c[i]) * (0.5 * d + 0.5 * d_next)
        x = s[i + 1] * y_next
        yield Step(i, x, x0)

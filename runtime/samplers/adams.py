"""Adams-Bashforth methods on the slope d = (y - x0) / c of the probability flow, in the variables of `frame`.

Where alpha stays positive the slope is the predicted noise and c = sigma / alpha: the published form of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from ..process import Array, DiscreteVP, Process
from .euler import Level, levels
from .step import Denoise, Noise, Step, frame

BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the latest slopes, newest first, on an even grid; Hairer, Norsett and Wanner 1993, section III.1."""


def lms(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """Linear multistep: Adams-Bashforth for the grid as it is, as k-diffusion has it.

    order  slopes in use, 1 to 4 and more; the polynomial through them is integrated exactly in c

    One network call a step. The first steps have fewer slopes and lower order, so that the error of the first, of
    second order, is what remains on ever finer grids.
    """
    c = frame(process, times)[1]
    slopes: list[Array] = []
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        x0 = denoise(x, here[0])
        slopes = [_slope(x, x0, here), *slopes][:order]
        u = (c[i + 1 - len(slopes) : i + 1][::-1] - c[i]) / (c[i + 1] - c[i])
        powers = np.arange(len(slopes))
        weights = np.linalg.solve(u ** powers[:, None], 1 / (powers + 1))
        x = _along(x, _combined(weights, slopes), here, there)
        yield Step(i, x, x0)


def ipndm(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """iPNDM: Adams-Bashforth weights of an even grid, whatever the grid. Zhang and Chen 2022 <arXiv:2204.13902>.

    order  slopes in use, 1 to 4

    One network call a step. Orders above 2 hold on grids even in c only; on others it is second order. diffusers'
    IPNDMScheduler divides by 1e-8 at its first time, where alpha is 0, and loses that prediction; this keeps it.
    """
    slopes: list[Array] = []
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        x0 = denoise(x, here[0])
        slopes = [_slope(x, x0, here), *slopes][:order]
        x = _along(x, _combined(BASHFORTH[len(slopes) - 1], slopes), here, there)
        yield Step(i, x, x0)


def plms(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, order: int = 4
) -> Iterator[Step]:
    """PLMS: a pseudo improved Euler step, then iPNDM; what Stable Diffusion calls PNDM without its Runge-Kutta steps.

    Liu et al. 2022 <arXiv:2202.09778>; order 2 is their S-PNDM. steps + 1 network calls.
    """
    slopes: list[Array] = []
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        x0 = denoise(x, here[0])
        slopes = [_slope(x, x0, here), *slopes][:order]
        slope = _combined(BASHFORTH[len(slopes) - 1], slopes)
        if i == 0 and there[2] > 0:
            trial = _along(x, slope, here, there)
            x0 = denoise(trial, there[0])
            slope = 0.5 * slope + 0.5 * _slope(trial, x0, there)
        x = _along(x, slope, here, there)
        yield Step(i, x, x0)


def pndm(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """F-PNDM: three pseudo Runge-Kutta steps, then Adams-Bashforth of order 4. Liu et al. 2022, algorithm 2
    <arXiv:2202.09778>.

    steps + 9 network calls. The Runge-Kutta steps ask for the middle in time, on a discrete model the nearest trained
    level; a step onto sigma 0 among the first three is Euler's. Fourth order on grids even in c, second on others.
    diffusers takes the middle of an odd gap, and the state there, from two different roundings.
    """
    grid = levels(process, times)
    middle = (times[:3] + times[1:4]) / 2 if len(times) > 3 else (times[:-1] + times[1:]) / 2
    halfway = levels(process, np.round(middle) if isinstance(process, DiscreteVP) else middle)
    slopes: list[Array] = []
    for i, (here, there) in enumerate(pairwise(grid)):
        x0 = denoise(x, here[0])
        slopes = [_slope(x, x0, here), *slopes][:4]
        slope = slopes[0]
        if len(slopes) == 4:
            slope = _combined(BASHFORTH[3], slopes)
        elif there[2] > 0:
            total = slope
            for weight, level in ((2, halfway[i]), (2, halfway[i]), (1, there)):
                trial = _along(x, slope, here, level)
                x0 = denoise(trial, level[0])
                slope = _slope(trial, x0, level)
                total = total + weight * slope
            slope = total / 6
        x = _along(x, slope, here, there)
        yield Step(i, x, x0)


def _slope(x: Array, x0: Array, level: Level) -> Array:
    _, s, c = level
    return (x / s - x0) / c


def _along(x: Array, slope: Array, here: Level, there: Level) -> Array:
    (_, s, c), (_, s_next, c_next) = here, there
    return s_next * (x / s + (c_next - c) * slope)


def _combined(weights: Sequence[float] | Array, slopes: Sequence[Array]) -> Array:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        total = total + weight * slope
    return total

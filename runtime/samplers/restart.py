"""Restart: back up with fresh noise and down again, a few times, in chosen intervals of noise."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..process import Array, Process
from .euler import Level, Move, add_noise, heun_move, levels
from .step import Denoise, Noise, Step, noise_to_signal

Interval = tuple[float, float, int, int]
"""(low, high, steps, times): noise levels sigma / alpha, steps down from high to low, how often."""

CIFAR10: tuple[Interval, ...] = ((0.06, 0.30, 2, 2),)
"""The authors' first example <github.com/Newbeeer/diffusion_restart_sampling>; they count grid points, steps + 1."""


def restart(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    intervals: tuple[Interval, ...] = CIFAR10,
    s_noise: float = 1.0,
    move: Move = heun_move,
) -> Iterator[Step]:
    """Restart sampling. Xu et al. 2023 <arXiv:2306.14878>.

    intervals  where to restart; an interval begins at the grid's time nearest to its low level, and is left out when
               that time is not below its high level or the process has no such noise
    s_noise    standard deviation of the noise
    move       heun_move as in the paper, or euler_move

    Every step is yielded, those of the restarts too: more states than the grid has steps. Theirs are even in
    (sigma / alpha)^(1/7), as EDM's grids. Second order between restarts; without any it is `heun`.
    """
    rounds = _rounds(process, times, intervals)
    index = 0
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        x, x0 = move(denoise, x, here, there)
        yield Step(index, x, x0)
        index += 1
        for a, b, descent in rounds.get(i + 1, ()):
            x = a * x + s_noise * b * noise()
            for upper, lower in pairwise(descent):
                x, x0 = move(denoise, x, upper, lower)
                yield Step(index, x, x0)
                index += 1


def _rounds(
    process: Process, times: Array, intervals: tuple[Interval, ...]
) -> dict[int, list[tuple[float, float, list[Level]]]]:
    """By index of the grid's time: each restart's coefficients of state and noise, and its way down."""
    rho = 7.0  # Karras et al. 2022, equation 5
    sigma = noise_to_signal(process, times)
    top = float(noise_to_signal(process, np.array(process.t_max)))
    found: dict[int, list[tuple[float, float, list[Level]]]] = {}
    for low, high, steps, repeats in intervals:
        inside = np.flatnonzero((sigma > 0) & (sigma < high) & (np.arange(len(sigma)) > 0))
        if len(inside) == 0 or high > top:
            continue
        i = int(inside[np.abs(sigma[inside] - low).argmin()])
        ramp = np.linspace(high ** (1 / rho), sigma[i] ** (1 / rho), steps + 1) ** rho
        inner = process.t_of_lam(-np.log(ramp))
        inner[-1] = times[i]
        a, b = add_noise(process, times[i], inner[0])
        found.setdefault(i, []).extend([(float(a), float(b), levels(process, inner))] * repeats)
    return found

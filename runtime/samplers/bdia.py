"""BDIA: DDIM corrected by its own step back, which makes it exactly invertible."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
from .step import Denoise, Noise, Step


def bdia(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    gamma: float = 1.0,
    x_before: Array | None = None,
    t_before: float = 0.0,
) -> Iterator[Step]:
    """BDIA-DDIM. Zhang, Lewis and Kleijn 2023 <arXiv:2307.10829>. One network call a step; second order.

    gamma     weight of the correction. 1 inverts without loss of digits; for sampling alone the authors take 0.5 at
              10 steps up to 1 at 40 <github.com/guoqiang-zhang-x/BDIA>
    x_before  the state before x, at time t_before; without one the first step is DDIM's

    x_{i+1} = DDIM(x_i; i -> i+1) + gamma (x_{i-1} - DDIM(x_i; i -> i-1)), both with the one prediction at x_i.
    Solved for x_{i-1} it reads the same the other way round with 1 / gamma: see inversion.py.
    """
    grid = np.concatenate([[t_before], times])
    alpha, sigma = process.alpha(grid), process.sigma(grid)
    for i, t in enumerate(times[:-1], start=1):  # grid[i] is t
        x0 = denoise(x, float(t))
        eps = (x - alpha[i] * x0) / sigma[i]
        ahead = alpha[i + 1] * x0 + sigma[i + 1] * eps
        if x_before is not None:
            ahead = ahead + gamma * (x_before - (alpha[i - 1] * x0 + sigma[i - 1] * eps))
        x_before, x = x, ahead
        yield Step(i - 1, x, x0)

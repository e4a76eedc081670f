"""DDIM: first order, any amount of fresh noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
from .step import Denoise, Noise, Step


def ddim(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, eta: float = 0.0
) -> Iterator[Step]:
    """DDIM. Song, Meng and Ermon 2020, equations 12 and 16 <arXiv:2010.02502>.

    eta  0 is deterministic (a first-order ODE solver), 1 is ancestral sampling as in DDPM.

    Equation 16's noise level is written with h, the step in log(alpha / sigma): for a variance preserving process
    eta sqrt((1 - a')/(1 - a)) sqrt(1 - a/a') equals eta sigma' sqrt(1 - exp(-2h)), and the latter holds for any.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        eps = (x - alpha[i] * x0) / sigma[i]
        exp_minus_h = alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])
        s = eta * sigma[i + 1] * np.sqrt(1 - exp_minus_h**2)
        x = alpha[i + 1] * x0 + np.sqrt(sigma[i + 1] ** 2 - s**2) * eps
        if s > 0:
            x = x + s * noise()
        yield Step(i, x, x0)

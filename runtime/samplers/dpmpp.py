"""DPM-Solver++: exponential integrators on the data prediction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
from ..process import lam as log_snr
from .step import Denoise, Noise, Step


def dpmpp_2m(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M): second order, multistep, midpoint form. Lu et al. 2022, algorithm 2 <arXiv:2211.01095>.

    One network call a step. The first step, and a last step onto sigma 0, are first order.
    """
    alpha, sigma, lam = process.alpha(times), process.sigma(times), log_snr(process, times)
    x0_last, h_last = None, 0.0
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        h = lam[i + 1] - lam[i]
        if x0_last is None or not np.isfinite(h) or not np.isfinite(h_last):
            target = x0  # no history, or a step from alpha = 0 or onto sigma = 0, where h is infinite
        else:
            target = x0 + (x0 - x0_last) * (h / (2 * h_last))  # where x0 will be half a step ahead
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * target
        x0_last, h_last = x0, h
        yield Step(i, x, x0)

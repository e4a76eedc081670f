"""The reverse of a process's own Markov chain: how ResShift, Resfusion and IR-SDE sample."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
from .step import Denoise, Noise, Step


def reverse_chain(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """Draw x_s from q(x_s | x_t, x0) as the forward chain has it, with the prediction for x0.

    ResShift (Yue et al. 2023, equation 6, arXiv:2307.12348), Resfusion (Shi et al. 2023, equation 33,
    arXiv:2311.14900), IR-SDE; for processes without an observation, ddpm. A deterministic mean onto sigma 0.
    """
    to_x0, to_x, s = _posterior(process, times)
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        x = to_x0[i] * x0 + to_x[i] * x
        if s[i] > 0:
            x = x + s[i] * noise()
        yield Step(i, x, x0)


def langevin_corrected(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, r: float = 0.5
) -> Iterator[Step]:
    """Predictor-corrector with one annealed Langevin step a level. Song et al. 2020 <arXiv:2011.13456>, appendix G.

    r  the corrector's signal-to-noise ratio: a step of 2 (r sigma)^2 along the score; 0.5 is SGMSE's (Richter et al.
       2022, arXiv:2208.05830), which takes 30 steps of two calls.
    The predictor is the reverse chain, exact for data at one point, where SGMSE has its Euler-Maruyama step.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    to_x0, to_x, s = _posterior(process, times)
    for i, t in enumerate(times[:-1]):
        toward = alpha[i] * denoise(x, float(t)) - x  # sigma^2 times the score
        x = x + 2 * r**2 * toward + 2 * r * sigma[i] * noise()
        x0 = denoise(x, float(t))
        x = to_x0[i] * x0 + to_x[i] * x
        if s[i] > 0:
            x = x + s[i] * noise()
        yield Step(i, x, x0)


def _posterior(process: Process, times: Array) -> tuple[Array, Array, Array]:
    """q(x_s | x_t, x0) for each step: what x0 and x_t contribute to the mean, and the standard deviation.

    A chain that keeps the share c(t)/c(s) of x_s on its way to x_t has k = c(t)/c(s) sigma_s^2/sigma_t^2 of x_t in the
    mean and variance sigma_s^2 - k^2 sigma_t^2. c is alpha for diffusions, and 1 where noise and residual are just
    added; the marginals, which are all that other samplers read, do not tell these apart.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    c = getattr(process, "decay", process.alpha)(times)
    k = c[:-1] / c[1:] * (sigma[1:] / sigma[:-1]) ** 2
    s = np.sqrt(np.maximum(sigma[1:] ** 2 - (k * sigma[:-1]) ** 2, 0.0))
    return alpha[1:] - k * alpha[:-1], k, s

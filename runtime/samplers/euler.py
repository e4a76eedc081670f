"""Euler and Heun on the probability-flow ODE dx/dsigma = (x - x0) / sigma, plain and with EDM's churn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from ..process import Array, Process
from .step import Denoise, Noise, Step, frame, noise_to_signal

Level = tuple[float, float, float]
"""A time with its scale s and noise level c; see `frame`."""
Move = Callable[[Denoise, Array, Level, Level], tuple[Array, Array]]
"""One step from a level to another: the new state and the latest data prediction."""


def euler(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """Euler's method. Karras et al. 2022, algorithm 1 without the correction <arXiv:2206.00364>.

    The same steps as DDIM with eta 0; they differ in the time grids that people use them with.
    """
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        x, x0 = euler_move(denoise, x, here, there)
        yield Step(i, x, x0)


def heun(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """Heun's second-order method. Karras et al. 2022, algorithm 1 <arXiv:2206.00364>.

    Two network calls a step, one for a last step onto sigma 0. Not Heun's third-order method.
    """
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        x, x0 = heun_move(denoise, x, here, there)
        yield Step(i, x, x0)


def euler_churn(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Iterator[Step]:
    """Euler steps, each after a little fresh noise: `heun_churn` without the correction, and with its options.

    diffusers' Euler schedulers with s_churn call the network before they add the noise; this calls it after, as EDM.
    """
    return _churn(euler_move, denoise, process, x, times, noise, (s_churn, s_tmin, s_tmax, s_noise))


def heun_churn(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
) -> Iterator[Step]:
    """EDM's stochastic sampler. Karras et al. 2022, algorithm 2 <arXiv:2206.00364>.

    s_churn         how much noise comes back in all; 0 is Heun's method
    s_tmin, s_tmax  noise levels sigma / alpha between which it does
    s_noise         standard deviation of that noise, a little over 1 against the detail that networks lose
    The defaults are the paper's for ImageNet-64 (table 5). A discrete model's last level is not left upwards.
    """
    return _churn(heun_move, denoise, process, x, times, noise, (s_churn, s_tmin, s_tmax, s_noise))


def levels(process: Process, times: ArrayLike) -> list[Level]:
    s, c = frame(process, times)
    return list(zip(np.asarray(times).tolist(), s.tolist(), c.tolist(), strict=True))


def euler_move(denoise: Denoise, x: Array, here: Level, there: Level) -> tuple[Array, Array]:
    (t, s, c), (_, s_next, c_next) = here, there
    x0 = denoise(x, t)
    d = (x / s - x0) / c
    return s_next * (x / s + (c_next - c) * d), x0


def heun_move(denoise: Denoise, x: Array, here: Level, there: Level) -> tuple[Array, Array]:
    (t, s, c), (t_next, s_next, c_next) = here, there
    x0 = denoise(x, t)
    y = x / s
    d = (y - x0) / c
    y_next = y + (c_next - c) * d
    if c_next > 0:
        x0 = denoise(s_next * y_next, t_next)
        d_next = (y_next - x0) / c_next
        y_next = y + (c_next - c) * (0.5 * d + 0.5 * d_next)
    return s_next * y_next, x0


def add_noise(process: Process, t: Array, t_noisier: Array) -> tuple[Array, Array]:
    """(a, b) such that a x_t + b noise is x at the noisier time, by the forward process."""
    a = process.alpha(t_noisier) / process.alpha(t)
    return a, np.sqrt(np.maximum(process.sigma(t_noisier) ** 2 - (a * process.sigma(t)) ** 2, 0.0))


def _churn(
    move: Move,
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    churn: tuple[float, float, float, float],
) -> Iterator[Step]:
    s_churn, s_tmin, s_tmax, s_noise = churn
    sigma = noise_to_signal(process, times[:-1])
    gamma = min(s_churn / (len(times) - 1), np.sqrt(2) - 1)
    churned = (sigma >= s_tmin) & (sigma <= s_tmax) & np.isfinite(sigma) & (gamma > 0)
    t_hat, a, b = times[:-1].copy(), np.ones_like(sigma), np.zeros_like(sigma)
    t_hat[churned] = process.t_of_lam(-np.log(sigma[churned] * (1 + gamma)))
    a[churned], b[churned] = add_noise(process, times[:-1][churned], t_hat[churned])
    for i, (here, there) in enumerate(zip(levels(process, t_hat), levels(process, times)[1:], strict=True)):
        if b[i] > 0:
            x = a[i] * x + s_noise * b[i] * noise()
        x, x0 = move(denoise, x, here, there)
        yield Step(i, x, x0)

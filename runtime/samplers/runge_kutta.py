"""DPM2: the midpoint method in the logarithm of the noise level, plain and ancestral."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..process import Array, Process
from .euler import Level, euler_move, levels
from .step import Denoise, Noise, Step, frame, frame_times, noise_to_signal


def kdpm2(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """DPM2, second order: the midpoint of DPM-Solver-2 (Lu et al. 2022, algorithm 1 <arXiv:2206.00927>) in EDM's
    variables, as k-diffusion has it.

    Two network calls a step, one for a last step onto sigma 0. On a discrete model the middle falls between trained
    levels; its timestep is interpolated in log alpha as everywhere here, in log sigma by diffusers.
    """
    c = frame(process, times)[1]
    middle = levels(process, frame_times(process, np.sqrt(np.where(c[1:] > 0, c[1:], c[:-1]) * c[:-1])))
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        if there[2] > 0:
            x, x0 = _midpoint_move(denoise, x, here, middle[i], there)
        else:
            x, x0 = euler_move(denoise, x, here, there)
        yield Step(i, x, x0)


def kdpm2_ancestral(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, eta: float = 1.0
) -> Iterator[Step]:
    """DPM2 to a noise level below the next one, then fresh noise up to it, as k-diffusion's ancestral samplers.

    eta  share of the next level's noise that is fresh, 0 for `kdpm2` to 1 for DDPM's amount

    The level below is sqrt(sigma'^2 - fresh^2), with fresh = eta sigma' sqrt(1 - (sigma'/sigma)^2), in sigma / alpha.
    A step that starts where there is no signal is first order, and is ancestral DDIM's.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    c = noise_to_signal(process, times)
    fresh = eta * c[1:] * np.sqrt(1 - (c[1:] / c[:-1]) ** 2)
    down = c[1:] * np.sqrt(1 - eta**2 + (eta * c[1:] / c[:-1]) ** 2)
    whole = np.isfinite(c[:-1]) & (down > 0)
    middle = np.full_like(down, times[0])
    middle[whole] = process.t_of_lam(-np.log(np.sqrt(down[whole] * c[:-1][whole])))
    alpha_m, sigma_m = process.alpha(middle), process.sigma(middle)
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        eps = (x - alpha[i] * x0) / sigma[i]
        if whole[i]:
            x_m = alpha_m[i] * x0 + sigma_m[i] * eps
            x0 = denoise(x_m, float(middle[i]))
            eps = (x_m - alpha_m[i] * x0) / sigma_m[i]
            x = alpha[i + 1] * (x / alpha[i] + (down[i] - c[i]) * eps)
        else:
            x = alpha[i + 1] * x0 + alpha[i + 1] * down[i] * eps
        if fresh[i] > 0:
            x = x + alpha[i + 1] * fresh[i] * noise()
        yield Step(i, x, x0)


def _midpoint_move(
    denoise: Denoise, x: Array, here: Level, middle: Level, there: Level
) -> tuple[Array, Array]:
    (t, s, c), (t_m, s_m, c_m), (_, s_next, c_next) = here, middle, there
    y = x / s
    y_m = y + (c_m - c) / c * (y - denoise(x, t))
    x0 = denoise(s_m * y_m, t_m)
    return s_next * (y + (c_next - c) / c_m * (y_m - x0)), x0

"""Samplers of consistency models: every call is a leap to clean data, and noise takes the sample back up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import PlanError
from ..process import EDM, Array, DiscreteVP, Process
from .step import Denoise, Noise, Step


def lcm(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    sigma_data: float = 0.5,
    timestep_scaling: float = 10.0,
) -> Iterator[Step]:
    """Multistep latent consistency sampling. Luo et al. 2023, algorithm 3 <arXiv:2310.04378>.

    Each step jumps to clean data through f(x, t) = c_skip x + c_out x0 and noises it again; the last returns f.
    sigma_data 0.5 and timestep_scaling 10 are the values every published LCM was trained with.
    Raises PlanError for a continuous process, which has no timesteps to scale.
    """
    _discrete(process, "lcm")
    alpha, sigma = process.alpha(times), process.sigma(times)
    scaled = timestep_scaling * process.timestep(times)
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / np.sqrt(scaled**2 + sigma_data**2)
    last = len(times) - 2
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        f = c_skip[i] * x + c_out[i] * x0
        x = f if i == last else alpha[i + 1] * f + sigma[i + 1] * noise()
        yield Step(i, x, x0)


def tcd(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, eta: float = 0.3
) -> Iterator[Step]:
    """Strategic stochastic sampling of trajectory consistency models. Zheng et al. 2024 <arXiv:2402.19159>.

    eta  gamma of the paper, 0 deterministic to 1 fully stochastic: each step jumps to timestep
         floor((1 - eta) timestep') and is noised up to timestep'. 0.3 is diffusers' default.

    A step onto time 0 returns the data prediction; diffusers ends at the first trained level, time 1, without noise,
    and so does this on times that end there. Raises PlanError for a continuous process.
    """
    _discrete(process, "tcd")
    target = np.where(times > 0, np.floor((1 - eta) * process.timestep(times)) + 1, 0.0)
    alpha, sigma, alpha_s, sigma_s = (f(t) for t in (times, target) for f in (process.alpha, process.sigma))
    a = alpha / alpha_s
    b = np.sqrt(np.maximum(1 - a**2, 0.0))
    last = len(times) - 2
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        eps = (x - alpha[i] * x0) / sigma[i]
        x = alpha_s[i + 1] * x0 + sigma_s[i + 1] * eps
        if eta > 0 and i < last:
            x = a[i + 1] * x + b[i + 1] * noise()
        yield Step(i, x, x0)


def consistency(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, boundary: bool = True
) -> Iterator[Step]:
    """Multistep consistency sampling. Song et al. 2023, algorithm 1 <arXiv:2303.01469>.

    boundary  the network is EDM's F and the model f = c_skip x + c_out F with the scalings of appendix C, which make
              it the identity at sigma_min; False where the data prediction is the consistency model's own

    Noise levels are those of the grid, each less sigma_min: x' = f + sqrt(sigma'^2 - sigma_min^2) z. The last step
    returns f. Raises PlanError for any process but EDM's.
    """
    if not isinstance(process, EDM):
        raise PlanError(f"consistency on a process of kind {process.to_json()['kind']}", expected="EDM")
    sigma, low = process.sigma(times), process.sigma_min
    total = sigma**2 + process.sigma_data**2
    # F = (x0 - x sigma_data^2 / total) sqrt(total) / (sigma sigma_data), put into f
    b = (sigma - low) / np.where(sigma > 0, sigma, 1.0) if boundary else np.ones_like(sigma)
    skip = (
        process.sigma_data**2 / ((sigma - low) ** 2 + process.sigma_data**2)
        if boundary
        else np.zeros_like(sigma)
    )
    a = skip - b * process.sigma_data**2 / total if boundary else skip
    last = len(times) - 2
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        x = a[i] * x + b[i] * x0
        s = np.sqrt(max(sigma[i + 1] ** 2 - low**2, 0.0))
        if i < last and s > 0:
            x = x + s * noise()
        yield Step(i, x, x0)


def _discrete(process: Process, name: str) -> None:
    if not isinstance(process, DiscreteVP):
        raise PlanError(
            f"{name} on a process of kind {process.to_json()['kind']}", expected="a discrete model"
        )

"""Multistep consistency sampling, for latent consistency models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
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
    """
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

"""DDPM: ancestral sampling from the posterior of the forward process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
from .step import Denoise, Noise, Step


def ddpm(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, large: float = 0.0
) -> Iterator[Step]:
    """DDPM. Ho, Jain and Abbeel 2020, equations 6 and 7 and section 3.2 <arXiv:2006.11239>.

    large  the variance of a step, exp(large log(beta) + (1 - large) log(beta~)): 0 the small fixed one, beta~, the
           posterior of data at one point, which makes the step DDIM's with eta 1; 1 the large fixed one, beta, of
           data as spread as noise. A network may learn where between them (Nichol and Dhariwal 2021, equation 15,
           arXiv:2102.09672): `with_learned_variance` of policy.py adds that to a plan with 0.

    beta is the variance between the grid's own neighbouring times, as Nichol and Dhariwal have it for skipped levels.
    A step onto sigma 0 draws no noise; diffusers draws some there with the large variance on grids that skip level 0.
    """
    alpha, sigma = process.alpha(times), process.sigma(times)
    ratio = alpha[:-1] / alpha[1:]
    beta = sigma[:-1] ** 2 - (ratio * sigma[1:]) ** 2
    to_x0, to_x = alpha[1:] * beta / sigma[:-1] ** 2, ratio * sigma[1:] ** 2 / sigma[:-1] ** 2
    small = beta * sigma[1:] ** 2 / sigma[:-1] ** 2
    s = np.sqrt(beta**large * small ** (1 - large))
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        x = to_x0[i] * x0 + to_x[i] * x
        if sigma[i + 1] > 0:
            x = x + s[i] * noise()
        yield Step(i, x, x0)

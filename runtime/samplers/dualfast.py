"""DualFast: a first-order term that leans away from noisier predictions, to cancel the network's own error."""

from __future__ import annotations

from collections.abc import Iterator

from ..process import Array, Process
from .dpmpp import MULTISTEP_2
from .exponential import FEW_STEPS, Integrator, Point, Rule, choose, first
from .step import Denoise, Noise, Step

BASES: dict[str, tuple[bool, tuple[Rule, ...]]] = {
    "ddim": (False, (first,)),
    "dpmpp_2m": (False, MULTISTEP_2["midpoint"]),
    "dpm_solver_2m": (True, MULTISTEP_2["midpoint"]),
}
"""Whether the solver extrapolates the noise, and its rules."""


def dualfast(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    base: str = "dpmpp_2m",
    c_max: float = 0.1,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DualFast on DDIM, DPM-Solver++(2M) or DPM-Solver(2M). Yu et al. 2025 <arXiv:2506.13058>.

    The first-order term, the same for all three, takes (1 + c) eps_s - c eps_tau in place of eps_s, where tau is the
    step before; the others stay. c rises evenly from 0 to c_max over the steps, since the network's error grows as the
    noise falls; c_max is ours, not the paper's, to be searched for a model between 0.05 and 0.2.
    """
    noise_prediction, rules = choose("base", base, BASES)
    integrator = Integrator.of(process, times, noise_prediction=noise_prediction)
    alpha, sigma, steps = integrator.alpha, integrator.sigma, len(times) - 1
    lower_final = lower_order_final and steps < FEW_STEPS
    past: list[Point] = []
    eps_tau = x
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        eps = (x - alpha[i] * x0) / sigma[i]
        past = [integrator.point(i, x, x0), *past][: len(rules)]
        p = integrator.points(i, len(rules), lower_final)
        x = integrator.step(x, i + 1, past[:p], rules[p - 1], noise)
        if i > 0:
            c = c_max * i / (steps - 1)
            # sigma_t (e^h - 1), finite onto sigma 0 as well
            x = x - c * (alpha[i + 1] * sigma[i] / alpha[i] - sigma[i + 1]) * (eps - eps_tau)
        eps_tau = eps
        yield Step(i, x, x0)

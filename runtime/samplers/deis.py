"""DEIS: Adams-Bashforth on the noise prediction. Zhang and Chen 2022 <arXiv:2204.13902>.

With rho = sigma/alpha and y = x/alpha the sampling ODE is dy/drho = eps: an integral of eps alone. The variants differ
in the variable in which eps is taken for a polynomial.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..errors import PlanError
from ..process import Array, Process
from .exponential import Integrator, Rule, choose, first, gauss_legendre, multistep, solve, taylor
from .step import Denoise, Noise, Step


def rho_ab(lam_t: float, lam: Sequence[float]) -> Array:
    """Polynomials in rho. In an Integrator's noise integral lam is negated, so that exp(lam) is rho."""
    v = np.expm1(np.array(lam) - lam[0])  # rho_j / rho_s - 1
    end = np.expm1(lam_t - lam[0])
    moments = end / (1.0 + np.arange(len(lam)))
    return np.asarray(np.exp(lam[0] - lam_t) * solve(v / end, moments))


def t_ab(process: Process) -> Rule:
    """Polynomials in the process's time, by quadrature over each step in lam."""

    def rule(lam_t: float, lam: Sequence[float]) -> Array:
        nodes, w = gauss_legendre(24)  # beyond float64 for steps of a few units of lam
        h = lam_t - lam[0]
        t = process.t_of_lam(-np.concatenate([lam, [lam_t], lam[0] + h * nodes]))
        n = len(lam)
        r = (t - t[0]) / (t[n] - t[0])
        powers = r[n + 1 :] ** np.arange(n)[:, None]
        return solve(r[:n], powers @ (h * w * np.exp(h * (nodes - 1))))

    return rule


def deis(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    order: int = 3,
    variable: str = "rho",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DEIS, multistep: degree `order` polynomials through order + 1 points. Zhang and Chen 2022 <arXiv:2204.13902>.

    order     0 to 3, the paper's r: 0 is DDIM, r has order of accuracy r + 1. The paper takes 3, and 2 for 5 steps
    variable  "rho" (the paper's rho-AB), "t" (t-AB; the process's time), "log_rho" (diffusers' DEISMultistepScheduler,
              whose solver_order is r + 1)
    """
    if order not in range(4):
        raise PlanError(f"DEIS of order {order}", expected="0, 1, 2 or 3")
    rules: dict[str, Rule] = {"rho": rho_ab, "t": t_ab(process), "log_rho": taylor}
    rule = choose("variable", variable, rules)
    integrator = Integrator.of(process, times, noise_prediction=True)
    return multistep(denoise, times, x, noise, integrator, (first, *[rule] * order), lower_order_final)

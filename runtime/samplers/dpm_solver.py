"""DPM-Solver: exponential integrators on the noise prediction. Lu et al. 2022 <arXiv:2206.00927>.

Its formulas are DPM-Solver++'s with h negated, so the rules are those of dpmpp.py. The state is rebuilt from the noise,
so that rows are longer than with the data prediction; with few steps and strong guidance it is also less stable.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..process import Array, Process
from .dpmpp import MULTISTEP_2, MULTISTEP_3, SINGLESTEP_2, SINGLESTEP_3
from .exponential import Integrator, choose, multistep, singlestep
from .step import Denoise, Noise, Step


def dpm_solver_2s(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, solver_type: str = "midpoint"
) -> Iterator[Step]:
    """DPM-Solver-2: second order, singlestep, two network calls a block. Algorithm 1 <arXiv:2206.00927>."""
    rules = choose("solver_type", solver_type, SINGLESTEP_2)
    integrator = Integrator.of(process, times, noise_prediction=True)
    return singlestep(denoise, times, x, noise, integrator, rules)


def dpm_solver_3s(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    solver_type: str = "published",
) -> Iterator[Step]:
    """DPM-Solver-3 in the order of DPM-Solver-fast. Algorithm 2 <arXiv:2206.00927>.

    Third order, singlestep, three network calls a block, all on the grid; solver_type as in dpmpp_3s.
    """
    rules = choose("solver_type", solver_type, SINGLESTEP_3)
    integrator = Integrator.of(process, times, noise_prediction=True)
    return singlestep(denoise, times, x, noise, integrator, rules)


def dpm_solver_2m(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DPM-Solver with two points, multistep: second order. The authors' code, method="multistep"."""
    rules = choose("solver_type", solver_type, MULTISTEP_2)
    integrator = Integrator.of(process, times, noise_prediction=True)
    return multistep(denoise, times, x, noise, integrator, rules, lower_order_final)


def dpm_solver_3m(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    solver_type: str = "exact",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DPM-Solver with three points, multistep: third order.

    solver_type  "exact", or "published": the authors' code, with half the D_2 coefficient and second order
    """
    rules = choose("solver_type", solver_type, MULTISTEP_3)
    integrator = Integrator.of(process, times, noise_prediction=True)
    return multistep(denoise, times, x, noise, integrator, rules, lower_order_final)


def dpm_solver_2m_sde(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    eta: float = 1.0,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """SDE-DPM-Solver(2M). Lu et al. 2022 <arXiv:2211.01095>: the noise prediction with fresh noise."""
    rules = choose("solver_type", solver_type, MULTISTEP_2)
    integrator = Integrator.of(process, times, noise_prediction=True, eta=eta)
    return multistep(denoise, times, x, noise, integrator, rules, lower_order_final)

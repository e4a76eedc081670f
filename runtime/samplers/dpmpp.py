"""DPM-Solver++: exponential integrators on the data prediction. Lu et al. 2022 <arXiv:2211.01095>."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..process import Array, Process
from .exponential import Integrator, J, Rule, choose, first, multistep, singlestep, taylor
from .step import Denoise, Noise, Step


def midpoint(lam_t: float, lam: Sequence[float]) -> Array:
    """m_0 + D_1/2 all the way, D_1 = (m_0 - m_1)/r_0: second order. Algorithms 1 and 2."""
    h = lam_t - lam[0]
    r0 = (lam[0] - lam[1]) / h
    m0, m1 = np.eye(2)
    phi1 = np.expm1(-h)
    return np.asarray(-phi1 * (m0 + (m0 - m1) / r0 / 2))


def published_3m(lam_t: float, lam: Sequence[float]) -> Array:
    """Three earlier points, as in the authors' code, diffusers and k-diffusion: only second order.

    D_2 is half the second difference, so that third order asks for -2 phi_3 D_2 instead of -phi_3 D_2; `taylor` has it.
    """
    h = lam_t - lam[0]
    r0, r1 = (lam[0] - lam[1]) / h, (lam[1] - lam[2]) / h
    m0, m1, m2 = np.eye(3)
    d0, d1 = (m0 - m1) / r0, (m1 - m2) / r1
    D1 = d0 + r0 / (r0 + r1) * (d0 - d1)
    D2 = (d0 - d1) / (r0 + r1)
    J0, J1, J2 = J(h, 3)  # phi_1 = -J_0, phi_2 = J_1/h, phi_3 = -J_2/h^2
    return np.asarray(J0 * m0 + J1 / h * D1 + J2 / h**2 * D2)


def published_3s(lam_t: float, lam: Sequence[float]) -> Array:
    """The start and the second interior point, which has to lie at r_2 = 2/3 for third order."""
    h = lam_t - lam[0]
    r2 = (lam[2] - lam[0]) / h
    m0, _, m2 = np.eye(3)
    J0, J1 = J(h, 2)
    return np.asarray(J0 * m0 + J1 / h * (m2 - m0) / r2)


MULTISTEP_2: dict[str, tuple[Rule, ...]] = {"midpoint": (first, midpoint), "heun": (first, taylor)}
MULTISTEP_3: dict[str, tuple[Rule, ...]] = {
    "published": (first, midpoint, published_3m),
    "exact": (first, taylor, taylor),
}
SINGLESTEP_2: dict[str, tuple[tuple[Rule, ...], ...]] = {
    "midpoint": ((first,), (first, midpoint)),
    "heun": ((first,), (first, taylor)),
}
SINGLESTEP_3: dict[str, tuple[tuple[Rule, ...], ...]] = {
    "published": ((first,), (first, midpoint), (first, taylor, published_3s)),
    "midpoint": ((first,), (first, midpoint), (first, midpoint, published_3s)),
    "heun": ((first,), (first, taylor), (first, taylor, taylor)),
}
"""By solver_type; "midpoint" and "heun" are diffusers' words. "heun" keeps its order on any grid."""


def dpmpp_2s(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, solver_type: str = "midpoint"
) -> Iterator[Step]:
    """DPM-Solver++(2S): second order, singlestep. Algorithm 1 <arXiv:2211.01095>.

    Two network calls a block, both on the grid: r_1 is wherever the grid puts it, 1/2 if it is even in lam.
    """
    rules = choose("solver_type", solver_type, SINGLESTEP_2)
    return singlestep(denoise, times, x, noise, Integrator.of(process, times), rules)


def dpmpp_3s(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    solver_type: str = "published",
) -> Iterator[Step]:
    """DPM-Solver++(3S): third order, singlestep, three network calls a block. Lu et al. 2022 <arXiv:2211.01095>.

    solver_type  "published", or "midpoint" as diffusers has it: third order on grids even in lam, second elsewhere;
                 "heun": third order on any grid
    """
    rules = choose("solver_type", solver_type, SINGLESTEP_3)
    return singlestep(denoise, times, x, noise, Integrator.of(process, times), rules)


def dpmpp_2m(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DPM-Solver++(2M): second order, multistep. Lu et al. 2022, algorithm 2 <arXiv:2211.01095>.

    One network call a step. The first step, and a last step onto sigma 0, are first order; so is the last of fewer
    than 15 steps with lower_order_final (diffusers).
    """
    rules = choose("solver_type", solver_type, MULTISTEP_2)
    return multistep(denoise, times, x, noise, Integrator.of(process, times), rules, lower_order_final)


def dpmpp_3m(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    solver_type: str = "published",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DPM-Solver++ with three points, multistep. Lu et al. 2022 <arXiv:2211.01095>.

    solver_type  "published": what everyone runs, second order; "exact": third order
    """
    rules = choose("solver_type", solver_type, MULTISTEP_3)
    return multistep(denoise, times, x, noise, Integrator.of(process, times), rules, lower_order_final)


def dpmpp_2m_sde(
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
    """SDE-DPM-Solver++(2M). Lu et al. 2022 <arXiv:2211.01095>; eta as in k-diffusion, 0 for the ODE."""
    rules = choose("solver_type", solver_type, MULTISTEP_2)
    integrator = Integrator.of(process, times, eta=eta)
    return multistep(denoise, times, x, noise, integrator, rules, lower_order_final)


def dpmpp_3m_sde(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    eta: float = 1.0,
    solver_type: str = "published",
    lower_order_final: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++(3M) SDE, k-diffusion's (Crowson 2022): dpmpp_3m with fresh noise, and `taylor` while it ramps up.

    diffusers' sde-dpmsolver++ of order 3 has another D_2 coefficient, (1 - e^-2h - 2h)/(2h)^2 - 1/2 , which tends to
    -1 instead of 0 as h shrinks.
    """
    _, _, third = choose("solver_type", solver_type, MULTISTEP_3)
    integrator = Integrator.of(process, times, eta=eta)
    return multistep(denoise, times, x, noise, integrator, (first, taylor, third), lower_order_final)

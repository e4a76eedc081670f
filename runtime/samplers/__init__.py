"""Samplers: from noise to data in few network calls. One algorithm, one file, one short function.

A sampler is a generator over anything that adds and scales: arrays when it runs, symbols when `Plan.trace` compiles
it into a table of numbers. It calls `denoise` and yields a Step whenever it has a new state. All share one signature:

    sampler(denoise, process, x, times, noise) -> Iterator[Step]

    denoise  (x_t, t) -> estimate of x_0, same shape
    process  the forward process; samplers read its alpha and sigma, in float64
    x        the state at times[0]
    times    [steps + 1] float64, decreasing; may end at 0, where sigma is 0 and the step is exact
    noise    () -> fresh standard normal of x's shape; deterministic samplers ignore it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ..process import Array, Process
from .adams import ipndm, lms, plms, pndm
from .auto import auto, auto_guided
from .bdia import bdia
from .consistency import consistency, lcm, tcd
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm_solver import dpm_solver_2m, dpm_solver_2m_sde, dpm_solver_2s, dpm_solver_3m, dpm_solver_3s
from .dpm_solver_v3 import dpm_solver_v3
from .dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m, dpmpp_3m_sde, dpmpp_3s
from .dualfast import dualfast
from .er_sde import er_sde
from .euler import euler, euler_churn, heun, heun_churn
from .momentum import ghvb, hb
from .residual import langevin_corrected, reverse_chain
from .restart import restart
from .runge_kutta import kdpm2, kdpm2_ancestral
from .sa_solver import sa_solver
from .step import Denoise, Noise, Step
from .unipc import dc_solver, unipc, unipc_3
from .usf import usf

Sampler = Callable[[Denoise, Process, Array, Array, Noise], Iterator[Step]]

SAMPLERS: dict[str, Sampler] = {
    "auto": auto,
    "auto_guided": auto_guided,
    "ddim": ddim,
    # exponential integrators on the noise prediction
    "dpm_solver_2s": dpm_solver_2s,
    "dpm_solver_3s": dpm_solver_3s,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_3m": dpm_solver_3m,
    "dpm_solver_2m_sde": dpm_solver_2m_sde,
    "deis": deis,
    "deis_tab": partial(deis, variable="t"),
    # exponential integrators on the data prediction
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_exact": partial(dpmpp_3m, solver_type="exact"),
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "unipc_3": unipc_3,
    "dc_solver": dc_solver,
    "dpm_solver_v3": dpm_solver_v3,
    "dualfast": dualfast,
    "usf": usf,
    # methods for the plain differential equation
    "euler": euler,
    "heun": heun,
    "kdpm2": kdpm2,
    "lms": lms,
    "ipndm": ipndm,
    "plms": plms,
    "s_pndm": partial(plms, order=2),
    "pndm": pndm,
    "ghvb": ghvb,
    "hb": hb,
    "bdia": bdia,
    # fresh noise on the way
    "ddpm": ddpm,
    "ddpm_large": partial(ddpm, large=1.0),
    "euler_ancestral": partial(ddim, eta=1.0),
    "kdpm2_ancestral": kdpm2_ancestral,
    "er_sde": er_sde,
    "sa_solver": sa_solver,
    "reverse_chain": reverse_chain,
    "langevin_corrected": langevin_corrected,
    "euler_churn": euler_churn,
    "heun_churn": heun_churn,
    "restart": restart,
    # distilled models
    "lcm": lcm,
    "tcd": tcd,
    "consistency": consistency,
}
"""Every sampler by the name users know it by."""

__all__ = ["SAMPLERS", "Denoise", "Noise", "Sampler", "Step", "ddim", "dpmpp_2m", "euler", "heun", "lcm"]

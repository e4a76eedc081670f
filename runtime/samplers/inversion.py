"""From a clean sample to the noise that leads to it: plans whose start is given states, on rising times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..errors import PlanError
from ..linear import Linear
from ..process import Array, Process
from .bdia import bdia
from .euler import euler
from .step import Denoise, Noise, Step

if TYPE_CHECKING:
    from ..plan import Plan
    from . import Sampler


def ddim_inversion(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise
) -> Iterator[Step]:
    """DDIM inversion: DDIM's ODE the other way, on rising times. Song, Meng and Ermon 2020, section 4.3
    <arXiv:2010.02502>. Approximate: sampling back returns near x, the nearer the more steps.

    times  [steps + 1], rising from a level of some noise: at sigma 0 the noise in x cannot be read. A clean sample
           stands in for the state at a small time, the first trained level of a discrete model.
    """
    if process.sigma(times[0]) == 0:
        raise PlanError(
            "an inversion from sigma 0", fix="start at a small time, such as 1 for a discrete model"
        )
    return euler(denoise, process, x, times, noise)


def ddim_inversion_plan(process: Process, times: ArrayLike, *, prediction: str = "") -> Plan:
    """`ddim_inversion` as a plan. It is given one array: the clean sample."""
    return _given(ddim_inversion, process, times, 0, prediction, "ddim_inversion")


def bdia_inversion_plan(
    process: Process, times: ArrayLike, *, gamma: float = 1.0, prediction: str = ""
) -> Plan:
    """The exact inverse of `bdia`: from its last two states back to its first.

    times  the falling times that were sampled on, [steps + 1]; they may end at 0, where no network is called
    Given are the last state and the one before it, in this order; steps - 1 calls lead to the noise. That the first
    step was DDIM's is no loss: its two ends obey the relation that the second step began with.
    gamma below 1 multiplies rounding errors by 1 / gamma a step.
    """
    times = np.asarray(times, dtype=np.float64)[::-1]
    return _bdia(process, times, 1 / gamma, prediction, "bdia_inversion")


def bdia_plan(process: Process, times: ArrayLike, *, gamma: float = 1.0, prediction: str = "") -> Plan:
    """`bdia` from two given states, at times[0] and times[1]: what undoes `bdia_inversion_plan` exactly.

    To edit a picture: a step of DDIM inversion from it makes the second state that the inverse wants, the inverse
    makes two noisy ones, and this plan, under another condition, an edited picture; under the same one, the picture.
    """
    return _bdia(process, np.asarray(times, dtype=np.float64), gamma, prediction, "bdia")


def _bdia(process: Process, times: Array, gamma: float, prediction: str, name: str) -> Plan:
    if len(times) < 3:
        raise PlanError(f"{len(times) - 1} steps of BDIA from two states", expected="2 or more")
    # a symbol, which only the type checker can tell from an array
    before: Array = Linear.atom("y", 0)  # type: ignore[assignment]
    sampler = partial(bdia, gamma=gamma, x_before=before, t_before=float(times[0]))
    return _given(sampler, process, times[1:], 1, prediction, name)


def _given(
    sampler: Sampler, process: Process, times: ArrayLike, start: int, prediction: str, name: str
) -> Plan:
    """The plan of a sampler that starts from given array `start` instead of noise."""
    from ..plan import Plan

    if hasattr(process, "gamma"):
        raise PlanError(f"{name} of a process with an observation", expected="one without")
    table = Plan.trace(sampler, process, times, prediction=prediction, name=name)
    return replace(table, init=(("y", start, 1.0),))

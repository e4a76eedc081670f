"""From a sampler to its plan: run it once on symbols, write down what it does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import NotLinear, PlanError
from .linear import Linear, Terms
from .manifest import GridSpec
from .plan import Call, Plan
from .process import Array, DiscreteVP, Process, observed
from .samplers import SAMPLERS, Sampler
from .times import Grid, check_steps, check_times, make_times

__all__ = ["choose", "trace", "x0_conversion"]

USUAL = {
    "edm": "edm",
    "rectified_flow": "flow",
    "residual_shift": "sample",
    "residual_denoising": "residual",
    "resfusion": "resnoise",
    "ouve": "score",
    "schroedinger_bridge": "sample",
}
"""What networks output by the kind of process they are trained for; epsilon where nothing is said."""


def trace(
    sampler: Sampler, process: Process, times: ArrayLike, *, prediction: str = "", name: str = ""
) -> Plan:
    """See Plan.trace."""
    times = check_times(times, process, rising=True)
    prediction = prediction or USUAL.get(process.to_json()["kind"], "epsilon")
    rows: list[dict[str, Any]] = []
    drawn = 0

    def denoise(x: Linear, t: float) -> Linear:
        gamma = observed(process, t)
        rows.append(
            {
                "t": float(t),
                "timestep": float(process.timestep(t)),
                "input": (x + Linear.atom("y", 0) * gamma if gamma else x).terms,
                "scale": float(process.input_scale(t)),
                "x0": _conversion(prediction, process, t, gamma),
                "next": None,
            }
        )
        return Linear.atom("d", len(rows) - 1)

    def noise() -> Linear:
        nonlocal drawn
        drawn += 1
        return Linear.atom("n", drawn - 1)

    x = Linear.atom("x", 0)
    # the sampler cannot tell symbols from arrays; the type checker can
    for step in sampler(denoise, process, x, times, noise):  # type: ignore[arg-type]
        state: Linear = step.x  # type: ignore[assignment]
        if not rows or rows[-1]["next"] is not None:
            raise NotLinear("a sampler that takes two steps with one network call")
        rows[-1]["next"] = state.terms
        # From here on this very object stands for the new state, so later rows refer to it instead of spelling
        # it out. Its value is unchanged, so whoever else holds it is right too.
        state.become(("x", step.index + 1))
    name = name or getattr(sampler, "__name__", "custom")
    return Plan(name, len(times) - 1, prediction, _start(process, times), tuple(Call(**r) for r in rows))


def choose(
    sampler: str | Sampler, steps: int, process: Process, times: str | Grid | ArrayLike, grid: GridSpec
) -> tuple[Sampler, str, Array]:
    """The sampler, its name and the times that `plan` means by these arguments."""
    check_steps(steps)
    name = sampler if isinstance(sampler, str) else getattr(sampler, "__name__", "custom")
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise PlanError.unknown("sampler", sampler, SAMPLERS)
        sampler = SAMPLERS[sampler]
    if isinstance(times, str) or callable(times):
        distilled = times == "auto" and name in ("lcm", "tcd") and isinstance(process, DiscreteVP)
        spacing = name if distilled else times
        if times == "auto" and name.startswith("auto") and isinstance(process, DiscreteVP):
            spacing = "ays_sdxl"  # the best single grid of benchmarks/mixture.py
        if grid.final == "first" and not name.startswith(("ddim", "pndm", "plms")):
            grid = replace(grid, final="clean")  # set_alpha_to_one is read by these alone
        times = make_times(spacing, steps, process, grid)
    elif len(np.asarray(times)) != steps + 1:
        raise PlanError(f"{len(np.asarray(times))} times for {steps} steps", expected=f"{steps + 1} times")
    return sampler, name, check_times(times, process)


def _start(process: Process, times: Array) -> Terms:
    """The first state. Without an observation: noise with the spread of data of unit variance, noised. With one, it
    stands in for the unknown clean sample, as ResShift and the mean-reverting processes have it."""
    alpha, sigma = float(process.alpha(times[0])), float(process.sigma(times[0]))
    if not hasattr(process, "gamma"):
        return (("z", 0, float(np.hypot(alpha, sigma))),)
    return tuple(term for term in (("z", 0, sigma), ("y", 0, alpha)) if term[2] != 0)


def _conversion(prediction: str, process: Process, t: float, gamma: float) -> tuple[float, float, float]:
    """(a, b, c) with x0 = a x + b output + c y: x0_conversion's kinds, on x - gamma y, and two that name y.

    residual: y - x0 (RDDM, Liu et al. 2023, arXiv:2308.13712). resnoise: Resfusion's, see there.
    """
    if prediction == "residual" and hasattr(process, "gamma"):
        return 0.0, -1.0, 1.0
    if prediction == "resnoise" and hasattr(process, "resnoise"):
        a, b, c = process.resnoise(t)
        return a, b, c
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    a, b = x0_conversion(prediction, alpha, sigma, getattr(process, "sigma_data", 0.5))
    return a, b, -a * gamma


def x0_conversion(
    prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5
) -> tuple[float, float]:
    """(a, b) with x0 = a x + b output, for x = alpha x0 + sigma noise.

    epsilon: the noise. v_prediction: alpha noise - sigma x0 (Salimans and Ho 2022, arXiv:2202.00512). sample: x0.
    flow: noise - x0. edm: the raw F of Karras et al. 2022, table 1, for alpha = 1. score: -noise / sigma.
    Raises PlanError where the output says nothing about x0: epsilon and score at alpha 0.
    """
    match prediction:
        case "epsilon" if alpha > 0:
            return 1 / alpha, -sigma / alpha
        case "score" if alpha > 0:
            return 1 / alpha, sigma**2 / alpha
        case "epsilon" | "score":
            raise PlanError(
                f"{prediction} prediction at a time where alpha is 0",
                fix="use v_prediction or skip that time",
            )
        case "v_prediction":
            total = alpha**2 + sigma**2
            return alpha / total, -sigma / total
        case "sample":
            return 0.0, 1.0
        case "flow":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
        case "edm":
            total = sigma**2 + sigma_data**2
            return sigma_data**2 / total, sigma * sigma_data / math.sqrt(total)
    known = "epsilon, v_prediction, sample, flow, edm, score, or with an observation residual or resnoise"
    raise PlanError(f"prediction {prediction!r}", expected=known)

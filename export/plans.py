"""Which plan a bundle carries: the model's own scheduler as a table, or a sampler traced for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..model.libraries import diffusers, quiet
from ..model.model import Model
from ..runtime.errors import NotLinear
from ..runtime.grids import at_resolution
from ..runtime.manifest import GridSpec
from ..runtime.plan import Plan, plan
from ..runtime.process import DiscreteVP

__all__ = ["plan_of", "traced_sampler"]

TRACED: Mapping[str, str] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "kdpm2",
    "KDPM2AncestralDiscreteScheduler": "kdpm2_ancestral",
    "LMSDiscreteScheduler": "lms",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
"""The scheduler of a checkpoint -> the sampler traced when a run asks for another number of steps."""


def plan_of(model: Model, sampler: str, steps: int) -> Plan:
    """The plan of the model's own scheduler, or of the traced sampler that was asked for."""
    if sampler == "model" and model.scheduler is not None:
        try:
            with quiet():
                return Plan.from_diffusers(_scheduler(model), steps, **_shift(model))
        except NotLinear as error:
            fix = "pass --sampler auto or another (fewstep samplers), or switch that off in scheduler_config.json"
            raise NotLinear(error.found, expected=error.expected, fix=fix) from None
    name = traced_sampler(model) if sampler == "model" else sampler
    if name == "auto" and model.guidance.kind != "none":
        name = "auto_guided"
    return plan(name, steps, model.process, prediction=model.prediction, grid=_grid(model))


def _grid(model: Model) -> GridSpec:
    """The model's grid at its own size."""
    sample = model.sample
    return at_resolution(model.grid, sample.height * sample.width // sample.multiple**2)


def _shift(model: Model) -> dict[str, float]:
    """What a scheduler with dynamic shifting has to be told: mu, of which the shift is the exponential or itself."""
    if model.grid.dynamic is None:
        return {}
    shift = _grid(model).shift
    return {"mu": math.log(shift) if model.grid.dynamic.kind == "exponential" else shift}


def _scheduler(model: Model) -> Any:
    assert model.scheduler is not None
    return getattr(diffusers(), model.scheduler["_class_name"]).from_config(dict(model.scheduler))


def traced_sampler(model: Model) -> str:
    """The sampler for other numbers of steps: the one nearest to the model's own scheduler."""
    observed = hasattr(model.process, "gamma")
    fallback = "reverse_chain" if observed else "ddim" if isinstance(model.process, DiscreteVP) else "euler"
    return TRACED.get((model.scheduler or {}).get("_class_name", ""), fallback)

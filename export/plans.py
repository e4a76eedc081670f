"""Which plan a bundle carries: the model's own scheduler as a table, or a sampler traced for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..model.libraries import diffusers, quiet
from ..model.model import Model
from ..runtime.errors import NotLinear
from ..runtime.grids import at_resolution
from ..runtime.manifest import GridSpec
from ..runtime.plan import Plan, plan
from ..runtime.process import DiscreteVP
from ..runtime.two_graphs import SMALL, refining, stitched

__all__ = ["plan_of", "plans_of", "traced_sampler"]

REFINING = 4
"""Calls of the teacher for a picture of the student's that is refined: a few."""


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


def plans_of(model: Model, sampler: str, steps: int, offered: Sequence[int] = ()) -> dict[str, Plan]:
    """Every plan a bundle carries, by name: "default", and for two denoisers of one latent space some more.

    offered  further numbers of steps, as steps_N; none beyond what a few-step model was made for

    A stitched pair: default, full and small, which are of both networks and of each alone. A student and its teacher:
    default and student, which are the student's own steps; refine, from the student's picture on; and full.
    """
    alone = plan_of(model, sampler, steps)
    if model.small is None:
        more = [n for n in offered if model.steps is None or n <= model.steps]
        return {"default": alone, **{f"steps_{n}": plan_of(model, sampler, n) for n in more}}
    small, share = model.small.model, model.small.share
    distilled = model.guidance.scale != 1.0 and small.guidance.scale == 1.0  # guidance is in its weights
    if share is not None:
        both, one = (_unguided(stitched(alone, s), distilled) for s in (share, 1.0))
        return {"default": both, "full": alone, "small": one}
    student = _unguided(stitched(plan_of(small, "model", small.steps or steps), 1.0), distilled)
    grid, process = _grid(model), model.process
    refine = refining("dpmpp_2m", REFINING, process, prediction=model.prediction, grid=grid)
    return {"default": student, "student": student, "refine": refine, "full": alone}


def _unguided(table: Plan, distilled: bool) -> Plan:
    """The plan whose calls of the small network are made without guidance, where that is in its weights."""
    rows = (replace(c, guided=c.guided and not (distilled and c.graph == SMALL)) for c in table.calls)
    return replace(table, calls=tuple(rows))


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

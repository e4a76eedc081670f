"""What a diffusers scheduler says about the model: its process, its prediction, its spacing of times."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from ..runtime.errors import CheckpointError
from ..runtime.manifest import DynamicShift, GridSpec
from ..runtime.process import EDM, DiscreteVP, Process, RectifiedFlow

__all__ = ["grid_of", "prediction_of", "process_of"]

PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "flow_prediction": "flow",
}
"""diffusers' prediction_type -> ours."""


def process_of(scheduler: Any) -> Process:
    """The forward process a scheduler was configured for.

    The betas are computed here in float64 from their description where that gives diffusers' own float32 betas, and
    taken from the scheduler where it does not (trained betas, zero terminal SNR).
    """
    config, name = scheduler.config, type(scheduler).__name__
    if is_flow(scheduler):
        return RectifiedFlow(timestep_scale=float(config.num_train_timesteps))
    if name.startswith("EDM"):
        return EDM(config.sigma_min, config.sigma_max, config.sigma_data)
    betas = getattr(scheduler, "betas", None)
    if betas is None:
        raise CheckpointError(
            f"scheduler {name} has no betas",
            expected="a discrete, flow-match or EDM scheduler",
            fix="pass another one",
        )
    betas = betas.double().numpy()
    if config.get("beta_schedule") in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        described = DiscreteVP.from_schedule(
            config.beta_schedule, config.beta_start, config.beta_end, len(betas)
        )
        taken = DiscreteVP.from_betas(betas)
        # a thousand float32 betas multiplied; where they end at zero exactly, so must the description
        if np.allclose(described.alphas_cumprod, taken.alphas_cumprod, rtol=1e-4, atol=0):
            return described
        return taken
    return DiscreteVP.from_betas(betas)


def prediction_of(scheduler: Any) -> str:
    if is_flow(scheduler):
        return "flow"
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise CheckpointError(
            f"scheduler_config.json: prediction_type {kind!r}",
            expected=" or ".join(PREDICTIONS),
            fix="correct it",
        )
    return PREDICTIONS[kind]


def grid_of(scheduler: Any) -> GridSpec:
    """How the scheduler spaces its times, for samplers traced at run time."""
    config, name = _own_config(scheduler), type(scheduler).__name__
    multistep = is_multistep(scheduler)
    final = "first" if config.get("set_alpha_to_one") is False else "clean"
    if config.get("final_sigmas_type") == "sigma_min" or name.startswith(
        ("DEIS", "SASolver")
    ):  # no other end
        final = "sigma_min"
    levels = {
        "karras": config.get("use_karras_sigmas") or config.get("sigma_schedule") == "karras",
        "exponential": config.get("use_exponential_sigmas") or config.get("sigma_schedule") == "exponential",
        "beta": config.get("use_beta_sigmas"),
        "lu": config.get("use_lu_lambdas"),
    }
    flow, edm = is_flow(scheduler), name.startswith("EDM")
    over_levels = next((grid for grid, used in levels.items() if used), "")
    even = _even_spacing(scheduler)
    spacing = over_levels or even
    below = 1 - 1 / config["num_train_timesteps"] if flow and spacing == "trailing" else None
    return GridSpec(
        spacing=spacing,
        steps_offset=int(config.get("steps_offset", 0)),
        final=final,
        shift=float(config.get("flow_shift" if multistep else "shift") or 1.0) if flow else 1.0,
        dynamic=_dynamic_shift(config) if flow and config.get("use_dynamic_shifting") else None,
        terminal=config.get("shift_terminal") or None,
        sigma_min=None if edm else config.get("sigma_min"),
        sigma_max=below if edm or flow else config.get("sigma_max"),
        # the Euler family lays levels out between the ends of its even grid, the others between the process's
        ends=even if over_levels and name.startswith(("Euler", "Heun", "KDPM2", "LMS")) else "",
        rho=float(config.get("rho") or 7.0),
    )


def _own_config(scheduler: Any) -> dict[str, Any]:
    """The options a scheduler reads. diffusers keeps those of other schedulers in its config as well."""
    read = inspect.signature(type(scheduler).__init__).parameters
    return {key: value for key, value in scheduler.config.items() if key in read}


def _even_spacing(scheduler: Any) -> str:
    """The grid that a scheduler's timestep_spacing means: each family of diffusers' schedulers has its own."""
    name, multistep = type(scheduler).__name__, is_multistep(scheduler)
    if is_flow(scheduler):
        # UniPC leaves the cleanest out; DPM-Solver and DEIS start a level below noise and go down to clean
        return "linspace_open" if name.startswith("UniPC") else "trailing" if multistep else "linspace"
    if name.startswith(("LCM", "TCD")):
        return "lcm"
    spacing = str(_own_config(scheduler).get("timestep_spacing", "linspace" if multistep else "leading"))
    if multistep and spacing != "trailing":
        return f"{spacing}_open"
    if spacing == "linspace" and name.startswith(("DDIM", "DDPM", "PNDM")):
        return "linspace_levels"
    return spacing


def is_multistep(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith(("DPMSolver", "UniPC", "DEIS", "SASolver"))


def is_flow(scheduler: Any) -> bool:
    name = type(scheduler).__name__
    return name.startswith("FlowMatch") or bool(_own_config(scheduler).get("use_flow_sigmas"))


def _dynamic_shift(config: Any) -> DynamicShift:
    return DynamicShift(
        kind=config.get("time_shift_type", "exponential"),
        base_shift=float(config.get("base_shift", 0.5)),
        max_shift=float(config.get("max_shift", 1.15)),
        base_tokens=int(config.get("base_image_seq_len", 256)),
        max_tokens=int(config.get("max_image_seq_len", 4096)),
    )

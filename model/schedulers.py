"""What a diffusers scheduler says about the model: its process, its prediction, its spacing of times."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..runtime.errors import CheckpointError
from ..runtime.manifest import GridSpec
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
    if name.startswith("FlowMatch"):
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
    if type(scheduler).__name__.startswith("FlowMatch"):
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
    config = scheduler.config
    first = config.get("set_alpha_to_one") is False or config.get("final_sigmas_type") == "sigma_min"
    return GridSpec(
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=int(config.get("steps_offset", 0)),
        final="first" if first else "clean",
    )

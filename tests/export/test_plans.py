"""The plans traced for other numbers of steps: what the model's own scheduler would do."""

import diffusers
import numpy as np
import pytest

from fewstep.export.plans import TRACED
from fewstep.model.schedulers import grid_of, prediction_of, process_of
from fewstep.runtime.plan import Plan, plan

SD15 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


EULERS_KIN = ("EulerDiscrete", "EulerAncestral", "Heun", "KDPM2", "LMS")


def end(table, spread=1.0):
    rng = np.random.default_rng(0)
    shape = (1, 4, 4, 4)

    def denoise(x, t):
        a, b, _ = t.call.x0
        return a * x + b * np.tanh(x * t.call.scale + 0.3)

    start = table.start(rng.standard_normal(shape)) * spread
    *_, last = table.run(denoise, start, lambda: rng.standard_normal(shape))
    return last.x


@pytest.mark.parametrize("options", [{}, {"timestep_spacing": "leading"}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("name", TRACED)
def test_a_traced_plan_repeats_the_scheduler(name, options):
    config = {**SD15, "clip_sample": False, "skip_prk_steps": True, **options}
    scheduler = getattr(diffusers, name).from_config(config)
    process, prediction, grid = process_of(scheduler), prediction_of(scheduler), grid_of(scheduler)
    for steps in (4, 10):
        own = Plan.from_diffusers(scheduler, steps)
        traced = plan(TRACED[name], steps, process, prediction=prediction, grid=grid)
        # Euler's kin start from noise of sigma_max, not hypot(1, sigma_max), unless the spacing is leading
        short = name.startswith(EULERS_KIN) and config.get("timestep_spacing") != "leading"
        there, here = end(own), end(traced, float(process.sigma(traced.calls[0].t)) if short else 1.0)
        # DEIS and TCD are written from their papers, not from diffusers
        near = 0.03 if name in ("DEISMultistepScheduler", "TCDScheduler") else 5e-6
        assert np.abs(here - there).max() / np.abs(there).max() < near

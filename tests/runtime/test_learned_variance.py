"""A network that learned its variance draws what diffusers draws with it."""

import diffusers
import numpy as np
import pytest
import torch

from fewstep.runtime import DiscreteVP, Plan, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.policy import with_learned_variance

LINEAR = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 1000)


def network(x, timestep):
    """[n, 4, ...] -> [n, 8, ...]: epsilon, then the variance output in [-1, 1]."""
    return np.concatenate([np.tanh(x * (1 + timestep / 1000)), np.cos(x)], axis=1)


def test_ddpm_with_learned_variance_is_diffusers():
    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(8)
    rng = np.random.default_rng(0)
    start, noises = rng.standard_normal((2, 4, 3, 3)), rng.standard_normal((8, 2, 4, 3, 3))

    generator, x, expected = torch.Generator(), torch.from_numpy(start), []
    drawn = iter(noises)
    original = diffusers.schedulers.scheduling_ddpm.randn_tensor
    diffusers.schedulers.scheduling_ddpm.randn_tensor = lambda *a, **k: torch.from_numpy(next(drawn))
    try:
        for t in scheduler.timesteps:
            output = torch.from_numpy(network(x.numpy(), float(t)))
            x = scheduler.step(output, t, x, generator=generator).prev_sample
            expected.append(x.numpy())
    finally:
        diffusers.schedulers.scheduling_ddpm.randn_tensor = original

    def denoise(x, t):
        out = network(x, t.timestep)
        t.variance = out[:, 4:]
        a, b, _ = t.call.x0
        return a * x + b * out[:, :4]

    table = with_learned_variance(plan("ddpm", 8, LINEAR, "trailing"), LINEAR)
    assert Plan.from_json(table.to_json()) == table
    ours = iter(noises)
    states = [step.x for step in table.run(denoise, start, lambda: next(ours))]
    # the last step of a strided grid: diffusers still adds noise there, the paper's sampler and ours do not
    for state, other in zip(states[:-1], expected[:-1], strict=True):
        np.testing.assert_allclose(state, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_a_network_without_a_variance_is_told_so():
    table = with_learned_variance(plan("ddpm", 3, LINEAR), LINEAR)
    with pytest.raises(PlanError, match="twice the sample's channels"):
        list(table.run(lambda x, t: x, np.ones((1, 4)), lambda: np.ones((1, 4))))


def test_a_plan_without_noise_has_no_variance_to_learn():
    with pytest.raises(PlanError, match="draws no noise"):
        with_learned_variance(plan("ddim", 3, LINEAR), LINEAR)

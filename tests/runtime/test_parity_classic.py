"""Samplers outside the exponential-integrator family give diffusers' numbers on diffusers' own noise levels."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, Plan
from fewstep.runtime.samplers import ddim
from fewstep.runtime.samplers.adams import ipndm
from fewstep.runtime.samplers.consistency import consistency
from fewstep.runtime.samplers.ddpm import ddpm
from fewstep.runtime.samplers.sa_solver import sa_solver

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISES = np.random.default_rng(3).standard_normal((200, 2, 3))
START = np.random.default_rng(4).standard_normal((2, 3))


def network(x):
    """Without a time: both sides ask at the same noise levels, and name those between trained levels differently."""
    return np.tanh(1.5 * x) * 0.7 + 0.1 * np.sin(3 * x)


def run(table, x):
    """What the network is shown at each call, and the final sample."""
    seen, fresh = [], iter(NOISES)

    def denoise(x, t):
        a, b, _ = t.call.x0
        seen.append(t.call.scale * x)
        return a * x + b * network(seen[-1])

    *_, last = table.run(denoise, x, lambda: next(fresh))
    return seen, last.x


def trained(scheduler):
    return DiscreteVP(scheduler.alphas_cumprod.double().numpy())


def at_sigmas(scheduler, process):
    """Their noise levels as our times, without the doublets of two-call schedulers."""
    sigmas = scheduler.sigmas.double().numpy()
    sigmas = sigmas[np.append(np.diff(sigmas) != 0, True)]
    with np.errstate(divide="ignore"):
        return np.minimum(process.t_of_lam(-np.log(sigmas)), process.t_max)


def at_levels(scheduler, end):
    return np.append(scheduler.timesteps.double().numpy() + 1, end)


def close(theirs, ours, tolerance=1e-6):
    assert len(theirs) == len(ours)
    for one, other in zip(theirs, ours, strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance * np.abs(one).max())


def same(theirs, table, tolerance=1e-6, start=START):
    seen, last = run(table, start)
    close(theirs, [*seen, last], tolerance)


def agree(scheduler, sampler, times, process, steps):
    theirs = Plan.from_diffusers(scheduler, steps)
    ours = Plan.trace(sampler, process, times)
    y = theirs.start(START)
    seen, last = run(theirs, y)
    ours_seen, ours_last = run(ours, y * (theirs.calls[0].scale / ours.calls[0].scale))
    close([*seen, last], [*ours_seen, ours_last])


@pytest.mark.parametrize("steps", [1, 5, 30])
@pytest.mark.parametrize(("variance", "large"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_ddpm(variance, large, steps):
    scheduler = diffusers.DDPMScheduler(**SD, clip_sample=False, variance_type=variance)
    scheduler.set_timesteps(steps)
    agree(scheduler, partial(ddpm, large=large), at_levels(scheduler, 0.0), trained(scheduler), steps)


@pytest.mark.parametrize("steps", [1, 5, 30])
def test_ddim(steps):
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(steps)
    agree(scheduler, ddim, at_levels(scheduler, 0.0), trained(scheduler), steps)


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("EulerDiscreteScheduler", "euler"),
        ("EulerAncestralDiscreteScheduler", "euler_ancestral"),
        ("HeunDiscreteScheduler", "heun"),
        ("KDPM2DiscreteScheduler", "kdpm2"),
        ("KDPM2AncestralDiscreteScheduler", "kdpm2_ancestral"),
        ("LMSDiscreteScheduler", "lms"),
    ],
)
@pytest.mark.parametrize("steps", [5, 30])
def test_samplers_of_k_diffusion(name, sampler, steps):
    scheduler = getattr(diffusers, name)(**SD)
    scheduler.set_timesteps(steps)
    process = trained(scheduler)
    agree(scheduler, SAMPLERS[sampler], at_sigmas(scheduler, process), process, steps)


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(("skip", "sampler"), [(True, "plms"), (False, "pndm")])
def test_pndm(skip, sampler, steps):
    """Steps that divide 1000 evenly and by 2: elsewhere diffusers calls the network a level off the state's."""
    scheduler = diffusers.PNDMScheduler(**SD, skip_prk_steps=skip, steps_offset=1)
    scheduler.set_timesteps(steps)
    levels = np.arange(steps)[::-1] * (1000 // steps) + 2.0
    agree(scheduler, SAMPLERS[sampler], np.append(levels, 1.0), trained(scheduler), steps)


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_distilled_models_of_stable_diffusion(name, steps):
    scheduler = {"lcm": diffusers.LCMScheduler, "tcd": diffusers.TCDScheduler}[name](**SD)
    scheduler.set_timesteps(steps)
    agree(scheduler, SAMPLERS[name], at_levels(scheduler, 1.0), trained(scheduler), steps)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("orders", [(1, 1), (2, 2), (3, 4), (3, 3)])
def test_sa_solver(orders, tau, monkeypatch):
    """With their noise levels in float64: in float32 their polynomials of third order lose five digits."""
    predictor, corrector = orders
    scheduler = diffusers.SASolverScheduler(
        **SD, predictor_order=predictor, corrector_order=corrector, tau_func=lambda t: torch.tensor(tau)
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas = scheduler.sigmas.double()
    theirs = by_hand(scheduler, diffusers.schedulers.scheduling_sasolver, monkeypatch, START)
    process = trained(scheduler)
    sampler = partial(sa_solver, tau=tau, predictor=predictor, corrector=corrector)
    same(theirs, Plan.trace(sampler, process, at_sigmas(scheduler, process)), 1e-7)


def test_edm_euler():
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(12)
    agree(scheduler, SAMPLERS["euler"], np.minimum(scheduler.sigmas.double().numpy(), 80), EDM(), 12)


def by_hand(scheduler, module, monkeypatch, x, **options):
    """The loop of a pipeline, in float64, for what probing does not reach."""
    fresh = iter(NOISES)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: torch.from_numpy(next(fresh)))
    seen, x = [], torch.from_numpy(x)
    for t in scheduler.timesteps:
        seen.append(scheduler.scale_model_input(x, t).double().numpy())
        x = scheduler.step(torch.from_numpy(network(seen[-1])), t, x, **options).prev_sample
    return [*seen, x.double().numpy()]


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_fresh_noise(eta, monkeypatch):
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(20)
    theirs = by_hand(scheduler, diffusers.schedulers.scheduling_ddim, monkeypatch, START, eta=eta)
    table = Plan.trace(partial(ddim, eta=eta), trained(scheduler), at_levels(scheduler, 0.0))
    same(theirs, table, 2e-6)  # theirs squares float32 alphas


def test_ipndm():
    """From its second time on: at its first, where alpha is 0, diffusers divides by 1e-8 and loses the prediction."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(12)
    for name in ("betas", "alphas", "timesteps"):
        setattr(scheduler, name, getattr(scheduler, name)[1:].double())
    theirs = by_hand(scheduler, diffusers.schedulers.scheduling_ipndm, None, START)

    class Quarter(DiscreteVP):
        """Their sigma, the squared sine of a quarter turn, up to the time where the loop now starts."""

        t_max = 11 / 12

        def alpha(self, t):
            return np.sqrt(1 - self.sigma(t) ** 2)

        def sigma(self, t):
            return np.sin(np.asarray(t) * np.pi / 2) ** 2

    grid = np.arange(11, -1, -1) / 12
    same(theirs, Plan.trace(ipndm, Quarter(np.ones(2)), grid, prediction="v_prediction"))


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_consistency_models(steps, monkeypatch):
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.sigmas[-1] = 0.002  # in float32 it lies above sigma_min, and some noise comes through
    module = diffusers.schedulers.scheduling_consistency_models
    theirs = by_hand(scheduler, module, monkeypatch, 80 * START)
    grid = np.append(np.minimum(scheduler.sigmas[:-1].numpy(), 80), 0.0)
    same(theirs, Plan.trace(consistency, EDM(), grid), start=80 * START)

"""Plans probed from diffusers' schedulers equal them."""

import inspect

import diffusers
import numpy as np
import pytest
import torch

from fewstep.runtime import DiscreteVP, Noise, Plan
from fewstep.runtime.errors import NotLinear, PlanError
from fewstep.runtime.policy import Clip, Threshold

SD15 = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
SDXL = {**SD15, "timestep_spacing": "leading", "steps_offset": 1}
ZERO_SNR = {
    **SD15,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
STEPS = [1, 2, 3, 5, 20, 50]

VP = [
    ("DDIMScheduler", {"clip_sample": False}),
    ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    ("DDIMInverseScheduler", {"clip_sample": False}),
    ("DDIMParallelScheduler", {"clip_sample": False}),
    ("CogVideoXDDIMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("LMSDiscreteScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepInverseScheduler", {}),
    ("DPMSolverSinglestepScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "use_exponential_sigmas": True}),
]
OTHER = [
    ("IPNDMScheduler", {}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
]
STOCHASTIC = [
    ("DDPMScheduler", {"clip_sample": False}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("KDPM2AncestralDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {}),
    ("SASolverScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("FlowMatchLCMScheduler", {}),
]


def build(name, config):
    """The scheduler, given the options it knows."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in config.items() if key in known})


def network(x, t):
    return np.tanh(x * (1 + t / 1000)) * 0.7 + 0.1 * np.sin(3 * x)


def by_diffusers(scheduler, steps, x, generator=None):
    """The loop of a diffusers pipeline, in float64."""
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(x) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(network(scaled.double().numpy(), float(t)))
        extra = {"generator": generator} if takes_generator and generator is not None else {}
        x = scheduler.step(output, t, x, **extra).prev_sample
    return x.double().numpy()


def by_plan(table, x, noise=None):
    def denoise(x, t):
        a, b, _ = t.call.x0
        return a * x + b * network(t.call.scale * x, t.timestep)

    *_, last = table.run(denoise, table.start(x), noise)
    return last.x


def compare(scheduler, steps):
    x = np.random.default_rng(1).standard_normal((1, 4, 8, 8))
    try:
        expected = by_diffusers(scheduler, steps, x)
    except Exception:  # some schedulers cannot do so few steps themselves; then there must be no plan either
        with pytest.raises((NotLinear, PlanError)):
            Plan.from_diffusers(scheduler, steps)
        return
    table = Plan.from_diffusers(scheduler, steps)
    assert table.noises == 0
    peak = np.abs(expected).max()
    if np.isfinite(peak) and peak > 0:
        assert np.abs(by_plan(table, x) - expected).max() <= 1e-6 * peak


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize(("name", "options"), VP, ids=str)
def test_a_plan_equals_the_scheduler_it_was_probed_from(name, options, config, steps):
    compare(build(name, {**config, **options}), steps)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("name", "options"), OTHER, ids=str)
def test_a_plan_equals_the_flow_and_edm_scheduler(name, options, steps):
    compare(build(name, options), steps)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_plan_equals_the_scheduler_at_zero_terminal_snr(name):
    compare(build(name, {**ZERO_SNR, "clip_sample": False}), 10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_plan_equals_the_scheduler_whatever_the_network_predicts(name, prediction):
    compare(build(name, {**SD15, "clip_sample": False, "prediction_type": prediction}), 12)


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize(("name", "options"), STOCHASTIC, ids=str)
def test_the_same_seed_gives_the_same_stochastic_sample(name, options, steps):
    scheduler = build(name, {**SD15, **options})
    x = np.random.default_rng(1).standard_normal((1, 4, 8, 8))
    expected = by_diffusers(build(name, {**SD15, **options}), steps, x, torch.Generator().manual_seed(7))
    table, stream = Plan.from_diffusers(scheduler, steps), Noise(7)
    got = by_plan(table, x, lambda: stream.randn((1, 4, 8, 8)).astype(np.float64))
    if not options and name == "LCMScheduler" and steps == 1:
        assert table.noises == 0
    # torch draws float64 noise for float64 outputs, another stream; compare where that cannot matter
    if table.noises == 0:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    else:
        single = by_diffusers_float32(build(name, {**SD15, **options}), steps, x)
        np.testing.assert_allclose(got, single, rtol=2e-3, atol=2e-4)


def by_diffusers_float32(scheduler, steps, x):
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    x = torch.from_numpy(x).float() * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(network(scaled.double().numpy(), float(t))).float()
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    return x.double().numpy()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample"),
        ("DDIMScheduler", {"clip_sample": False, "thresholding": True}, "thresholding"),
        ("CMStochasticIterativeScheduler", {}, "clip_denoised"),
        ("DPMSolverSDEScheduler", {}, "correlated noise"),
        ("RePaintScheduler", {}, "RePaintScheduler"),
        ("KarrasVeScheduler", {}, "KarrasVeScheduler"),
        ("ScoreSdeVpScheduler", {}, "ScoreSdeVpScheduler"),
    ],
)
def test_what_is_not_linear_is_refused_by_name(name, options, reason):
    cls = getattr(diffusers, name, None) or getattr(diffusers.schedulers, name)
    with pytest.raises(NotLinear, match=reason):
        Plan.from_diffusers(cls(**options), 5)


@pytest.mark.parametrize(
    ("name", "options", "policy"),
    [
        ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 2.0}, Clip(2.0)),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5}, Threshold(0.995, 1.5)),
        (
            "DPMSolverMultistepScheduler",
            {"thresholding": True, "sample_max_value": 3.0},
            Threshold(0.995, 3.0),
        ),
        ("UniPCMultistepScheduler", {"thresholding": True}, Threshold(0.995, 1.0)),
        ("UnCLIPScheduler", {}, Clip(1.0)),
    ],
)
def test_what_a_scheduler_does_to_x0_alone_becomes_a_policy(name, options, policy):
    scheduler = build(name, options)
    table = Plan.from_diffusers(scheduler, 5)
    assert all(call.policies == (policy,) for call in table.calls)
    assert Plan.from_json(table.to_json()) == table


def test_the_preview_of_a_multistep_solver_is_its_x0_from_the_first_call_on():
    table = Plan.from_diffusers(build("DPMSolverMultistepScheduler", SD15), 5)
    for call in table.calls:
        process = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
        alpha, sigma = float(process.alpha(call.t)), float(process.sigma(call.t))
        np.testing.assert_allclose(call.x0[:2], (1 / alpha, -sigma / alpha), rtol=1e-5)


def test_probing_leaves_the_scheduler_alone():
    scheduler = build("EulerDiscreteScheduler", SD15)
    scheduler.set_timesteps(7)
    before = scheduler.timesteps.clone()
    Plan.from_diffusers(scheduler, 20)
    assert torch.equal(scheduler.timesteps, before)


def test_rows_of_unipc_stay_short():
    table = Plan.from_diffusers(build("UniPCMultistepScheduler", SD15), 50)
    assert max(len(call.next) for call in table.calls) <= 4


@pytest.mark.parametrize("steps", [0, 10**6])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(PlanError, match="1 to 1000"):
        Plan.from_diffusers(build("DDIMScheduler", {}), steps)

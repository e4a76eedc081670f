"""Our exponential integrators and diffusers' schedulers, on the same noise levels, take the same steps.

diffusers runs in float64 here, so that what is compared is the formulas; it rounds to float32 by itself.
"""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch

from fewstep.runtime import Plan, RectifiedFlow
from fewstep.runtime.samplers import SAMPLERS

SHAPE = (2, 3, 4, 4)


class SigmaVP:
    """The variance preserving process whose time is diffusers' sigma, the ratio of noise to signal."""

    t_max = 1e3

    def alpha(self, t):
        return 1 / np.hypot(1, np.asarray(t, dtype=np.float64))

    def sigma(self, t):
        return np.asarray(t, dtype=np.float64) * self.alpha(t)

    def t_of_lam(self, lam):
        return np.exp(-np.asarray(lam, dtype=np.float64))

    def timestep(self, t):
        return np.asarray(t, dtype=np.float64)

    def input_scale(self, t):
        return np.ones_like(np.asarray(t, dtype=np.float64))

    def to_json(self):
        return {"kind": "sigma_vp"}


class Torch64:
    """torch, except that what asks for float32 gets float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def network(x, sigma):
    return 0.7 * np.tanh(x * (1 + 0.3 * sigma / (1 + sigma))) + 0.1 * np.sin(3 * x + sigma)


def theirs(scheduler, steps, noises, monkeypatch):
    """(noise levels, states) of diffusers' own loop."""
    module = __import__(type(scheduler).__module__, fromlist=["torch"])
    monkeypatch.setattr(module, "torch", Torch64())
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    x, states = torch.from_numpy(noises[0]), []
    for t, sigma, noise in zip(scheduler.timesteps, scheduler.sigmas, noises[1:]):
        fresh = (
            {"variance_noise": torch.from_numpy(noise)} if "sde" in scheduler.config.algorithm_type else {}
        )
        out = torch.from_numpy(network(x.numpy(), float(sigma)))
        x = scheduler.step(out, t, x, **fresh).prev_sample
        assert x.dtype == torch.float64
        states.append(x.numpy())
    return scheduler.sigmas.numpy(), states


def ours(sampler, sigmas, noises, process):
    """States of the sampler, as a plan, by the index of the noise level they stand at."""
    table = Plan.trace(sampler, process, sigmas, prediction="sample")
    draw = iter(noises[1:])
    steps = table.run(lambda x, t: network(x, float(t)), noises[0], lambda: next(draw))
    after = np.flatnonzero([call.next is not None for call in table.calls])
    return {int(i): step.x for i, step in zip(after, steps, strict=True)}


def compare(kind, sampler, steps, monkeypatch, process=None, **config):
    noises = np.random.default_rng(0).standard_normal((steps + 1, *SHAPE))
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config = {"algorithm_type": "", **beta, **config} if kind != "UniPCMultistep" else {**beta, **config}
    scheduler = getattr(diffusers, kind + "Scheduler")(**config, prediction_type="sample")
    if kind == "UniPCMultistep":
        scheduler.register_to_config(algorithm_type="")  # the loop above asks every scheduler for it
    sigmas, expected = theirs(scheduler, steps, noises, monkeypatch)
    found = ours(sampler, sigmas, noises, process or SigmaVP())
    assert steps - 1 in found
    for i, x in found.items():
        error = np.abs(x - expected[i]).max() / np.abs(expected[i]).max()
        assert error < 1e-6, f"state {i}: {error:.1e}"


def with_options(name, **options):
    return partial(SAMPLERS[name], **options)


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("dpmsolver", "dpm_solver_2m"),
        ("dpmsolver++", "dpmpp_2m"),
        ("sde-dpmsolver", "dpm_solver_2m_sde"),
        ("sde-dpmsolver++", "dpmpp_2m_sde"),
    ],
)
def test_multistep_of_second_order(algorithm, name, solver_type, karras, steps, monkeypatch):
    compare(
        "DPMSolverMultistep",
        with_options(name, solver_type=solver_type),
        steps,
        monkeypatch,
        algorithm_type=algorithm,
        solver_type=solver_type,
        # with final_sigmas_type sigma_min diffusers' Karras levels end with a step of no length
        use_karras_sigmas=karras and "++" in algorithm,
        timestep_spacing="trailing" if karras else "linspace",
        final_sigmas_type="zero" if "++" in algorithm else "sigma_min",
    )


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("lower_order_final", [False, True])
@pytest.mark.parametrize(("algorithm", "name"), [("dpmsolver", "dpm_solver_3m"), ("dpmsolver++", "dpmpp_3m")])
def test_multistep_of_third_order(algorithm, name, lower_order_final, steps, monkeypatch):
    compare(
        "DPMSolverMultistep",
        with_options(name, solver_type="published", lower_order_final=lower_order_final),
        steps,
        monkeypatch,
        algorithm_type=algorithm,
        solver_order=3,
        lower_order_final=lower_order_final,
        final_sigmas_type="sigma_min",
    )


def test_multistep_on_flow_matching(monkeypatch):
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 3, "algorithm_type": "dpmsolver++"}
    compare("DPMSolverMultistep", SAMPLERS["dpmpp_3m"], 10, monkeypatch, RectifiedFlow(), **config)


@pytest.mark.parametrize("steps", [2, 3, 7, 9, 10, 11])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("algorithm", "order", "name"),
    [
        ("dpmsolver", 2, "dpm_solver_2s"),
        ("dpmsolver", 3, "dpm_solver_3s"),
        ("dpmsolver++", 2, "dpmpp_2s"),
        ("dpmsolver++", 3, "dpmpp_3s"),
    ],
)
def test_singlestep(algorithm, order, name, solver_type, steps, monkeypatch):
    if algorithm == "dpmsolver" and order == 2 and steps % 2 == 0:
        steps += 1  # diffusers ends an even number of calls with two of first order, also short of sigma 0
    compare(
        "DPMSolverSinglestep",
        with_options(name, solver_type=solver_type),
        steps,
        monkeypatch,
        algorithm_type=algorithm,
        solver_type=solver_type,
        solver_order=order,
        lower_order_final=True,
        final_sigmas_type="zero" if "++" in algorithm else "sigma_min",
    )


@pytest.mark.parametrize("steps", [3, 7, 20])
@pytest.mark.parametrize("predict_x0", [False, True])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, predict_x0, steps, monkeypatch):
    off = [0, 2] if steps == 7 else []
    compare(
        "UniPCMultistep",
        with_options(
            "unipc", order=order, variant=variant, noise_prediction=not predict_x0, disable_corrector=off
        ),
        steps,
        monkeypatch,
        solver_order=order,
        solver_type=variant,
        predict_x0=predict_x0,
        disable_corrector=off,
        # onto sigma 0 diffusers' bh1 and its noise prediction are NaN
        final_sigmas_type="zero" if variant == "bh2" and predict_x0 else "sigma_min",
    )


@pytest.mark.parametrize("steps", [3, 7, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_in_log_rho(order, steps, monkeypatch):
    sampler = with_options("deis", order=order - 1, variable="log_rho")
    compare("DEISMultistep", sampler, steps, monkeypatch, algorithm_type="deis", solver_order=order)

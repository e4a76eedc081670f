"""Samplers on data whose ideal denoiser is known, so that every error is the sampler's own."""

import numpy as np
import pytest

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, RectifiedFlow, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.process import lam

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)
SPREAD = 0.6
"""Standard deviation of the Gaussian data."""


def gaussian(process):
    """The ideal denoiser of N(0, SPREAD^2) data and the exact flow map from one time to another."""

    def denoise(x, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return x * alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)

    def scale(t):
        return np.sqrt(process.alpha(t) ** 2 * SPREAD**2 + process.sigma(t) ** 2)

    return denoise, lambda x, t0, t1: x * scale(t1) / scale(t0)


def order(sampler, process, times_of):
    denoise, exact = gaussian(process)
    errors = []
    for steps in (160, 320):
        times = times_of(steps)
        *_, last = plan(sampler, steps, process, times).run(denoise, np.array([1.0]))
        errors.append(abs(float((last.x - exact(1.0, times[0], times[-1]))[0])))
    return np.log2(errors[0] / errors[1])


def even_in_lam(process, low, high):
    ends = lam(process, np.array([high, low]))
    return lambda steps: process.t_of_lam(np.linspace(*ends, steps + 1))


@pytest.mark.parametrize(("sampler", "expected"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize(
    ("process", "low", "high"), [(EDM(), 0.05, 20.0), (RectifiedFlow(), 0.05, 0.95)], ids=["edm", "flow"]
)
def test_order_of_accuracy(sampler, expected, process, low, high):
    assert order(sampler, process, even_in_lam(process, low, high)) == pytest.approx(expected, abs=0.1)


def test_samplers_agree_on_the_clean_sample_of_a_point():
    """Data at one point: the ideal denoiser is that point, and every sampler must end there exactly."""
    point = np.array([[0.3, -1.2]])
    for name in SAMPLERS.keys() - {
        "consistency"
    }:  # which is the identity at sigma_min, whatever the network says
        table = plan(name, 5, SD15)
        *_, last = table.run(lambda x, t: point, np.ones((1, 2)), lambda: np.ones((1, 2)))
        np.testing.assert_allclose(
            last.x, point, rtol=1e-6, err_msg=name
        )  # lcm keeps 3e-6 of x at the first level


def test_euler_is_ddim_without_noise():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3))
    for process in (SD15, RectifiedFlow(), EDM()):
        ends = [
            [s.x for s in plan(name, 7, process).run(lambda x, t: np.tanh(x), x)][-1]
            for name in ("ddim", "euler")
        ]
        np.testing.assert_allclose(*ends, rtol=1e-9)


def test_ancestral_ddim_keeps_the_marginal_variance():
    """eta = 1 on Gaussian data: the variance after every step is the forward process's, up to discretisation."""
    from functools import partial

    from fewstep.runtime.samplers import ddim

    rng = np.random.default_rng(1)
    denoise, _ = gaussian(SD15)
    x = rng.standard_normal(20_000)
    table = plan(partial(ddim, eta=1.0), 1000, SD15)
    assert table.noises == 999
    *_, last = table.run(denoise, x, lambda: rng.standard_normal(20_000))
    assert last.x.std() == pytest.approx(SPREAD, rel=0.02)


def test_an_unknown_sampler_names_the_known_ones():
    with pytest.raises(PlanError, match="did you mean .*ddim"):
        plan("ddjm", 5, SD15)


@pytest.mark.parametrize(("steps", "expected"), [(4, "unipc_3"), (10, "unipc"), (20, "ipndm")])
def test_auto_is_the_sampler_of_its_number_of_steps_on_the_ays_grid(steps, expected):
    assert plan("auto", steps, SD15).calls == plan(expected, steps, SD15, "ays_sdxl").calls
    assert plan("auto", steps, EDM()).calls == plan(expected, steps, EDM()).calls


@pytest.mark.parametrize(("steps", "expected"), [(6, "dpmpp_2s"), (10, "dpmpp_2m")])
def test_auto_with_guidance_stays_at_second_order(steps, expected):
    assert plan("auto_guided", steps, SD15).calls == plan(expected, steps, SD15, "ays_sdxl").calls

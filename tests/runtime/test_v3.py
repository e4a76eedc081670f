"""DPM-Solver-v3: its integrals, its two known special cases, and what measured statistics are worth."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.integrate import quad

from fewstep.runtime import EDM, SAMPLERS
from fewstep.runtime.errors import PlanError
from fewstep.runtime.process import lam
from fewstep.runtime.samplers.dpm_solver_v3 import Statistics
from fewstep.runtime.samplers.exponential import J

from .exact import GAUSSIAN, MIXTURE, SD15, errors, even_in_lam
from .test_exponential import run, sampler


@pytest.mark.parametrize("order", [1, 2, 3])
def test_v3_without_statistics_is_dpmpp_and_with_the_noise_s_is_dpm_solver(order):
    times = np.geomspace(20, 0.1, 13)
    plain = {"order": order, "corrector": False, "lower_order_final": False}
    taylor = [sampler("deis", order=order - 1, variable="log_rho", lower_order_final=False)]
    taylor += [{1: "ddim", 2: sampler("dpmpp_2m", solver_type="heun"), 3: "dpmpp_3m_exact"}[order]]
    if order > 1:
        taylor[1] = partial(SAMPLERS["dpmpp_2m"], solver_type="heun", lower_order_final=False)
    if order == 3:
        taylor[1] = partial(SAMPLERS["dpmpp_3m_exact"], lower_order_final=False)
    noise = Statistics((0.0,), (0.0,), (-1.0,))
    denoise, x = GAUSSIAN.denoiser(EDM()), np.array([3.0, -8.0])
    for options, reference in zip(({"statistics": noise}, {}), taylor, strict=True):
        ends = [
            run(s, EDM(), times, denoise, x)[-1].x
            for s in (sampler("dpm_solver_v3", **plain, **options), reference)
        ]
        np.testing.assert_allclose(*ends, rtol=1e-10)


def test_v3_is_exact_in_one_step_where_the_statistics_are_the_denoiser_s():
    """Data of zero mean and spread s: eps is linear in x. With l = sigma^2/(sigma^2 + s^2) nothing is left to integrate
    but a constant, 0, so that the state follows the flow at first order already."""
    s2 = 0.36
    knots = np.linspace(-4, 4, 4001)
    l = tuple(np.exp(-2 * knots) / (np.exp(-2 * knots) + s2))  # noqa: E741
    statistics = Statistics(tuple(knots), l, (0.0,) * len(knots))
    times = np.array([30.0, 4.0, 0.5, 0.05])
    denoise = lambda x, t: x * s2 / (s2 + float(t) ** 2)  # noqa: E731
    last = run(
        sampler("dpm_solver_v3", statistics=statistics, order=1), EDM(), times, denoise, np.array([10.0])
    )[-1]
    assert last.x[0] == pytest.approx(10 * math.sqrt((s2 + 0.05**2) / (s2 + 30**2)), rel=1e-5)


def test_statistics_are_integrated_as_piecewise_linear_functions():
    statistics = Statistics((-1.0, 0.5, 2.0), (1.0, 0.2, 0.6), (0.0, -1.0, 0.5))
    for end in (-2.0, -0.3, 1.1, 3.0):
        exact = quad(lambda v: np.interp(v, statistics.lam, statistics.l), -1, end, points=[0.5, 2.0])[0]
        assert float(statistics.integral(statistics.l, end)) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("pseudo", [False, True])
def test_v3_is_exact_for_the_derivatives_it_uses(pseudo):
    """A prediction linear in lam: two points know it, with divided differences as well."""
    times = np.geomspace(20, 0.5, 6)
    options = {"order": 2, "pseudo": pseudo, "corrector": False, "lower_order_final": False}
    steps = run(
        sampler("dpm_solver_v3", **options),
        EDM(),
        times,
        lambda x, t: np.array([2 - math.log(t)]),
        np.ones(1),
    )
    start, h = -math.log(times[2]), math.log(times[2] / times[3])
    expected = times[3] / times[2] * steps[1].x[0] + (2 + start) * J(h, 2)[0] + J(h, 2)[1]
    assert steps[2].x[0] == pytest.approx(expected, rel=1e-12)


def test_statistics_that_do_not_fit_together_are_refused():
    for bad in (((0.0, 1.0), (1.0,), (0.0,)), ((1.0, 0.0), (1.0, 1.0), (0.0, 0.0)), ((), (), ())):
        with pytest.raises(PlanError, match="statistics"):
            Statistics(*bad)


def measured(process, low, high, knots=60):
    """l = E[d(sigma eps)/dx] and s = E[f f']/E[f^2] of the mixture, f' along the flow: by finite differences on
    drawn samples. Without the paper's bias b the regression of f' on f goes through the origin."""
    denoise, rng = MIXTURE.denoiser(process), np.random.default_rng(0)
    part = rng.choice(3, p=MIXTURE.weights, size=2000)
    x0 = np.array(MIXTURE.means)[part] + np.array(MIXTURE.spreads)[part] * rng.standard_normal(2000)
    z, at, d = rng.standard_normal(2000), np.linspace(*lam(process, np.array([high, low])), knots), 1e-3

    def noise(y, v):  # y = x / alpha at lam = v -> e^-lam eps
        t = float(process.t_of_lam(v))
        return y - denoise(float(process.alpha(t)) * y, t)

    y = [x0 + np.exp(-v) * z for v in at]
    l = [np.mean(noise(a + d, v) - noise(a - d, v)) / (2 * d) for a, v in zip(y, at, strict=True)]  # noqa: E741

    def f(y, v):
        return noise(y, v) - np.interp(v, at, l) * y

    s = []
    for a, v in zip(y, at, strict=True):
        slope = (f(a - d * noise(a, v), v + d) - f(a + d * noise(a, v), v - d)) / (2 * d)
        s.append(np.mean(slope * f(a, v)) / np.mean(f(a, v) ** 2))
    return tuple(at), tuple(l), tuple(s)


@pytest.mark.parametrize(
    ("process", "low", "high"), [(EDM(), 0.05, 20.0), (SD15, 60.0, 990.0)], ids=["edm", "vp"]
)
def test_measured_statistics_cut_the_error_of_few_steps(process, low, high):
    """On the mixture, 5 to 10 steps: l alone already helps, l and s more than halve the error of UniPC."""
    at, l, s = measured(process, low, high)  # noqa: E741
    times, steps = even_in_lam(process, low, high), (5, 7, 10)
    unipc = errors("unipc", process, times, steps)
    linear = sampler("dpm_solver_v3", statistics=Statistics(at, l, (0.0,) * len(at)))
    both = sampler("dpm_solver_v3", statistics=Statistics(at, l, s))
    for plain, one, two in zip(
        unipc, errors(linear, process, times, steps), errors(both, process, times, steps), strict=True
    ):
        assert two < one < 1.15 * plain
        assert two < 0.5 * plain

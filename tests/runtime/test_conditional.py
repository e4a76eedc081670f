"""Processes with an observation: their published marginals and steps, through the samplers that know nothing of y."""

import json
import math
from functools import partial

import numpy as np
import pytest

from fewstep.runtime import DiscreteVP, Plan, plan
from fewstep.runtime.conditional import (
    CONDITIONAL,
    OUVE,
    DataPrior,
    MeanReverting,
    Resfusion,
    ResidualDenoising,
    ResidualShift,
    SchroedingerBridge,
)
from fewstep.runtime.errors import BadInput, PlanError
from fewstep.runtime.process import lam, process_from_json
from fewstep.runtime.samplers import SAMPLERS
from fewstep.runtime.samplers.ddim import ddim
from fewstep.runtime.samplers.residual import langevin_corrected, reverse_chain

from .exact import GAUSSIAN

VP = DiscreteVP.from_betas(np.linspace(1e-4, 0.05, 200))
PROCESSES = [
    ResidualShift(),
    ResidualDenoising(),
    Resfusion(12),
    Resfusion(100),
    MeanReverting(),
    OUVE(),
    SchroedingerBridge(),
    DataPrior(VP),
]
NAMES = [type(process).__name__ for process in PROCESSES]
EVERY = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
RNG = np.random.default_rng(0)
X0, Y, X, Z = RNG.standard_normal((4, 2, 3))


def steps_of(table, process, x0, y, noise=None):
    """Run a plan with a network that always answers x0. States as the sampler has them: x - gamma y."""
    return list(table.run(lambda x, t: x0, table.start(Z, [y]), noise, [y]))


# marginals


@EVERY
def test_clean_data_at_time_0(process):
    assert process.alpha(0.0) == 1
    assert process.sigma(0.0) == 0
    assert process.gamma(0.0) == (-1 if isinstance(process, DataPrior) else 0)  # which has x0 - y there


@EVERY
def test_t_of_lam_inverts_lam(process):
    t = np.linspace(process.t_max * 1e-3, process.t_max * 0.999, 201)
    np.testing.assert_allclose(process.t_of_lam(lam(process, t)), t, rtol=1e-9)
    assert process.t_of_lam(np.inf) == 0
    assert process.t_of_lam(-np.inf) == process.t_max


def test_resshift_has_the_published_four_levels():
    process, t = ResidualShift(), np.arange(1, 5)
    roots = process.sigma(t) / 2
    np.testing.assert_allclose(roots, [0.1, 0.5201, 0.7614, 0.99], atol=5e-5)
    np.testing.assert_allclose(process.gamma(t), roots**2, rtol=1e-14)
    np.testing.assert_allclose(process.alpha(t) + process.gamma(t), 1, rtol=1e-14)
    np.testing.assert_allclose(process.input_scale(t), 1 / np.sqrt(4 * roots**2 + 1), rtol=1e-14)
    np.testing.assert_array_equal(process.timestep(t), [0, 1, 2, 3])


def test_rddm_sums_weights_that_fall_and_variances_that_rise():
    process, t = ResidualDenoising(50, 0.01), np.arange(1, 51)
    weights = np.arange(50, 0, -1) / (0.5 * 50 * 51)
    np.testing.assert_allclose(process.gamma(t), np.cumsum(weights), rtol=1e-12)
    np.testing.assert_allclose(process.alpha(t), 1 - np.cumsum(weights), atol=1e-14)
    np.testing.assert_allclose(process.sigma(t) ** 2, 0.01 * np.cumsum(weights[::-1]), rtol=1e-12)


@pytest.mark.parametrize(("steps", "levels"), [(12, 5), (20, 8)])
def test_resfusion_starts_where_the_clean_image_has_left_the_mean(steps, levels):
    process = Resfusion(steps)
    assert process.t_max == levels
    s = np.sqrt(np.cumprod(1 - np.linspace(0.1 / steps, 20 / steps, steps)[: levels - 1]))
    t = np.arange(1, levels)
    np.testing.assert_allclose(process.alpha(t), s - (1 - s), rtol=1e-12)  # x0 itself, and in R = y - x0
    np.testing.assert_allclose(process.gamma(t), 1 - s, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t), np.sqrt(1 - s**2), rtol=1e-12)
    assert (process.alpha(levels), process.gamma(levels)) == (0, 0.5)


def test_mean_reverting_keeps_its_stationary_relation():
    process, t = MeanReverting(), np.arange(1, 101)
    a = process.alpha(t)
    np.testing.assert_allclose(process.sigma(t) ** 2, (10 / 255) ** 2 * (1 - a**2), rtol=1e-12)
    assert a[-1] == pytest.approx(0.005)
    x = np.arange(103) / 102  # the authors' cosine schedule, knot by knot
    cosine = np.cos((x + 0.008) / 1.008 * np.pi / 2) ** 2
    theta = 1 - (cosine / cosine[0])[1:-1]
    total = np.cumsum(theta) - theta[0]
    np.testing.assert_allclose(a, np.exp(total[1:] / total[-1] * math.log(0.005)), rtol=1e-12)


def test_ouve_solves_its_stochastic_differential_equation():
    """Mean and variance by Euler on their own equations: m' = k (y - m), v' = -2 k v + g^2."""
    process, n = OUVE(), 20_000
    mean, variance, r = 1.0, 0.0, 10.0
    for i in range(n):
        g2 = (0.05 * r ** ((i + 0.5) / n)) ** 2 * 2 * math.log(r)
        mean, variance = mean - 1.5 * mean / n, variance + (g2 - 3.0 * variance) / n
    assert process.alpha(1.0) == pytest.approx(mean, rel=2e-4)
    assert process.gamma(1.0) == pytest.approx(1 - mean, rel=2e-4)
    assert process.sigma(1.0) ** 2 == pytest.approx(variance, rel=2e-4)


def test_the_bridge_is_brownian_motion_pinned_at_both_ends():
    process, t = SchroedingerBridge(), np.linspace(0.01, 0.99, 9)
    v = 0.01 * t + (50 - 0.01) * t**2 / 2
    end = 0.01 + (50 - 0.01) / 2
    np.testing.assert_allclose(process.gamma(t), v / end, rtol=1e-12)
    np.testing.assert_allclose(process.alpha(t), 1 - v / end, rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t) ** 2, v * (end - v) / end, rtol=1e-12)


# what the network is shown, and where runs start


@EVERY
def test_the_network_is_shown_x_t_and_starts_as_published(process):
    """x at the start is y + sigma z, with half of y for Resfusion and none for PriorGrad."""
    table, shown = plan("ddim", 4, process), []

    def network(x, t):
        shown.append((float(t), x.copy()))
        return X0

    list(table.run(network, table.start(Z, [Y]), None, [Y]))
    t, x = shown[0]
    assert t == process.t_max
    share = {Resfusion: 0.5, DataPrior: 0.0}.get(type(process), 1.0)
    np.testing.assert_allclose(x, share * Y + process.sigma(t) * Z, rtol=1e-12, atol=1e-14)
    # with the true x0, every later x_t lies on the path of the first one's noise
    u = process.sigma(t) * Z + process.alpha(t) * Y
    eps = (u - process.alpha(t) * X0) / process.sigma(t)
    for t, x in shown[1:]:
        expected = process.alpha(t) * X0 + process.gamma(t) * Y + process.sigma(t) * eps
        np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-12)


@EVERY
@pytest.mark.parametrize("name", SAMPLERS)
def test_data_at_one_point_ends_there(process, name):
    try:
        table = plan(name, 4, process)
    except PlanError as refused:
        assert process.kind in str(refused)  # noqa: PT017 - those made for one process name the one they met
        return
    rng = np.random.default_rng(1)
    *_, last = steps_of(table, process, X0, Y, lambda: rng.standard_normal((2, 3)))
    np.testing.assert_allclose(last.x, X0, rtol=1e-9, atol=1e-9)


@EVERY
@pytest.mark.parametrize(("name", "expected"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_accuracy_on_gaussian_data(process, name, expected):
    """x0 given y is Gaussian: the probability flow of x - gamma y only rescales about its mean."""
    denoise, low, high = GAUSSIAN.denoiser(process), 0.1 * process.t_max, 0.9 * process.t_max
    ends = lam(process, np.array([high, low]))
    found = []
    for n in (160, 320):
        times = process.t_of_lam(np.linspace(*ends, n + 1))
        spread = np.hypot(0.6 * process.alpha(times[0]), process.sigma(times[0]))
        u = 0.3 * process.alpha(times[0]) + spread * np.array([-1.7, -0.6, 0.1, 0.9, 1.5])
        y = np.full(5, 0.7)

        def network(x, t, y=y):
            return denoise(x - process.gamma(t) * y, t)

        *_, last = plan(name, n, process, times).run(network, u, None, [y])
        found.append(np.sqrt(np.mean((last.x - GAUSSIAN.flow(process, u, times[0], times[-1])) ** 2)))
    assert math.log2(found[0] / found[1]) == pytest.approx(expected, abs=0.15)


# predictions


@EVERY
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "residual", "score", "resnoise"])
def test_every_prediction_recovers_x0(process, prediction):
    if prediction == "resnoise" and not isinstance(process, Resfusion):
        with pytest.raises(PlanError, match="resnoise"):
            plan("ddim", 4, process, prediction=prediction)
        return
    top = 0.8 * process.t_max if process.alpha(process.t_max) == 0 else process.t_max
    table = plan("ddim", 3, process, np.linspace(top, 0, 4), prediction=prediction)
    for call in table.calls:
        alpha, gamma, sigma = (float(f(call.t)) for f in (process.alpha, process.gamma, process.sigma))
        output = {
            "epsilon": Z,
            "v_prediction": alpha * Z - sigma * X0,
            "sample": X0,
            "residual": Y - X0,
            "score": -Z / sigma,
        }.get(prediction)
        if output is None:
            continue
        a, b, c = call.x0
        got = a * (alpha * X0 + gamma * Y + sigma * Z) + b * output + c * Y
        np.testing.assert_allclose(got, X0, rtol=1e-9, atol=1e-9)


def test_resnoise_is_what_resfusion_trains_on():
    process = Resfusion(20)
    s = process.decay(np.arange(9))
    table = plan("ddim", 8, process)
    assert table.prediction == "resnoise"
    for call in table.calls:
        i = int(call.t)
        own, sigma = (
            (s[i] / s[i - 1]) ** 2,
            math.sqrt(1 - s[i] ** 2),
        )  # alpha_t and sqrt(1 - the product of alphas)
        residual = Y - X0
        x = s[i] * X0 + (1 - s[i]) * residual + sigma * Z
        output = Z + (1 - math.sqrt(own)) * sigma / (1 - own) * residual
        a, b, c = call.x0
        np.testing.assert_allclose(a * x + b * output + c * Y, X0, rtol=1e-12, atol=1e-12)


# published step formulas, in the published x_t, against the traced table


def moves(sampler, process, times):
    """For each step: (t, s, function of (x_t, x0, y, noise) giving x_s), from the table."""
    table = Plan.trace(sampler, process, times)

    def move(k):
        def of(x, x0, y, z):
            t, s = times[k], times[k + 1]
            terms = {"x": x - process.gamma(t) * y, "d": x0, "n": z}
            assert all(i == k for kind, i, _ in table.calls[k].next if kind in "xd")
            return sum(c * terms[kind] for kind, _, c in table.calls[k].next) + process.gamma(s) * y

        return of

    return [(times[k], times[k + 1], move(k)) for k in range(len(times) - 1)]


def same(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_resshift_steps_are_the_published_posterior():
    process = ResidualShift()
    for t, s, move in moves(reverse_chain, process, np.arange(4.0, -1, -1)):
        eta_t, eta_s = process.gamma(t), process.gamma(s)
        own = eta_t - eta_s
        z = Z if s > 0 else 0 * Z
        expected = eta_s / eta_t * X + own / eta_t * X0 + np.sqrt(4 * eta_s / eta_t * own) * z
        same(move(X, X0, Y, Z), expected)


def test_rddm_steps_take_off_residual_and_noise():
    process = ResidualDenoising(1000, 0.01)
    for t, s, move in moves(ddim, process, np.arange(1000.0, -1, -200)):
        a_t, a_s, b_t, b_s = process.gamma(t), process.gamma(s), process.sigma(t), process.sigma(s)
        residual = Y - X0
        eps = (X - X0 - a_t * residual) / b_t
        same(move(X, X0, Y, None), X - (a_t - a_s) * residual - (b_t - b_s) * eps)


@pytest.mark.parametrize("steps", [12, 20])
def test_resfusion_steps_are_ddpm_on_resnoise(steps):
    process = Resfusion(steps)
    levels = np.arange(process.t_max, -1, -1)
    for t, s, move in moves(reverse_chain, process, levels):
        root_t, root_s = process.decay(t), process.decay(s)
        own = (root_t / root_s) ** 2
        beta, sigma = 1 - own, np.sqrt(1 - root_t**2)
        residual = Y - X0
        eps = (X - root_t * X0 - (1 - root_t) * residual) / sigma
        resnoise = eps + (1 - np.sqrt(own)) * sigma / beta * residual
        spread = np.sqrt((1 - root_s**2) / (1 - root_t**2) * beta)
        same(move(X, X0, Y, Z), (X - beta / sigma * resnoise) / np.sqrt(own) + spread * Z)


def test_ir_sde_steps_have_the_published_optimal_mean():
    process = MeanReverting()
    for t, s, move in moves(reverse_chain, process, np.arange(100.0, -1, -1)):
        b, c = process.alpha(t), process.alpha(s)
        a = b / c
        k_x, k_0 = a * (1 - c**2) / (1 - b**2), c * (1 - a**2) / (1 - b**2)
        same(move(X, X0, Y, 0 * Z), k_x * (X - Y) + k_0 * (X0 - Y) + Y)


def test_mr_sampler_is_the_generic_solver_with_the_mean_taken_off():
    """MR-Sampler's own formulas, in x: first-order SDE, and second-order multistep ODE with D1 by the midpoint."""
    process, times = MeanReverting(), np.array([100.0, 80, 60, 40, 20])
    alpha, sigma, level = process.alpha(times), process.sigma(times), lam(process, times)
    h = np.diff(level)
    for k, (_, _, move) in enumerate(moves(partial(ddim, eta=1.0), process, times)):
        a, a_n, s, s_n, decay = alpha[k], alpha[k + 1], sigma[k], sigma[k + 1], np.exp(-2 * h[k])
        to_y = 1 - a_n / a * decay - a_n * (1 - decay)
        expected = (
            s_n / s * np.exp(-h[k]) * X + a_n * (1 - decay) * X0 + to_y * Y + s_n * np.sqrt(1 - decay) * Z
        )
        same(move(X, X0, Y, Z), expected)
    table, q = plan("dpmpp_2m", 4, process, times), RNG.standard_normal((4, 2, 3))
    given, orders = iter(q), [1, 2, 2, 1]  # a short run's last step is first order
    x, u = X, X - process.gamma(100.0) * Y
    for k, step in enumerate(table.run(lambda x, t: next(given), u, None, [Y])):
        phi_1 = np.expm1(-h[k])
        d1 = (q[k] - q[k - 1]) * h[k] / h[k - 1] if orders[k] == 2 else 0.0
        ratio = sigma[k + 1] / sigma[k]
        to_y = 1 - ratio + ratio * alpha[k] - alpha[k + 1]
        x = ratio * x - alpha[k + 1] * (phi_1 * q[k] + phi_1 / 2 * d1) + Y * to_y
        same(step.x + process.gamma(times[k + 1]) * Y, x)


def test_mr_samplers_second_order_sde_is_the_generic_one_too():
    """x' = s'/s e^-h x + a' (1 - e^-2h) q0 + a' (1 - (1 - e^-2h)/(2h)) D1 + noise + y (...), D1 = (q0 - q1)/r."""
    process, times = MeanReverting(), np.array([100.0, 80, 60, 40, 20])
    alpha, sigma = process.alpha(times), process.sigma(times)
    h, q, z = np.diff(lam(process, times)), RNG.standard_normal((4, 2, 3)), RNG.standard_normal((4, 2, 3))
    given, noises = iter(q), iter(z)
    sampler = partial(SAMPLERS["dpmpp_2m_sde"], solver_type="heun", lower_order_final=False)
    x, u = X, X - process.gamma(100.0) * Y
    table = Plan.trace(sampler, process, times)
    for k, step in enumerate(table.run(lambda x, t: next(given), u, lambda: next(noises), [Y])):
        a, a_n, s, s_n = alpha[k], alpha[k + 1], sigma[k], sigma[k + 1]
        gone = 1 - np.exp(-2 * h[k])
        d1 = (q[k] - q[k - 1]) * h[k] / h[k - 1] if k else 0.0
        mean = s_n / s * np.exp(-h[k]) * x + a_n * gone * q[k] + a_n * (1 - gone / (2 * h[k])) * d1
        x = mean + Y * (1 - a_n / a * (1 - gone) - a_n * gone) + s_n * np.sqrt(gone) * z[k]
        same(step.x + process.gamma(times[k + 1]) * Y, x)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_bridge_steps_are_the_published_ode_and_sde(eta):
    process = SchroedingerBridge()
    times = np.array([0.9999, 0.8, 0.5, 0.2, 0.01])
    for t, s, move in moves(partial(ddim, eta=eta), process, times):
        v = [0.01 * r + (50 - 0.01) * r**2 / 2 for r in (t, s, 1.0)]
        s_t, s_s = np.sqrt(v[:2])
        bar_t, bar_s = (np.sqrt((1 - r) * (0.01 + (50 - 0.01) * (1 + r) / 2)) for r in (t, s))  # v(1) - v(r)
        if eta == 0:
            expected = (
                s_s * bar_s / (s_t * bar_t) * X
                + ((bar_s**2 - bar_t * s_s * bar_s / s_t) * X0 + (s_s**2 - s_t * s_s * bar_s / bar_t) * Y)
                / v[2]
            )
        else:
            expected = v[1] / v[0] * X + (1 - v[1] / v[0]) * X0 + s_s * np.sqrt(1 - v[1] / v[0]) * Z
        same(move(X, X0, Y, Z), expected)


# stochastic samplers keep the marginals


@pytest.mark.parametrize("sampler", [reverse_chain, langevin_corrected], ids=["chain", "corrected"])
@EVERY
def test_stochastic_samplers_end_with_the_spread_of_the_data(process, sampler):
    rng, n = np.random.default_rng(3), 20_000
    denoise, y = GAUSSIAN.denoiser(process), np.full(n, 0.7)
    noisiest = max(float(lam(process, process.t_max)), -5.0)
    times = process.t_of_lam(np.append(np.linspace(noisiest, 5, 250), np.inf))  # finer than any trained chain
    table = Plan.trace(sampler, process, times)
    start = rng.standard_normal(n) * np.hypot(process.alpha(times[0]) * 0.6, process.sigma(times[0]))
    start += process.alpha(times[0]) * 0.3
    *_, last = table.run(
        lambda x, t: denoise(x - process.gamma(t) * y, t), start, lambda: rng.standard_normal(n), [y]
    )
    assert last.x.mean() == pytest.approx(0.3, abs=0.02)
    assert last.x.std() == pytest.approx(0.6, rel=0.04)


def test_a_prior_with_its_own_variance_scales_the_noise():
    """PriorGrad: data N(y, spread^2) per element, noise scaled alike: the whole run is one of unit data, scaled."""
    process, spread = DataPrior(VP), np.array([0.3, 1.7])
    y, z = np.array([2.0, -1.0]), np.array([0.4, -0.8])
    ideal = lambda x, t: y + x * VP.alpha(t) / (VP.alpha(t) ** 2 + VP.sigma(t) ** 2)  # noqa: E731
    table = plan("dpmpp_2m", 10, process)
    *_, last = table.run(ideal, table.start(spread * z, [y]), None, [y])
    plain = Plan.trace(SAMPLERS["dpmpp_2m"], VP, [c.t for c in table.calls] + [0.0])
    *_, whitened = plain.run(lambda x, t: x * VP.alpha(t), VP.sigma(VP.t_max) * z)
    np.testing.assert_allclose(last.x, y + spread * whitened.x, rtol=1e-9)


# files


@EVERY
def test_json_round_trip(process):
    data = json.loads(json.dumps(process.to_json()))
    again, t = process_from_json(data), np.linspace(0, process.t_max, 33)
    assert again.to_json() == process.to_json()
    for name in ("alpha", "gamma", "sigma", "timestep", "input_scale", "decay"):
        np.testing.assert_array_equal(getattr(again, name)(t), getattr(process, name)(t))


@EVERY
def test_plans_of_conditional_processes_survive_json(process):
    table = plan("dpmpp_2m", 4, process)
    assert table.givens == 1
    assert Plan.from_json(json.dumps(table.to_json())) == table


def test_a_missing_observation_is_an_error_before_the_first_call():
    table = plan("ddim", 4, ResidualShift())
    with pytest.raises(PlanError, match="0 given arrays"):
        table.start(Z)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("residual_shift", {"levels": 1}),
        ("residual_shift", {"levels": 4.0}),
        ("residual_shift", {"kappa": 0.0}),
        ("residual_shift", {"kappa": float("nan")}),
        ("residual_shift", {"min_noise": 5.0}),
        ("residual_shift", {"power": "0.3"}),
        ("residual_denoising", {"levels": 10**9}),
        ("residual_denoising", {"sum_scale": -1.0}),
        ("resfusion", {"steps": True}),
        ("mean_reverting", {"end": 1.0}),
        ("mean_reverting", {"spread": float("inf")}),
        ("ouve", {"sigma_min": 0.6}),
        ("ouve", {"extra": 1.0}),
        ("schroedinger_bridge", {"start": 1.0}),
        ("data_prior", {"base": 3}),
        ("data_prior", {"base": {"kind": "ouve", "stiffness": 1.5, "sigma_min": 0.05, "sigma_max": 0.5}}),
        ("data_prior", {"base": {"kind": "brownian"}}),
    ],
)
def test_damaged_processes_are_refused(kind, change):
    good = {p.kind: p for p in PROCESSES}[kind].to_json()
    assert process_from_json(good).to_json() == good
    with pytest.raises(BadInput):
        process_from_json({**good, **change})


def test_a_missing_field_is_refused():
    assert set(CONDITIONAL) == {process.kind for process in PROCESSES}
    for process in PROCESSES:
        for name in set(process.to_json()) - {"kind"}:
            with pytest.raises(BadInput):
                process_from_json({k: v for k, v in process.to_json().items() if k != name})


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "edm", "sigma_max": "80"},
        {"kind": "edm", "sigma_max": -1.0},
        {"kind": "rectified_flow", "timestep_scale": float("nan")},
        {"kind": "rectified_flow", "timestep_scale": True},
        {
            "kind": "discrete_vp",
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "levels": "9",
        },
        {"kind": ["edm"]},
        [],
        None,
    ],
)
def test_damaged_ordinary_processes_are_refused(data):
    with pytest.raises(BadInput):
        process_from_json(data)

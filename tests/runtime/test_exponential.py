"""Exponential integrators: the integrals against quadrature, the solvers against exact flows and each other."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.integrate import quad

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, Plan, RectifiedFlow, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.linear import Linear
from fewstep.runtime.process import lam
from fewstep.runtime.samplers import exponential
from fewstep.runtime.samplers.exponential import Integrator, J, blocks
from fewstep.runtime.samplers.usf import Decision

from .exact import GAUSSIAN, SD15, even_in_lam, order

EDGES = {"edm": (EDM(), 0.05, 20.0), "flow": (RectifiedFlow(), 0.05, 0.95), "vp": (SD15, 60.0, 990.0)}
ZERO_SNR = DiscreteVP.from_betas(np.append(np.linspace(1e-4, 0.02, 999), 1.0))
FAMILY = [name for name in SAMPLERS if name.startswith(("dpm", "unipc", "deis", "dc_", "dualfast", "usf"))]


def sampler(name, **options):
    return partial(SAMPLERS[name], **options)


def graded(process, low, high):
    """Times whose first steps double from a tiny one, so that the low orders of a start do not show; then even."""
    start, end = lam(process, np.array([high, low]))

    def times(steps):
        h = np.minimum(1, 2.0 ** np.arange(steps) * 4 / steps)
        return process.t_of_lam(start + (end - start) * np.append(0, np.cumsum(h)) / h.sum())

    return times


def run(sampler, process, times, denoise, x, noise=None):
    return list(plan(sampler, len(times) - 1, process, times, prediction="sample").run(denoise, x, noise))


# The engine


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.3, 0.999, 1.001, 2.5, 9.0])
def test_the_integrals_match_quadrature(h, sign):
    h *= sign
    for k, found in enumerate(J(h, 5)):
        exact = quad(lambda v, k=k: math.exp(h * (v - 1)) * v**k, 0, 1, epsabs=0, epsrel=1e-13)[0]
        assert found == pytest.approx(exact * h ** (k + 1) / math.factorial(k), rel=1e-12)


def test_a_step_of_infinite_length_keeps_the_first_integral_alone():
    assert J(math.inf, 3) == [1, math.inf, math.inf]
    assert J(50.0, 1)[0] == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("lam_t", [1.3, 0.2, -0.9])
@pytest.mark.parametrize("nodes", [[0.1], [0.1, -0.4], [0.1, -0.4, -1.7], [0.1, 0.15, -0.4, 1.2]])
def test_the_weights_integrate_every_polynomial_their_points_determine(nodes, lam_t):
    w = exponential.taylor(lam_t, nodes)
    for k in range(len(nodes)):
        exact = quad(lambda v, k=k: math.exp(v - lam_t) * v**k, nodes[0], lam_t, epsabs=1e-15)[0]
        assert w @ np.array(nodes) ** k == pytest.approx(exact, rel=1e-10, abs=1e-13)


def test_the_noise_integral_is_the_data_integral_of_negated_lam():
    lam_t, nodes = 0.9, np.array([0.1, -0.4, -1.0])
    w = -exponential.taylor(-lam_t, list(-nodes))
    exact = quad(lambda v: math.exp(lam_t - v) * (2 - v + 3 * v**2), nodes[0], lam_t)[0]
    assert w @ (2 - nodes + 3 * nodes**2) == pytest.approx(exact, rel=1e-12)


def test_t_ab_in_edm_is_rho_ab_for_its_time_is_rho():
    x = np.array([0.3, -2.0])
    times = np.geomspace(20, 0.1, 12)
    ends = [run(name, EDM(), times, GAUSSIAN.denoiser(EDM()), x)[-1].x for name in ("deis", "deis_tab")]
    np.testing.assert_allclose(*ends, rtol=1e-11)


def test_rho_ab_is_exact_for_noise_that_is_a_cubic_in_rho():
    """In EDM dx/dsigma = eps; with eps = 1 + rho^3 the end is known. Four points know a cubic, at the fourth step."""
    times = np.array([5.0, 4.2, 3.9, 3.0, 2.1, 1.0])
    denoise = lambda x, t: x - float(t) * (1 + float(t) ** 3)  # noqa: E731
    steps = run(sampler("deis", lower_order_final=False), EDM(), times, denoise, np.array([7.0]))
    gain = steps[4].x - steps[2].x
    assert gain[0] == pytest.approx((1 - 3.0) + (1 - 3.0**4) / 4, rel=1e-12)


# Orders of accuracy

ORDERS = [
    ("dpmpp_2s", {}, 2),
    ("dpmpp_2s", {"solver_type": "heun"}, 2),
    ("dpmpp_3s", {"solver_type": "heun"}, 3),
    ("dpm_solver_2s", {}, 2),
    ("dpm_solver_2m", {}, 2),
    ("dpm_solver_3m", {}, 3),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m", {"solver_type": "heun"}, 2),
    ("dpmpp_3m", {}, 2),
    ("dpmpp_3m_exact", {}, 3),
    ("dpmpp_3m_sde", {"eta": 0.0, "solver_type": "exact"}, 3),
    ("unipc", {"lower_order_final": False}, 3),
    ("unipc", {"lower_order_final": False, "variant": "bh1"}, 3),
    ("unipc", {"lower_order_final": False, "noise_prediction": True}, 3),
    ("unipc", {"lower_order_final": False, "corrector": False}, 2),
    ("unipc", {"lower_order_final": False, "order": 1}, 2),
    ("unipc", {"lower_order_final": False, "order": 3}, 4),
    ("deis", {"order": 1}, 2),
    ("deis", {"order": 2}, 3),
    ("deis", {"order": 3}, 4),
    ("deis_tab", {"order": 2}, 3),
    ("usf", {"decisions": [Decision(3)]}, 3),
    ("usf", {"decisions": [Decision(4, noise_prediction=True)]}, 4),
    ("usf", {"decisions": [Decision(2, corrector=3)]}, 3),
    ("usf", {"decisions": [Decision(2, back=1)]}, 2),
    ("usf", {"decisions": [Decision(3, back=2, corrector=3)]}, 3),
    ("usf", {"decisions": [Decision(3, low_order=True)]}, 2),
    ("dpm_solver_v3", {"lower_order_final": False, "order": 1}, 1),
    ("dpm_solver_v3", {"lower_order_final": False, "order": 2}, 2),
    ("dpm_solver_v3", {"lower_order_final": False, "order": 3, "corrector": False}, 3),
    ("dpm_solver_v3", {"lower_order_final": False, "order": 1, "pseudo_corrector": True}, 2),
]


@pytest.mark.parametrize("where", EDGES)
@pytest.mark.parametrize(("name", "options", "expected"), ORDERS)
def test_order_of_accuracy(name, options, expected, where):
    found = order(sampler(name, **options), EDGES[where][0], graded(*EDGES[where]), (161, 323))
    assert found == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("where", EDGES)
@pytest.mark.parametrize("name", ["dpmpp_3s", "dpm_solver_3s"])
@pytest.mark.parametrize("solver_type", ["published", "midpoint"])
def test_published_singlestep_of_third_order_needs_a_grid_even_in_lam(name, solver_type, where):
    found = order(
        sampler(name, solver_type=solver_type), EDGES[where][0], even_in_lam(*EDGES[where]), (161, 323)
    )
    assert found == pytest.approx(3, abs=0.15)


def test_unipc_of_order_3_ends_with_lower_orders_and_so_with_second():
    """lower_order_final, which is the published default, bounds the order on any grid."""
    assert order("unipc_3", EDM(), graded(EDM(), 0.05, 20.0), (323, 647)) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", ["dpmpp_2s", "unipc", "dpm_solver_v3"])
def test_the_order_survives_a_start_from_pure_noise(name):
    """alpha is 0 and lam -inf at the start, where a first-order step of infinite length is the only one there is."""

    def times(steps):
        return np.linspace(1, 0.05, steps + 1)

    found = order(name, RectifiedFlow(), times, (160, 320))
    assert found == pytest.approx(2, abs=0.15)


# Ends


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 16])
def test_steps_from_pure_noise_and_onto_clean_data_are_exact(name, steps):
    """One prediction for all: after the first step the state is alpha x0 plus noise, and at the end it is x0."""
    point, x = np.array([0.3, -1.2]), np.array([0.7, 0.1])
    grids = [
        (RectifiedFlow(), np.linspace(1, 0, steps + 1)),
        (ZERO_SNR, np.linspace(1000, 0, steps + 1)),
        (EDM(), np.append(np.geomspace(80, 0.1, steps), 0)),
        (SD15, np.linspace(1000, 0, steps + 1)),
    ]
    for process, times in grids:
        *_, last = run(name, process, times, lambda x, t: point, x, lambda: np.array([0.4, 0.9]))
        np.testing.assert_allclose(last.x, point, rtol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_the_state_is_the_last_prediction_at_the_end(name):
    times = np.linspace(1, 0, 8)
    denoise = lambda x, t: np.tanh(x + t)  # noqa: E731
    last = run(name, RectifiedFlow(), times, denoise, np.ones(3), lambda: np.ones(3))[-1]
    if name not in ("dualfast", "dc_solver"):  # which move every prediction, the last one too
        np.testing.assert_allclose(last.x, last.x0, rtol=1e-12)
    assert np.isfinite(last.x).all()


@pytest.mark.parametrize("process", [RectifiedFlow(), ZERO_SNR], ids=["flow", "zero_snr"])
@pytest.mark.parametrize("name", FAMILY)
def test_pure_noise_is_the_limit_of_nearly_pure_noise(name, process):
    """One step from alpha = 0 is the limit of one from a little later, for every solver."""
    denoise = lambda x, t: np.tanh(x) + 0.1  # noqa: E731
    ends = [
        run(name, process, [t, 0.5 * process.t_max], denoise, np.ones(2), lambda: np.full(2, 0.3))[-1].x
        for t in (process.t_max, process.t_max * (1 - 1e-7))
    ]
    if not name.startswith("dpm_solver_2m_sde"):  # its noise prediction knows no such limit
        np.testing.assert_allclose(*ends, rtol=2e-3)
    assert np.isfinite(ends[0]).all()


@pytest.mark.parametrize("name", FAMILY)
def test_two_times_of_no_signal_are_as_good_as_one(name):
    """A grid that lingers where alpha is lost beside sigma: first-order steps, finite, and the same end."""
    times = np.linspace(0.999, 0, 5)
    denoise = lambda x, t: np.tanh(x + t)  # noqa: E731
    ends = [
        run(name, RectifiedFlow(), [*start, *times], denoise, np.ones(3), lambda: np.ones(3))[-1].x
        for start in ([1.0, 1 - 1e-9, 1 - 2e-9], [1.0])
    ]
    assert np.isfinite(ends).all()
    if name in ("dpmpp_2m", "dpm_solver_2m", "deis", "unipc"):
        np.testing.assert_allclose(*ends, rtol=1e-6)


# Fresh noise


def spread_at_the_end(name, process, times, **options):
    """Standard deviation, exactly: on Gaussian data the ideal denoiser is linear, so the state stays symbolic."""
    s2 = GAUSSIAN.spreads[0] ** 2
    drawn = 0

    def denoise(x, t):
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        return x * (alpha * s2 / (alpha**2 * s2 + sigma**2))

    def noise():
        nonlocal drawn
        drawn += 1
        return Linear.atom("n", drawn)

    *_, last = SAMPLERS[name](denoise, process, Linear.atom("x", 0), times, noise, **options)
    start = float(process.alpha(times[0])) ** 2 * s2 + float(process.sigma(times[0])) ** 2
    found = math.sqrt(sum(c * c * (start if kind == "x" else 1) for kind, _, c in last.x.terms))
    exact = math.sqrt(float(process.alpha(times[-1])) ** 2 * s2 + float(process.sigma(times[-1])) ** 2)
    return found / exact, drawn


@pytest.mark.parametrize("where", EDGES)
@pytest.mark.parametrize("name", ["dpm_solver_2m_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_keeps_the_marginal_variance(name, eta, where):
    process, low, high = EDGES[where]
    found, drawn = spread_at_the_end(name, process, even_in_lam(process, low, high)(80), eta=eta)
    assert drawn == 80
    assert found == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["dpm_solver_2m_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_the_variance_converges_in_second_order(name):
    """Weakly, for the variance of Gaussian data."""
    errors = [
        abs(spread_at_the_end(name, EDM(), graded(EDM(), 0.05, 20.0)(steps))[0] - 1) for steps in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("stochastic", "deterministic", "options"),
    [
        ("dpm_solver_2m_sde", "dpm_solver_2m", {}),
        ("dpmpp_2m_sde", "dpmpp_2m", {}),
        ("dpmpp_3m_sde", "dpmpp_3m_exact", {"solver_type": "exact", "lower_order_final": True}),
    ],
)
def test_without_fresh_noise_the_stochastic_solvers_are_their_deterministic_ones(
    stochastic, deterministic, options
):
    for process in (SD15, RectifiedFlow()):
        ends = [
            plan(s, 9, process).calls
            for s in (sampler(stochastic, eta=0.0, **options), sampler(deterministic))
        ]
        for one, other in zip(*ends, strict=True):
            assert one.next == other.next


def test_dpmpp_3m_sde_is_k_diffusion_s_formula():
    """x' = (s'/s) e^(-eta h) x + (1 - e^-he) m + phi_2 D_1 - (phi_2/he - 1/2) D_2 + noise, he = (1 + eta) h."""
    sigmas, eta, x0s = np.array([9.0, 5.0, 2.0, 0.7]), 0.7, [0.3, -1.1, 0.8]
    predictions, z = iter(x0s), np.array([0.5])
    denoise = lambda x, t: np.array([next(predictions)])  # noqa: E731
    steps = run(sampler("dpmpp_3m_sde", eta=eta), EDM(), sigmas, denoise, np.array([2.0]), lambda: z)
    h, h1, h2 = np.log(sigmas[[2, 1, 0]] / sigmas[[3, 2, 1]])
    he = (1 + eta) * h
    r0, r1 = h1 / h, h2 / h
    d0, d1 = (x0s[2] - x0s[1]) / r0, (x0s[1] - x0s[0]) / r1
    D1, D2 = d0 + (d0 - d1) * r0 / (r0 + r1), (d0 - d1) / (r0 + r1)
    phi2 = np.expm1(-he) / he + 1
    expected = sigmas[3] / sigmas[2] * np.exp(-eta * h) * steps[1].x - np.expm1(-he) * x0s[2]
    expected += phi2 * D1 - (phi2 / he - 0.5) * D2 + sigmas[3] * np.sqrt(-np.expm1(-2 * eta * h)) * z
    assert steps[2].x == pytest.approx(expected, rel=1e-12)


# One engine


def same_table(one, other, process=SD15, steps=12, times="auto"):
    for a, b in zip(
        plan(one, steps, process, times).calls, plan(other, steps, process, times).calls, strict=True
    ):
        assert [term[:2] for term in a.next] == [term[:2] for term in b.next]
        np.testing.assert_allclose([c for *_, c in a.next], [c for *_, c in b.next], rtol=1e-9, atol=1e-13)


def test_unipc_without_corrector_is_dpmpp_2m():
    same_table(sampler("unipc", corrector=False), "dpmpp_2m")


def test_diffusers_deis_is_dpm_solver_in_taylor_form():
    same_table(sampler("deis", order=1, variable="log_rho"), sampler("dpm_solver_2m", solver_type="heun"))


@pytest.mark.parametrize(
    ("calls", "order", "expected"),
    [
        (9, 3, [3, 3, 2, 1]),
        (10, 3, [3, 3, 3, 1]),
        (11, 3, [3, 3, 3, 2]),
        (2, 3, [2]),
        (1, 3, [1]),
        (6, 2, [2, 2, 2]),
        (7, 2, [2, 2, 2, 1]),
    ],
)
def test_blocks_are_those_of_dpm_solver_fast(calls, order, expected):
    assert blocks(Integrator.of(EDM(), np.linspace(50, 1, calls + 1)), order) == expected


def test_blocks_keep_infinite_steps_to_themselves():
    assert blocks(Integrator.of(RectifiedFlow(), np.linspace(1, 0, 9)), 3) == [1, 3, 3, 1]
    assert blocks(Integrator.of(RectifiedFlow(), np.linspace(1, 0, 7)), 3) == [1, 3, 1, 1]
    assert blocks(Integrator.of(RectifiedFlow(), np.linspace(1, 0, 8)), 2) == [1, 2, 2, 1, 1]
    assert blocks(Integrator.of(EDM(), np.linspace(50, 0, 7)), 2) == [2, 2, 1, 1]


def test_a_singlestep_solver_makes_as_many_calls_as_it_is_given_steps():
    for name in ("dpmpp_2s", "dpmpp_3s", "dpm_solver_2s", "dpm_solver_3s"):
        for steps in range(1, 12):
            assert len(plan(name, steps, SD15, np.linspace(1000, 0, steps + 1)).calls) == steps


def test_an_inversion_follows_the_flow_upwards_as_accurately():
    """The same solvers on rising times, from data to noise and in second order."""
    denoise, x = GAUSSIAN.denoiser(EDM()), np.array([0.4, 1.0])
    for name in ("dpmpp_2m", "dpm_solver_2m", "unipc", "dpmpp_2s", "dpm_solver_v3"):
        errors = []
        for steps in (80, 160):
            times = np.geomspace(0.05, 20, steps + 1)
            *_, last = Plan.trace(SAMPLERS[name], EDM(), times, prediction="sample").run(denoise, x)
            errors.append(np.abs(last.x - GAUSSIAN.flow(EDM(), x, 0.05, 20.0)).max())
        assert math.log2(errors[0] / errors[1]) > 1.85, name


def test_usf_makes_the_known_solvers_of_their_decisions():
    final = {"lower_order_final": False}
    same_table(sampler("usf", decisions=[Decision(1)]), "ddim")
    same_table(sampler("usf", decisions=[Decision(2)]), sampler("dpmpp_2m", solver_type="heun", **final))
    same_table(sampler("usf", decisions=[Decision(3)]), sampler("dpmpp_3m_exact", **final))
    noise = [Decision(3, noise_prediction=True)]
    same_table(sampler("usf", decisions=noise), sampler("dpm_solver_3m", **final))
    v3 = sampler("dpm_solver_v3", order=3, pseudo=True, corrector=False, **final)
    same_table(sampler("usf", decisions=[Decision(3, low_order=True)]), v3)
    v3 = sampler("dpm_solver_v3", order=3, **final)
    same_table(
        sampler("usf", decisions=[Decision(1), Decision(2, corrector=2), Decision(3, corrector=3)]), v3
    )


def test_usf_decides_each_step_anew():
    decisions = [
        Decision(1),
        Decision(2, noise_prediction=True),
        Decision(2, back=1, corrector=2),
        Decision(1),
    ]
    table = plan(sampler("usf", decisions=decisions), 6, SD15, np.linspace(1000, 0, 7))
    reads = [{(kind, i) for kind, i, _ in call.next} for call in table.calls]
    assert reads[0] == {("x", 0), ("d", 0)}
    assert reads[1] == {("x", 1), ("d", 1), ("x", 0), ("d", 0)}
    assert reads[2] == {("x", 1), ("d", 2), ("d", 1)}
    assert reads[4] == {("x", 4), ("d", 4)}


# Edges


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpmpp_2m", {"solver_type": "midpont"}, "did you mean midpoint"),
        ("dpmpp_3m", {"solver_type": "heun"}, "published"),
        ("dpm_solver_3s", {"solver_type": "taylor"}, "heun"),
        ("unipc", {"order": 4}, "order 4"),
        ("unipc", {"variant": "bh3"}, "bh2"),
        ("unipc", {"ratios": (1.0, 1.0)}, "2 ratios"),
        ("unipc", {"ratios": (1.0, 0.9, 1.0, 1.0)}, "first two steps"),
        ("deis", {"order": 4}, "order 4"),
        ("deis", {"variable": "lam"}, "log_rho"),
        ("dpm_solver_v3", {"order": 0}, "order 0"),
        ("dualfast", {"base": "heun"}, "dpmpp_2m"),
        ("dpmpp_2m_sde", {"eta": -0.1}, "0 or more"),
        ("usf", {"decisions": []}, "at least one"),
    ],
)
def test_options_that_do_not_exist_are_refused(name, options, message):
    with pytest.raises(PlanError, match=message):
        plan(sampler(name, **options), 4, SD15, np.linspace(1000, 0, 5))


@pytest.mark.parametrize(
    "bad", [{"order": 0}, {"order": 5}, {"order": 2, "back": 2}, {"corrector": 1}, {"corrector": 4}]
)
def test_decisions_that_cannot_be_followed_are_refused(bad):
    with pytest.raises(PlanError, match="order 1 to 4"):
        Decision(**bad)


def test_an_inversion_from_clean_data_itself_is_refused():
    """Where there is no noise the network has nothing to say about it."""
    for name in FAMILY:
        with pytest.raises(PlanError, match="sigma 0|inversion"):
            Plan.trace(SAMPLERS[name], EDM(), [0.0, 1.0, 2.0])


def test_an_inversion_with_fresh_noise_is_refused():
    with pytest.raises(PlanError, match="inversion"):
        Plan.trace(SAMPLERS["dpmpp_2m_sde"], EDM(), [1.0, 2.0])


def test_fewer_steps_than_the_order_run_with_what_there_is():
    for name in FAMILY:
        for steps in (1, 2):
            table = plan(name, steps, SD15, np.linspace(1000, 0, steps + 1))
            assert Plan.from_json(table.to_json()) == table


def test_fewer_than_15_steps_end_with_lower_orders():
    """diffusers' lower_order_final: away from sigma 0 the last step is first order, the one before second."""
    for steps, ends in ((14, [4, 3, 2]), (15, [4, 4, 4])):
        calls = plan("dpmpp_3m", steps, SD15, np.linspace(1000, 100, steps + 1)).calls
        assert [len(call.next) for call in calls[-3:]] == ends

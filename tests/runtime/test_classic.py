"""Deterministic samplers outside the exponential-integrator family: order of accuracy and what reduces to what."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, RectifiedFlow, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.process import lam
from fewstep.runtime.samplers.adams import ipndm, lms
from fewstep.runtime.samplers.er_sde import GROWTH, _integrals, er_sde
from fewstep.runtime.samplers.momentum import GHVB, ghvb, hb
from fewstep.runtime.samplers.sa_solver import _moments, sa_solver

from .exact import MIXTURE, SD15, even_in_lam, order

ZERO_SNR = DiscreteVP.from_betas(np.append(np.linspace(1e-4, 0.02, 999), 1.0))
RANGES = [(EDM(), 0.05, 20.0), (RectifiedFlow(), 0.05, 0.95), (SD15, 20.0, 980.0)]
DISTILLED = {"lcm", "tcd", "consistency"}


def graded(process, low, high):
    """Even in log-SNR but for small steps at both ends, where multistep methods lack points and are of low order."""
    first, last = lam(process, np.array([high, low]))
    ramp = lambda steps: np.linspace(0, 1, steps + 1)  # noqa: E731
    return lambda steps: process.t_of_lam(first + (last - first) * ramp(steps) ** 2 * (3 - 2 * ramp(steps)))


def even_in_sigma(low, high):
    return lambda steps: np.linspace(high, low, steps + 1)


@pytest.mark.parametrize(("process", "low", "high"), RANGES, ids=["edm", "flow", "vp"])
@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SAMPLERS["euler"], 1),
        (SAMPLERS["heun"], 2),
        (SAMPLERS["kdpm2"], 2),
        (SAMPLERS["bdia"], 2),
        (SAMPLERS["hb"], 1),
        (partial(hb, beta=1.0), 2),
    ],
    ids=["euler", "heun", "kdpm2", "bdia", "hb", "hb without momentum"],
)
def test_order_of_accuracy(sampler, expected, process, low, high):
    assert order(sampler, process, even_in_lam(process, low, high)) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("process", "low", "high"), RANGES, ids=["edm", "flow", "vp"])
@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (partial(lms, order=2), 2),
        (partial(lms, order=3), 3),
        (partial(lms, order=4), 4),
        (partial(er_sde, phi="ode", order=1), 1),
        (partial(er_sde, phi="ode", order=2), 2),
        (partial(er_sde, phi="ode", order=3), 3),
        (partial(er_sde, phi="ode", order=3, corrected=False), 2),
        (partial(sa_solver, tau=0.0, predictor=1, corrector=0), 1),
        (partial(sa_solver, tau=0.0, predictor=2, corrector=0), 2),
        (partial(sa_solver, tau=0.0, predictor=3, corrector=0), 3),
        (partial(sa_solver, tau=0.0, predictor=1, corrector=2), 2),
        (partial(sa_solver, tau=0.0, predictor=2, corrector=3), 3),
        (partial(sa_solver, tau=0.0, predictor=3, corrector=4), 4),
    ],
    ids=lambda value: (
        "-".join(f"{k}{v}" for k, v in value.keywords.items()) if callable(value) else str(value)
    ),
)
def test_order_of_multistep_methods_on_a_graded_grid(sampler, expected, process, low, high):
    measured = order(sampler, process, graded(process, low, high), (320, 640))
    assert measured == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SAMPLERS["s_pndm"], 2),
        (partial(ipndm, order=3), 3),
        (SAMPLERS["ipndm"], 4),
        (SAMPLERS["plms"], 4),
        (SAMPLERS["pndm"], 4),
        (partial(ghvb, order=1.8), 2),
        (partial(ghvb, order=3.0), 3),
        (partial(ghvb, order=3.8), 4),
    ],
    ids=["s_pndm", "ipndm 3", "ipndm", "plms", "pndm", "ghvb 1.8", "ghvb 3", "ghvb 3.8"],
)
def test_fixed_weights_have_their_order_on_grids_even_in_sigma_and_2_on_others(sampler, expected):
    even, other = even_in_sigma(0.2, 10.0), graded(EDM(), 0.05, 20.0)
    assert order(sampler, EDM(), even, (320, 640)) == pytest.approx(expected, abs=0.15)
    assert order(sampler, EDM(), other, (320, 640)) == pytest.approx(2, abs=0.1)


def test_pseudo_runge_kutta_starts_a_fourth_order_method_that_a_first_order_step_cannot():
    """Rectified flow on its own even grid, where the error of the first step counts."""
    times_of = even_in_sigma(0.0, 1.0)
    assert order(SAMPLERS["pndm"], RectifiedFlow(), times_of) == pytest.approx(4, abs=0.15)
    assert order(SAMPLERS["plms"], RectifiedFlow(), times_of) == pytest.approx(3, abs=0.15)
    assert order(SAMPLERS["ipndm"], RectifiedFlow(), times_of) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("beta", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("most", range(1, 6))
def test_ghvb_weights_follow_polynomials_up_to_their_order(most, beta):
    """u_k = (1 - beta) u_{k-1} + sum c_j d_{k-j}, on slopes d that are a power of time, has no lag: u is the mean of
    the power over the step."""
    n, pairs = GHVB[most - 1]
    for power in range(most):
        mean = [((k + 1.0) ** (power + 1) - k ** (power + 1)) / (power + 1) for k in (0.0, -1.0)]
        slopes = [(-float(j)) ** power for j in range(most)]
        total = sum((a + b * beta) / n * d for (a, b), d in zip(pairs, slopes, strict=True))
        assert total == pytest.approx(mean[0] - (1 - beta) * mean[1], abs=1e-12)


def end(sampler, process, times, x=None):
    x = np.array([-1.3, 0.2, 0.9]) if x is None else x
    *_, last = plan(sampler, len(times) - 1, process, times).run(MIXTURE.denoiser(process), x)
    return last.x


GRIDS = [
    (EDM(), np.append(np.geomspace(80, 0.002, 12), 0)),
    (RectifiedFlow(), np.linspace(1, 0, 13)),
    (SD15, np.append(np.linspace(1000, 1, 12), 0)),
]


@pytest.mark.parametrize(("process", "times"), GRIDS, ids=["edm", "flow", "vp"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(lms, order=1), "euler"),
        (partial(ipndm, order=1), "euler"),
        (partial(ghvb, order=1.0), "euler"),
        (partial(ghvb, order=4.0), "ipndm"),
        (partial(hb, beta=1.0), "dpmpp_2m"),
        (partial(er_sde, order=1, phi="ode"), "euler"),
        (partial(sa_solver, tau=0.0, predictor=1, corrector=0), "euler"),
        (partial(SAMPLERS["bdia"], gamma=0.0), "euler"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.func.__name__,
)
def test_what_reduces_to_what(one, other, process, times):
    np.testing.assert_allclose(end(one, process, times), end(other, process, times), rtol=1e-8, atol=1e-10)


def test_ghvb_is_the_papers_recursion():
    """With its memory v kept from the start, instead of read back from states."""
    r, beta, y, v = 2.6, 0.6, 1.7, []
    times = np.linspace(10, 1, 12)
    denoise = MIXTURE.denoiser(EDM())
    for here, there in pairwise(times):
        d = (y - float(denoise(np.array(y), here))) / here
        v = [(1 - beta) * v[0] + beta * d if v else d, *v]
        n, pairs = GHVB[min(len(v), 3) - 1]
        y += (there - here) / beta * sum((a + b * beta) / n * m for (a, b), m in zip(pairs, v, strict=False))
    assert end(partial(ghvb, order=r), EDM(), times, np.array([1.7])) == pytest.approx(y, rel=1e-12)


def test_heavy_ball_is_the_recursion_of_its_directions():
    beta, x, v, x0_last = 0.7, 1.7, None, None
    times = np.geomspace(10, 1, 9)
    denoise = MIXTURE.denoiser(EDM())
    h = math.log(times[0] / times[1])
    for here in times[:-1]:
        x0 = float(denoise(np.array(x), here))
        if x0_last is None:
            direction = x0
        else:
            target = x0 + (x0 - x0_last) / 2
            v = target if v is None else (1 - beta) * v + beta * target
            direction = v
        x, x0_last = math.exp(-h) * x + (1 - math.exp(-h)) * direction, x0
    assert end(partial(hb, beta=beta), EDM(), times, np.array([1.7])) == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("steps", [10, 200])
@pytest.mark.parametrize("name", ["hb", "ghvb", "sa_solver", "pndm"])
def test_reading_directions_back_from_states_costs_no_digits_in_float32(name, steps):
    table, start, denoise = plan(name, steps, SD15), np.linspace(-2, 2, 9), MIXTURE.denoiser(SD15)
    ends = []
    for kind in (np.float32, np.float64):
        run = table.run(
            lambda x, t: denoise(x, t).astype(x.dtype), start.astype(kind), lambda: np.ones(9, np.float32)
        )
        ends.append([step.x for step in run][-1])
    np.testing.assert_allclose(*ends, atol=1e-5)


@pytest.mark.parametrize("z", [1e-9, 1e-3, 0.5, 0.999, 1.0, 4.0, 60.0])
def test_moments_of_the_exponential_kernel(z):
    node, weight = np.polynomial.legendre.leggauss(100)
    w, weight = (node + 1) / 2, weight / 2
    exact = [float(np.sum(weight * z * np.exp(-z * (1 - w)) * w**m)) for m in range(4)]
    np.testing.assert_allclose(_moments(z, 4), exact, rtol=1e-12)


def test_integrals_of_er_sde_have_their_closed_forms():
    high, low = np.array([80.0, 1.0, 0.3]), np.array([0.002, 0.9, 0.2999])
    for a, b in zip(high, low, strict=True):
        ends, h = np.array([a, b]), a - b
        first, second = _integrals(ends, GROWTH["ode"])
        assert first[0] == pytest.approx(b * math.log(a / b) - h, rel=1e-9)
        assert second[0] == pytest.approx(b * h - a * b * math.log(a / b) + h**2 / 2, rel=1e-6)
        first, second = _integrals(ends, GROWTH["sde"])
        assert first[0] == pytest.approx(b * h / a - h, rel=1e-12)
        assert second[0] == pytest.approx(b**2 * math.log(a / b) - b * h + h**2 / 2, rel=1e-6)


@pytest.mark.parametrize(
    "process", [SD15, ZERO_SNR, EDM(), RectifiedFlow()], ids=["vp", "zero", "edm", "flow"]
)
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in DISTILLED])
def test_every_sampler_ends_on_data_at_one_point_from_the_noisiest_time(name, process):
    """From alpha 0 to sigma 0, where log-SNR is infinite, with coefficients of moderate size."""
    prediction = "v_prediction" if process is ZERO_SNR else ""
    point, rng = np.array([0.3, -1.2]), np.random.default_rng(0)
    for steps in (1, 2, 3, 4, 5, 50):
        table = plan(name, steps, process, prediction=prediction)
        largest = max(abs(c) for call in table.calls for _, _, c in (*call.input, *(call.next or ())))
        assert largest < 1e5  # EDM in two steps comes down from 80 to 0.002 at once
        start = table.start(rng.standard_normal(2))
        *_, last = table.run(lambda x, t: point, start, lambda: rng.standard_normal(2))
        np.testing.assert_allclose(last.x, point, atol=1e-8, err_msg=f"{steps} steps")


def test_euler_keeps_the_noise_of_a_start_without_signal():
    """x / alpha would be 0 / 0 in the first step, or all rounding."""
    table = plan("euler", 2, ZERO_SNR, [1000.0, 500.0, 0.0], prediction="v_prediction")
    (kind, _, kept), (_, _, added) = table.calls[0].next
    assert (kind, kept, added) == (
        "x",
        pytest.approx(ZERO_SNR.sigma(500)),
        pytest.approx(ZERO_SNR.alpha(500)),
    )


@pytest.mark.parametrize(
    ("name", "extra"), [("plms", 1), ("s_pndm", 1), ("pndm", 9), ("lms", 0), ("sa_solver", 0)]
)
def test_network_calls(name, extra):
    assert len(plan(name, 20, SD15).calls) == 20 + extra


def test_pndm_asks_a_discrete_model_for_trained_levels_only():
    for steps in (7, 33, 300, 1000):
        times = [call.t for call in plan("pndm", steps, SD15).calls]
        np.testing.assert_array_equal(times, np.round(times))


@pytest.mark.parametrize("value", [0.0, -1.0, 5.5])
def test_ghvb_of_no_such_order_is_refused(value):
    with pytest.raises(PlanError, match="at most 5"):
        plan(partial(ghvb, order=value), 5, SD15)


def test_an_unknown_phi_names_the_known_ones():
    with pytest.raises(PlanError, match="did you mean ode"):
        plan(partial(er_sde, phi="odd"), 5, SD15)


@pytest.mark.parametrize(
    ("name", "process"),
    [("lcm", EDM()), ("tcd", RectifiedFlow()), ("consistency", SD15), ("consistency", RectifiedFlow())],
)
def test_samplers_of_distilled_models_refuse_other_processes(name, process):
    with pytest.raises(PlanError, match=f"{name} on a process of kind"):
        plan(name, 2, process, np.array([1.0, 0.5, 0.0]))

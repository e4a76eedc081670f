"""UniPC's own formulas, and what two papers add to a multistep solver: DC-Solver's and DualFast's moved predictions."""

import math

import numpy as np
import pytest

from fewstep.runtime import EDM, plan
from fewstep.runtime.samplers import exponential
from fewstep.runtime.samplers.unipc import dc_ratios

from .exact import GAUSSIAN, SD15
from .test_exponential import FAMILY, run, same_table, sampler


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("noise_prediction", [False, True])
@pytest.mark.parametrize("p", [2, 3])
def test_unipc_s_own_system_has_the_taylor_weights_as_its_solution(p, noise_prediction, variant):
    """The corrector of order p >= 2: R rho = b, as the paper writes it, whatever B(h)."""
    h, r = 0.7, np.array([*[-0.6, -1.3][: p - 1], 1.0])
    hh = h if noise_prediction else -h
    B = hh if variant == "bh1" else math.expm1(hh)
    q, b = math.expm1(hh) / hh - 1, []
    for i in range(1, p + 1):
        b.append(math.factorial(i) * q / B)
        q = q / hh - 1 / math.factorial(i + 1)
    rho = np.linalg.solve(r ** np.arange(p)[:, None], b)
    paper = np.append(-math.expm1(hh) + B * (rho / r).sum(), -B * rho / r)
    np.testing.assert_allclose(exponential.taylor(-hh, list(-hh * np.append(0, r))), paper, rtol=1e-12)


@pytest.mark.parametrize(
    ("guidance", "calls", "expected"),
    [
        (7.5, 5, [1.0271, 0.7392, 1.2263]),
        (7.5, 10, [0.4446, 0.8980, 1.0628, 1.0426, 0.9408, 0.8610, 0.9068, 1.1816]),
        (11, 10, [1.0761, 0.9879, 0.9432, 0.9327, 0.9470, 0.9768, 1.0127, 1.0453]),
    ],
)
def test_dc_ratios_are_the_published_regression_s(guidance, calls, expected):
    """Values of the authors' code, to four digits."""
    found = dc_ratios(guidance, calls)
    assert found[:2] == (1, 1)
    np.testing.assert_allclose(found[2:], expected, atol=6e-5)


def test_dc_ratios_stay_near_one_where_the_fit_knows_nothing():
    assert dc_ratios(7.5, 50) == (1,) * 50
    for calls in range(1, 26):
        ratios = dc_ratios(30.0, calls)
        assert len(ratios) == calls
        assert 0.3 <= min(ratios) <= max(ratios) <= 1.7


def test_dc_solver_without_compensation_is_unipc():
    same_table(sampler("dc_solver", ratios=[1.0] * 12), sampler("unipc", disable_corrector=(0,)))


def test_compensation_reads_the_parabola_through_three_predictions():
    """Predictions quadratic in t: compensating the third is predicting at t' = t_prev + ratio (t_last - t_prev)."""
    times, ratio = np.array([9.0, 6.0, 5.0, 3.0]), 0.7
    f = lambda t: 1 + 2 * t - 0.3 * t * t  # noqa: E731
    at = {5.0: 6.0 + ratio * (5.0 - 6.0)}
    options = {"corrector": False, "lower_order_final": False}
    moved = run(sampler("unipc", ratios=(1, 1, ratio), **options), EDM(), times, lambda x, t: np.array([f(float(t))]),
                np.ones(1))  # fmt: skip
    there = run(sampler("unipc", **options), EDM(), times, lambda x, t: np.array([f(at.get(float(t), float(t)))]),
                np.ones(1))  # fmt: skip
    assert moved[2].x[0] == pytest.approx(there[2].x[0], rel=1e-12)
    assert abs(moved[1].x[0] - there[1].x[0]) < 1e-12


@pytest.mark.parametrize("base", ["ddim", "dpmpp_2m", "dpm_solver_2m"])
def test_dualfast_moves_the_first_order_term_alone(base):
    times = np.array([9.0, 6.0, 3.0])
    denoise, x = GAUSSIAN.denoiser(EDM()), np.array([4.0])
    plain = run(base, EDM(), times, denoise, x)
    moved = run(sampler("dualfast", base=base, c_max=0.2), EDM(), times, denoise, x)
    eps_tau, eps = (x - denoise(x, 9.0)) / 9.0, (plain[0].x - denoise(plain[0].x, 6.0)) / 6.0
    assert moved[0].x == pytest.approx(plain[0].x)
    # in EDM the first-order step is x + (sigma' - sigma) eps; at the second of two steps c is c_max
    np.testing.assert_allclose(moved[1].x - plain[1].x, (3.0 - 6.0) * 0.2 * (eps - eps_tau), rtol=1e-12)
    still = run(sampler("dualfast", base=base, c_max=0.0), EDM(), times, denoise, x)
    np.testing.assert_allclose(still[1].x, plain[1].x, rtol=1e-14)


def test_only_rows_of_dc_solver_grow():
    for name in FAMILY:
        calls = plan(name, 20, SD15, np.linspace(1000, 0, 21)).calls
        rows = [len(call.next or ()) for call in calls]
        assert max(rows) <= (20 if name == "dc_solver" else 8)

"""Samplers that draw fresh noise: the spread they keep, and what remains of them without it."""

from functools import partial

import numpy as np
import pytest

from fewstep.runtime import EDM, SAMPLERS, RectifiedFlow, plan
from fewstep.runtime.samplers import ddim
from fewstep.runtime.samplers.consistency import tcd
from fewstep.runtime.samplers.ddpm import ddpm
from fewstep.runtime.samplers.er_sde import er_sde
from fewstep.runtime.samplers.euler import euler_churn, euler_move, heun_churn
from fewstep.runtime.samplers.restart import restart
from fewstep.runtime.samplers.runge_kutta import kdpm2_ancestral
from fewstep.runtime.samplers.sa_solver import sa_solver

from .exact import GAUSSIAN, MIXTURE, SD15

SPREAD = 0.6
PROCESSES = [
    (SD15, lambda n: np.round(np.linspace(1000, 0, n + 1))),
    (EDM(), lambda n: np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), n) ** 7, 0.0)),
    (RectifiedFlow(), lambda n: np.linspace(1, 0, n + 1)),
]
IDS = ["vp", "edm", "flow"]


def spreads(sampler, process, times):
    """Standard deviation of each state over its due, for Gaussian data, exactly: the ideal denoiser is linear, so a
    state is a combination of the noises, and running on their unit vectors gives its coefficients."""
    table = plan(sampler, len(times) - 1, process, times)
    unit = np.eye(table.noises + 1)

    def due(t):
        return np.hypot(process.alpha(t) * SPREAD, process.sigma(t))

    def denoise(x, t):
        return x * process.alpha(t) * SPREAD**2 / due(t) ** 2

    fresh = iter(unit[1:])
    states = [step.x for step in table.run(denoise, unit[0] * due(times[0]), lambda: next(fresh))]
    return np.sqrt(np.square(states).sum(axis=1)), due(times[1:]), abs(states[-1][0])


STOCHASTIC = {
    "ddpm": ddpm,
    "ddpm_large": partial(ddpm, large=1.0),
    "ddpm half way": partial(ddpm, large=0.5),
    "euler_ancestral": SAMPLERS["euler_ancestral"],
    "kdpm2_ancestral": kdpm2_ancestral,
    "kdpm2_ancestral, eta 0.5": partial(kdpm2_ancestral, eta=0.5),
    "er_sde": er_sde,
    "er_sde, as published": partial(er_sde, corrected=False),
    "er_sde, reverse SDE": partial(er_sde, phi="sde"),
    "sa_solver": sa_solver,
    "sa_solver, tau 0.5": partial(sa_solver, tau=0.5),
    "euler_churn": partial(euler_churn, s_noise=1.0),
    "heun_churn": partial(heun_churn, s_noise=1.0),
}


@pytest.mark.parametrize(("process", "times_of"), PROCESSES, ids=IDS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_fresh_noise_keeps_the_spread_at_every_step(name, process, times_of):
    times = times_of(1000)
    found, due, start = spreads(STOCHASTIC[name], process, times)
    np.testing.assert_allclose(found, due, rtol=0.02)
    assert start < 0.7 * SPREAD  # noise was really exchanged


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (ddpm, 1),
        (partial(er_sde, phi="sde", order=1), 1),
        (partial(er_sde, phi="sde", order=2), 2),
        (partial(er_sde, phi="sde", order=3), 2),
        (kdpm2_ancestral, 2),
        (partial(sa_solver, predictor=1, corrector=0), 1),
        (sa_solver, 2),
    ],
    ids=["ddpm", "er_sde 1", "er_sde 2", "er_sde 3", "kdpm2_ancestral", "sa 1", "sa"],
)
def test_weak_order_of_the_spread(sampler, expected):
    """From 80 to 0.05, where no last step is of first order; the sde solvers' noise is Gaussian to second order."""
    errors = []
    for steps in (200, 400):
        times = np.geomspace(80, 0.05, steps + 1)
        found, due, _ = spreads(sampler, EDM(), times)
        errors.append(abs(found[-1] / due[-1] - 1))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize(("process", "times_of"), PROCESSES, ids=IDS)
def test_restarts_keep_the_spread(process, times_of):
    sampler = partial(restart, intervals=((0.5, 2.0, 60, 2), (0.06, 0.3, 60, 2)))
    times = times_of(600)
    found, _, start = spreads(sampler, process, times)
    assert found[-1] == pytest.approx(SPREAD, rel=0.02)
    assert start < SPREAD / 2


def test_restart_goes_where_it_is_told():
    times = np.array([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])
    table = plan(partial(restart, intervals=((0.28, 2.0, 3, 2), (1.0, 99.0, 4, 1))), 5, EDM(), times)
    assert table.noises == 2  # the process ends at 80: the second interval is left out
    assert (table.states, len(table.calls)) == (5 + 2 * 3, 9 + 2 * 6)
    visited = [call.t for call in table.calls if call.next is not None]
    ramp = np.linspace(2 ** (1 / 7), 0.3 ** (1 / 7), 4) ** 7
    asked = {round(call.t, 9) for call in table.calls}
    assert set(np.round(ramp, 9)) <= asked
    assert visited.count(0.3) == 3  # Heun's second call of the grid's step and of each restart's last


@pytest.mark.parametrize(("process", "times_of"), PROCESSES, ids=IDS)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(heun_churn, s_churn=0.0), "heun"),
        (partial(euler_churn, s_churn=0.0), "euler"),
        (partial(heun_churn, s_tmin=1e9, s_tmax=2e9), "heun"),
        (partial(restart, intervals=()), "heun"),
        (partial(restart, intervals=(), move=euler_move), "euler"),
        (partial(sa_solver, noisy=(1e9, 2e9), predictor=1, corrector=0), "euler"),
        (ddpm, "euler_ancestral"),
        (partial(er_sde, phi="sde", order=1), "euler_ancestral"),
        (partial(sa_solver, predictor=1, corrector=0), "euler_ancestral"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "func", value).__name__,
)
def test_what_reduces_to_what(one, other, process, times_of):
    agree(one, other, process, times_of(12))


@pytest.mark.parametrize(("process", "times_of"), PROCESSES[:2], ids=IDS[:2])
def test_ancestral_dpm2_is_dpm2_without_noise_where_alpha_stays_positive(process, times_of):
    agree(partial(kdpm2_ancestral, eta=0.0), "kdpm2", process, times_of(12))


def agree(one, other, process, times):
    ends = []
    for sampler in (one, other):
        rng = np.random.default_rng(0)
        table = plan(sampler, len(times) - 1, process, times)
        *_, last = table.run(MIXTURE.denoiser(process), np.array([-1.0, 0.4]), lambda: rng.standard_normal(2))  # noqa: B023
        ends.append(last.x)
    np.testing.assert_allclose(*ends, rtol=1e-8, atol=1e-9)


def test_the_small_variance_is_ddim_with_eta_1_and_the_large_one_more():
    one, other, large = (
        plan(sampler, 10, SD15) for sampler in (ddpm, partial(ddim, eta=1.0), SAMPLERS["ddpm_large"])
    )
    for row, same, more in zip(one.calls[:-1], other.calls[:-1], large.calls[:-1], strict=True):
        np.testing.assert_allclose([c for *_, c in row.next], [c for *_, c in same.next], rtol=1e-9)
        assert more.next[-1][2] > row.next[-1][2]


def test_churn_is_algorithm_2():
    """Heun's form written out for one step, in the paper's symbols."""
    s_churn, s_noise, t, t_next, x, z = 3.0, 1.01, 5.0, 2.0, 1.3, 0.7
    denoise = GAUSSIAN.denoiser(EDM())
    t_hat = t * (1 + min(s_churn / 1, 2**0.5 - 1))
    x_hat = x + (t_hat**2 - t**2) ** 0.5 * s_noise * z
    d = (x_hat - denoise(x_hat, t_hat)) / t_hat
    x_next = x_hat + (t_next - t_hat) * d
    expected = x_hat + (t_next - t_hat) * (d + (x_next - denoise(x_next, t_next)) / t_next) / 2
    table = plan(partial(heun_churn, s_churn=s_churn, s_noise=s_noise), 1, EDM(), [t, t_next])
    *_, last = table.run(denoise, np.array([x]), lambda: np.array([z]))
    assert last.x == pytest.approx(expected, rel=1e-12)


def test_churn_stays_within_the_trained_levels():
    for process, times_of in PROCESSES:
        table = plan("heun_churn", 8, process, times_of(8))
        if process.t_max != 80:  # EDM's network takes any noise level
            assert max(call.t for call in table.calls) <= process.t_max
        assert all(np.isfinite(c) for call in table.calls for *_, c in (*call.input, *(call.next or ())))


def test_deterministic_tcd_is_ddim_and_fully_stochastic_tcd_forgets_its_noise():
    times = np.array([1000.0, 600.0, 200.0, 0.0])
    steady, forgetful = (plan(partial(tcd, eta=eta), 3, SD15, times) for eta in (0.0, 1.0))
    assert steady.noises == 0
    for row, same in zip(steady.calls, plan("ddim", 3, SD15, times).calls, strict=True):
        np.testing.assert_allclose([c for *_, c in row.next], [c for *_, c in same.next], rtol=1e-12)
    kept = {(kind, i): c for kind, i, c in forgetful.calls[0].next}
    assert abs(kept["x", 0]) < 0.03  # what is left at the first trained level
    assert kept["n", 0] == pytest.approx(SD15.sigma(600), rel=1e-3)


def test_noise_is_drawn_only_where_it_counts():
    counts = {
        name: plan(name, 6, SD15).noises for name in ("ddpm", "er_sde", "sa_solver", "kdpm2_ancestral", "tcd")
    }
    assert counts == dict.fromkeys(counts, 5)
    assert plan(partial(er_sde, phi="ode"), 6, SD15).noises == 0
    assert plan(partial(sa_solver, tau=0.0), 6, SD15).noises == 0

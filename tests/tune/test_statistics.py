"""Statistics are what closed forms say, whatever the process and precision; the plan made with them ends nearer."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fewstep.runtime import EDM, DiscreteVP, Plan, RectifiedFlow, plan
from fewstep.runtime.errors import BadInput, FewstepError, PlanError
from fewstep.runtime.process import lam
from fewstep.runtime.samplers.dpm_solver_v3 import Statistics
from fewstep.tune.problem import Problem, Trajectory, spread
from fewstep.tune.search import Found, Search
from fewstep.tune.statistics import Measurement, load, measure, save
from fewstep.tune.v3 import measured_plan, v3_plan, variants

from .mixture import MEANS, SD15, SPREADS, WEIGHTS, mixture_problem

PROCESSES = {"vp": SD15, "edm": EDM(sigma_min=0.05), "flow": RectifiedFlow()}
ZERO_SNR = DiscreteVP.from_betas(np.append(np.linspace(0.03, 0.11, 999) ** 2, 1.0))


def measured(problem, state=None, **how):
    *_, statistics = measure(problem, Measurement(**how), state)
    assert isinstance(statistics, Statistics)
    return statistics


def gaussian_problem(process, mean, s=0.4, dtype=np.float64, whole_timesteps=False):
    """Data N(mean, s^2), each element on its own: x0 = mean + alpha s^2/v (x - alpha mean) with
    v = alpha^2 s^2 + sigma^2, and the flow keeps (x - alpha mean) / sqrt(v)."""
    rng = np.random.default_rng(1)
    z, mean = rng.standard_normal((8, 4)), mean * np.array([0.6, -0.9, 0.3, 1.2])
    level = np.linspace(0, 1, 129)[1:] ** 2 * (process.t_max - 1e-4) if process.t_max == 1 else None
    times = np.geomspace(process.t_max, process.t_max / 1000, 128) if level is None else level[::-1]
    times = np.append(times, 0.0)

    def x(t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return alpha * mean + np.sqrt(alpha**2 * s**2 + sigma**2) * z

    def predict(x, call, which):
        t = process_time(call)
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        gain = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        return (mean + gain * (x - alpha * mean)).astype(x.dtype)

    def process_time(call):
        if not whole_timesteps:
            return call.t
        assert call.timestep == round(call.timestep)
        return call.timestep + 1

    states = np.stack([x(t) for t in times]).astype(dtype)
    return Problem(
        process,
        predict,
        z.astype(dtype),
        states[-1],
        fit=6,
        whole_timesteps=whole_timesteps,
        trajectory=Trajectory(process, times, states),
    )


@pytest.mark.parametrize("process", [*PROCESSES.values(), ZERO_SNR], ids=[*PROCESSES, "zero_snr"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_gaussian_has_l_1_over_1_plus_s2_snr_and_s_twice_l_less_1(process, dtype):
    """sigma eps = sigma^2/v (x - alpha mean), so l = sigma^2/v = 1/(1 + s^2 e^2lam) and f = -l mean: s = (log l)',
    which is -2 s^2 e^2lam/(1 + s^2 e^2lam) = 2 (l - 1)."""
    found = measured(gaussian_problem(process, 1.0, dtype=dtype), knots=100)
    l = 1 / (1 + 0.16 * np.exp(2 * np.array(found.lam)))  # noqa: E741
    single = dtype == np.float32
    # differences reach 0.05 in single precision, 1e-3 in double
    assert np.array(found.l) == pytest.approx(l, abs=2e-3 if single else 1e-6)
    visible = l > 0.05  # f shrinks with l, down to rounding
    assert np.array(found.s)[visible] == pytest.approx(2 * (l - 1)[visible], abs=0.05 if single else 0.02)
    assert found.lam[0] >= max(float(lam(process, process.t_max)), -5.0)


def test_probes_see_the_diagonal_of_a_jacobian_that_is_full():
    """Correlated Gaussian data: dx0/dx = alpha C (alpha^2 C + sigma^2)^-1."""
    problem, mix = gaussian_problem(SD15, 0.0), np.random.default_rng(2).normal(size=(4, 4))
    spectrum, basis = np.linalg.eigh(mix @ mix.T)

    def gains(t):
        alpha, sigma = float(SD15.alpha(t)), float(SD15.sigma(t))
        return alpha * spectrum / (alpha**2 * spectrum + sigma**2)

    full = replace(problem, predict=lambda x, call, which: x @ (basis * gains(call.t)) @ basis.T)
    found = measured(full, knots=6, probes=400)
    l = [1 - np.mean(gains(t) * SD15.alpha(t)) for t in SD15.t_of_lam(found.lam)]  # noqa: E741
    assert np.array(found.l) == pytest.approx(np.array(l), abs=0.02)  # 2,400 probes
    once = measured(full, knots=6)
    assert max(abs(np.array(once.l) - l)) > 0.02


def test_what_is_linear_leaves_no_f_and_hence_no_s():
    found = measured(gaussian_problem(SD15, 0.0))
    assert found.s == pytest.approx(np.zeros(len(found.s)), abs=1e-2)


def test_networks_of_whole_timesteps_are_asked_no_others():
    problem = gaussian_problem(SD15, 1.0, whole_timesteps=True)
    found = measured(problem, knots=60)
    l = 1 / (1 + 0.16 * np.exp(2 * np.array(found.lam)))  # noqa: E741
    assert np.array(found.l) == pytest.approx(l, abs=1e-5)
    visible = l > 0.2
    assert np.array(found.s)[visible] == pytest.approx(2 * (l - 1)[visible], abs=0.03)


def posterior(process, x, t):
    """Mean, variance and third central moment of x0 given x_t = x, elementwise."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    v = alpha**2 * SPREADS**2 + sigma**2
    d = x[..., None] - alpha * MEANS
    log_p = np.log(WEIGHTS) - 0.5 * np.log(v) - 0.5 * d**2 / v
    p = np.exp(log_p - log_p.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mean, variance = MEANS + alpha * SPREADS**2 / v * d, SPREADS**2 * sigma**2 / v
    x0 = (p * mean).sum(-1)
    m = mean - x0[..., None]
    return x0, (p * (m**2 + variance)).sum(-1), (p * (m**3 + 3 * m * variance)).sum(-1)


def exact(problem, at):
    """l and s on the same trajectories. With w = (sigma/alpha)^2, p_w smoothed by the heat equation gives, for the
    posterior's variance V and third moment K, dx0/dy = V/w and dx0/dlam = (V (y - x0) - K) / w along the flow."""
    process, which = problem.process, problem.fitted

    def terms(v):
        t = float(process.t_of_lam(v))
        x = problem.trajectory.unit(t, which) * spread(process, t)
        x0, variance, third = posterior(process, x, t)
        y, w = x / float(process.alpha(t)), math.exp(-2 * v)
        return y, x0, (variance * (y - x0) - third) / w, float(np.mean(variance)) / w

    l, s = [], []  # noqa: E741
    for v in at:
        y, x0, slope, k = terms(v)
        bend = (terms(v + 1e-3)[3] - terms(v - 1e-3)[3]) / 2e-3
        f = k * y - x0
        l.append(1 - k)
        s.append(np.mean(f * (bend * y + k * (x0 - y) - slope)) / np.mean(f**2))
    return np.array(l), np.array(s)


@pytest.mark.parametrize("process", PROCESSES)
def test_statistics_of_a_mixture_agree_with_exact_derivatives(process):
    problem = mixture_problem(PROCESSES[process], starts=32, fit=24, reference=200)
    found = measured(problem, knots=120)
    inner = slice(1, -1)
    l, s = exact(problem, np.array(found.lam)[inner])  # noqa: E741
    assert np.array(found.l)[inner] == pytest.approx(l, abs=1e-4)
    assert np.array(found.s)[inner] == pytest.approx(s, abs=0.03)


def test_saved_statistics_are_read_back_exactly_and_damage_is_refused(tmp_path):
    path = tmp_path / "statistics.json"
    statistics = Statistics((-1.5, 0.1, 2.0), (1.0, 0.7, 1 / 3), (0.0, -0.2, -2 / 3))
    save(path, statistics)
    assert load(path) == statistics
    good = json.loads(path.read_text())
    damages = [
        *({**good, "l": bad} for bad in (None, [1.0, None, 0.3], [1.0, True, 0.3], "123", [1.0])),
        {**good, "lam": [1.0, 0.0, 2.0]},
        {key: good[key] for key in ("lam", "l")},
        [good],
    ]
    for text in (*map(json.dumps, damages), path.read_text().replace("0.7", "NaN"), path.read_text()[:-9]):
        path.write_text(text)
        with pytest.raises(BadInput):
            load(path)


def test_an_interrupted_measurement_goes_on_and_ends_the_same(tmp_path):
    problem, state, asked = mixture_problem(SD15, reference=40), tmp_path / "state.json", []

    def counted(x, call, which):
        asked.append(len(x))
        return problem.predict(x, call, which)

    counting = replace(problem, predict=counted)
    whole = measured(counting, knots=9, probes=2)
    cost = sum(asked)
    assert cost == 9 * 8 * (3 + 2 * 2)
    asked.clear()
    for _, _event in zip(range(4), measure(counting, Measurement(9, 2), state), strict=False):
        pass
    assert measured(counting, state, knots=9, probes=2) == whole
    assert sum(asked) == cost


def test_a_state_of_another_measurement_or_a_damaged_one_is_refused(tmp_path):
    problem, state = mixture_problem(SD15, reference=40), tmp_path / "state.json"
    measured(problem, state, knots=9)
    with pytest.raises(BadInput, match="something else"):
        measured(problem, state, knots=10)
    with pytest.raises(BadInput, match="something else"):
        measured(mixture_problem(SD15, reference=41), state, knots=9)
    data = json.loads(state.read_text())
    state.write_text(json.dumps({**data, "knots": [{"lam": 1.0}]}))
    with pytest.raises(BadInput, match="holds no measurement"):
        measured(problem, state, knots=9)


def test_what_cannot_be_measured_says_so():
    problem = mixture_problem(SD15, starts=8, fit=6, reference=40)
    with pytest.raises(PlanError, match="trajectories"):
        measured(replace(problem, trajectory=None))
    with pytest.raises(PlanError, match="3 starts"):
        measured(replace(problem, fit=3))
    with pytest.raises(FewstepError, match="NaN"):
        measured(replace(problem, predict=lambda x, call, which: np.full_like(x, np.nan)))
    for bad in ({"knots": 2}, {"probes": 0}, {"starts": 3}):
        with pytest.raises(BadInput):
            Measurement(**bad)


@pytest.fixture(scope="module", params=PROCESSES)
def learned_about(request):
    problem = mixture_problem(PROCESSES[request.param], starts=64, fit=24, reference=200)
    return problem, measured(problem)


@pytest.mark.parametrize("calls", [8, 10])
def test_a_plan_with_measured_statistics_beats_unipc_and_dpmpp_on_the_best_of_all_grids(learned_about, calls):
    problem, statistics = learned_about
    made = v3_plan(problem, statistics, calls)
    assert len(made.calls) == calls
    assert Plan.from_json(made.to_json()) == made
    others = [
        problem.score(plan(name, calls, problem.process, grid), problem.held_out).rmse
        for name in ("unipc", "dpmpp_2m")
        for grid in {variant.grid for variant in variants(problem, statistics, calls)}
    ]
    assert problem.score(made, problem.held_out).rmse < 0.8 * min(others)


def test_a_process_that_no_grid_serves_says_so():
    problem = mixture_problem(RectifiedFlow(), reference=40)
    with pytest.raises(PlanError, match="no grid"):
        v3_plan(problem, Statistics(), 5, grids=("ays_svd",))


def test_the_search_keeps_its_statistics_for_every_number_of_calls(tmp_path):
    problem = mixture_problem(SD15, starts=16, fit=12, reference=60)
    how = Measurement(knots=12)
    *_, found = measured_plan(Search(problem, 5, state=tmp_path / "v3-5.json"), how=how)
    assert isinstance(found, Found)
    assert found.score.rmse <= found.best_fixed.rmse
    json.dumps(dict(found.details))
    before = (tmp_path / "statistics.json").read_bytes()
    events = list(measured_plan(Search(problem, 8, state=tmp_path / "v3-8.json"), how=how))
    assert not [event for event in events if getattr(event, "stage", "") == "statistics"]
    assert (tmp_path / "statistics.json").read_bytes() == before

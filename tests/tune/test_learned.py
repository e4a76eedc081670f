"""A learned plan is a table like any other: it keeps the noise level, and it ends nearer to the reference."""

from dataclasses import replace

import numpy as np
import pytest

from fewstep.runtime import EDM, DiscreteVP, Plan, RectifiedFlow, plan
from fewstep.runtime.errors import PlanError
from fewstep.tune.fit import Fit, begin, difference_steps, fit, loss, normal_equations, race, winner
from fewstep.tune.learned import Coordinates, learned, row_sums, table_of
from fewstep.tune.problem import Problem, long_run

from .mixture import SD15, mixture_problem

PROCESSES = {"vp": SD15, "edm": EDM(), "flow": RectifiedFlow()}


def fitted(problem, calls, first="ddim", guides=(1.0, 0.1)):
    at = Coordinates(problem.process, calls, calls)
    state = begin(problem, at, at.encode(*table_of(plan(first, calls, problem.process), problem.process)))
    *_, last = fit(problem, at, state, guides)
    return at, last


@pytest.mark.parametrize("name", PROCESSES)
def test_any_weights_keep_a_constant_prediction_exactly_on_its_noise_level(name):
    process = PROCESSES[name]
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0.02, 0.9, 5))[::-1] * process.t_max
    times = np.concatenate([[process.t_max], times, [0.0]])
    shares = np.tril(rng.normal(size=(6, 6)), -1)
    weights = (shares + np.diag(1 - shares.sum(axis=1))) * row_sums(process, times)[:, None]
    x0, noise = rng.normal(size=(2, 3))
    x = process.alpha(times[0]) * x0 + process.sigma(times[0]) * noise
    for i, step in enumerate(learned(lambda x, t: x0, process, x, times, None, weights=weights)):
        level = process.alpha(times[i + 1]) * x0 + process.sigma(times[i + 1]) * noise
        assert step.x == pytest.approx(level, abs=1e-12 * process.sigma(times[0]))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("process", PROCESSES)
def test_a_fixed_samplers_table_takes_the_same_steps(name, process):
    process = PROCESSES[process]
    fixed = plan(name, 5, process)
    at = Coordinates(process, 5, 5)
    problem = mixture_problem(process, starts=4)
    again = at.plan(problem, at.encode(*table_of(fixed, process)))
    which = np.arange(4)
    for ours, theirs in zip(problem.run(again, which), problem.run(fixed, which), strict=True):
        assert ours.x == pytest.approx(theirs.x, rel=1e-9, abs=1e-9)


def test_a_sampler_with_fresh_noise_or_repeated_times_is_no_starting_point():
    for name in ("lcm", "heun"):
        with pytest.raises(PlanError, match="deterministic multistep"):
            table_of(plan(name, 3, SD15), SD15)


def test_learned_halves_the_best_fixed_error_on_starts_never_seen():
    problem = mixture_problem(SD15, starts=48, fit=24, reference=100)
    at, state = fitted(replace(problem, starts=problem.starts[:32], targets=problem.targets[:32]), 5)
    unseen = np.arange(32, 48)
    fixed = []
    for sampler in ("ddim", "dpmpp_2m"):
        for grid in ("trailing", "linspace", "logsnr", "karras"):
            fixed.append(problem.score(plan(sampler, 5, SD15, grid), unseen).rmse)
    ours = problem.score(at.plan(problem, np.array(state.best)), unseen)
    assert ours.rmse < min(fixed) / 2


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_gains(process):
    problem = mixture_problem(PROCESSES[process], starts=24, fit=16, reference=60)
    before = problem.score(plan("ddim", 4, problem.process), problem.held_out).rmse
    _, state = fitted(problem, 4)
    assert state.held_out < before / 2


def test_differences_give_the_slope_of_the_loss():
    problem = mixture_problem(SD15, starts=12, fit=8, reference=60)
    at = Coordinates(SD15, 4, 4)
    vector = at.encode(*table_of(plan("dpmpp_2m", 4, SD15), SD15))
    _, slope, total = normal_equations(problem, at, vector, 0.3)
    assert loss(problem, at, vector, 0.3)[0] == pytest.approx(total, rel=1e-12)
    for k in range(at.size):
        move = np.eye(1, at.size, k)[0] * 1e-5
        change = loss(problem, at, vector + move, 0.3)[0] - loss(problem, at, vector - move, 0.3)[0]
        assert 2 * slope[k] == pytest.approx(change / 2e-5, rel=1e-3, abs=1e-3 * abs(slope).max())


def test_small_batches_change_nothing():
    problem = mixture_problem(SD15, starts=12, fit=8, reference=60)
    at = Coordinates(SD15, 4, 4)
    vector = at.encode(*table_of(plan("dpmpp_2m", 4, SD15), SD15))
    whole = normal_equations(problem, at, vector, 0.3)
    parts = normal_equations(replace(problem, batch=13), at, vector, 0.3)
    for ours, theirs in zip(parts, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_a_fit_that_was_interrupted_ends_where_it_would_have():
    problem = mixture_problem(SD15, starts=12, fit=8, reference=60)
    at = Coordinates(SD15, 4, 4)
    state = begin(problem, at, at.encode(*table_of(plan("ddim", 4, SD15), SD15)))
    *states, last = fit(problem, at, state, (1.0, 0.1))
    resumed = Fit.from_json(states[3].to_json())
    *_, again = fit(problem, at, resumed, (1.0, 0.1))
    assert again == last


def test_the_race_goes_on_from_the_beginning_with_the_least_loss():
    problem = mixture_problem(SD15, starts=12, fit=8, reference=60)
    at = Coordinates(SD15, 4, 4)
    starts = [
        begin(problem, at, at.encode(*table_of(plan("ddim", 4, SD15, grid), SD15)))
        for grid in ("logsnr", "trailing")
    ]
    *_, runners = race(problem, at, starts)
    chosen = winner(runners)
    assert chosen.loss == min(state.loss for state in runners)
    assert chosen.held_out == min(state.held_out for state in runners)
    assert all(state.round == 8 or state.stage == 1 for state in runners)


def test_a_learned_plan_is_an_ordinary_one():
    problem = mixture_problem(SD15, starts=8, fit=6, reference=40)
    at, state = fitted(problem, 3)
    ours = at.plan(problem, np.array(state.best))
    assert Plan.from_json(ours.to_json()) == ours
    assert (ours.sampler, ours.steps, len(ours.calls)) == ("learned", 3, 3)


def test_whole_timesteps_stay_whole_and_still_gain():
    problem = replace(mixture_problem(SD15, starts=24, fit=16, reference=60), whole_timesteps=True)
    before = problem.score(plan("ddim", 4, SD15), problem.held_out).rmse
    at, state = fitted(problem, 4)
    assert all(call.timestep.is_integer() for call in at.plan(problem, np.array(state.best)).calls)
    assert state.held_out < before / 2
    steps = difference_steps(problem, at, np.array(state.best))
    times, _ = at.decode(np.array(state.best))
    moved, _ = at.decode(np.array(state.best) + np.eye(1, at.size, 1)[0] * steps[1])
    assert moved[2] - times[2] == pytest.approx(2)


def test_history_bounds_what_a_step_reads():
    problem = mixture_problem(SD15, starts=8, fit=6, reference=40)
    at = Coordinates(SD15, 5, 2)
    state = begin(problem, at, at.encode(*table_of(plan("dpmpp_2m", 5, SD15), SD15)))
    *_, last = fit(problem, at, state, (1.0,))
    for i, call in enumerate(at.plan(problem, np.array(last.vector)).calls):
        assert {j for kind, j, _ in call.next if kind == "d"} <= {i - 1, i}


def test_the_reference_is_interpolated_between_its_knots():
    problem = mixture_problem(SD15, starts=3, fit=2)
    dense = long_run(problem, plan("heun", 400, SD15, "logsnr"), knots=400)
    coarse = long_run(problem, plan("heun", 400, SD15, "logsnr"), knots=60)
    which = np.arange(3)
    for t in dense.trajectory.times[7:-3:31]:
        assert coarse.trajectory.unit(t, which) == pytest.approx(dense.trajectory.unit(t, which), abs=2e-3)


def test_one_start_to_judge_by_is_needed():
    starts = np.zeros((3, 2))
    with pytest.raises(PlanError, match="one to judge by"):
        Problem(DiscreteVP.from_schedule("linear", 1e-4, 0.02, 10), None, starts, starts, 3)

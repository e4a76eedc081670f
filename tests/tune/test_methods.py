"""The other searches: each lowers what it says it lowers, and goes on after an interruption."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from fewstep.runtime import EDM, Plan, RectifiedFlow, plan
from fewstep.runtime.errors import BadInput, MissingExtra, PlanError
from fewstep.runtime.samplers import SAMPLERS
from fewstep.runtime.samplers.unipc import unipc
from fewstep.runtime.times import make_times
from fewstep.tune.ays import Bound, arctan_levels, between, density, descend, halved
from fewstep.tune.compensation import BOUNDS, compensated_plan
from fewstep.tune.evolution import Genome, crossover, evolved_plan, mutate, plan_of, pool_of
from fewstep.tune.methods import METHODS
from fewstep.tune.problem import Problem
from fewstep.tune.search import Found, Search, recall
from fewstep.tune.solver import Decision, angles, decided, gaps_of, solver_plan, times_of

from .mixture import SD15, denoise, mixture_problem

QUICK = {
    "evolution": partial(evolved_plan, population=12, epochs=4),
    "solver": partial(solver_plan, trials=15),
}


@pytest.fixture(scope="module")
def problem():
    return mixture_problem(SD15, starts=10, fit=7, reference=40)


def ended(events):
    *_, found = events
    assert isinstance(found, Found)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_an_ordinary_plan_no_worse_than_the_best_fixed(name, problem):
    found = ended(QUICK.get(name, METHODS[name])(Search(problem, 5)))
    assert Plan.from_json(found.plan.to_json()) == found.plan
    assert len(found.plan.calls) == 5
    assert found.score.rmse == problem.score(found.plan, problem.held_out).rmse <= found.best_fixed.rmse


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=["edm", "flow"])
def test_every_method_serves_other_processes_or_says_why_not(name, process):
    search = Search(mixture_problem(process, starts=8, fit=6, reference=40), 4)
    if name == "grid" and isinstance(process, RectifiedFlow):
        with pytest.raises(PlanError, match="alpha 0"):
            ended(METHODS[name](search))
        return
    found = ended(QUICK.get(name, METHODS[name])(search))
    assert found.score.rmse <= found.best_fixed.rmse


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"solver"}))  # whose trials are in a storage: below
def test_an_interrupted_search_ends_where_it_would_have(name, problem, tmp_path):
    method = QUICK.get(name, METHODS[name])
    whole = ended(method(Search(problem, 4, state=tmp_path / "whole.json")))
    for events in (31, 33, 36):
        run = method(Search(problem, 4, state=tmp_path / "parts.json"))
        for _, _event in zip(range(events), run, strict=False):
            pass
        run.close()
    again = ended(method(Search(problem, 4, state=tmp_path / "parts.json")))
    assert again.plan == whole.plan


def test_trials_of_a_solver_search_are_kept_and_shared(problem, tmp_path):
    kept = Search(problem, 4, state=tmp_path / "state.json")
    run = solver_plan(kept, trials=9)
    for event in run:
        if event.note.startswith("trial 6"):
            break
    run.close()
    notes = [
        event.note for event in solver_plan(kept, trials=9) if isinstance(getattr(event, "note", 0), str)
    ]
    assert next(note for note in notes if note.startswith("trial")).startswith("trial 7")
    shared = Search(problem, 4, storage=f"sqlite:///{tmp_path / 'trials.db'}")
    ended(solver_plan(shared, trials=4))
    assert ended(solver_plan(shared, trials=4)).score.rmse > 0  # the second worker finds the work done
    with pytest.raises(BadInput, match="optuna storage"):
        ended(solver_plan(Search(problem, 4, storage="nonsense://x"), trials=1))


def test_a_damaged_state_is_refused(tmp_path):
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(BadInput, match="no state of a search"):
        recall(tmp_path / "state.json")


# solver decisions


@pytest.mark.parametrize(
    ("decision", "sampler"),
    [
        (Decision(), "ddim"),
        (Decision(order=2, low=True), "dpmpp_2m"),
        (Decision(order=3), partial(SAMPLERS["dpmpp_3m_exact"], lower_order_final=False)),
        (Decision(order=2, low=True, correct=True), partial(unipc, lower_order_final=False)),
        (Decision(order=3, low=True, correct=True), partial(unipc, order=3, lower_order_final=False)),
        (
            Decision(noise=True, order=2),
            partial(SAMPLERS["dpm_solver_2m"], lower_order_final=False, solver_type="heun"),
        ),
    ],
)
def test_decisions_spell_the_published_solvers(decision, sampler):
    times = make_times("logsnr", 6, SD15)
    ours = Plan.trace(partial(decided, decisions=[decision] * 6), SD15, times)
    theirs = plan(sampler, 6, SD15, times)
    x = np.random.default_rng(0).standard_normal((4, 3))

    def network(x, t):
        return denoise(SD15, x, float(t))

    *_, a = ours.run(network, ours.start(x))
    *_, b = theirs.run(network, theirs.start(x))
    assert a.x == pytest.approx(b.x, abs=1e-9)


def test_a_step_from_the_state_before_last_is_exact_for_constant_predictions():
    decisions = [Decision(order=2, back=True), Decision(noise=True, order=3, back=True, correct=True)] * 2
    times = make_times("logsnr", 4, SD15)
    x0, z = np.array([0.3, -1.0]), np.array([1.0, 0.5])
    x = SD15.alpha(times[0]) * x0 + SD15.sigma(times[0]) * z
    for i, step in enumerate(decided(lambda x, t: x0, SD15, x, times, None, decisions=decisions)):
        assert step.x == pytest.approx(
            SD15.alpha(times[i + 1]) * x0 + SD15.sigma(times[i + 1]) * z, abs=1e-12
        )


@pytest.mark.parametrize("process", [SD15, EDM(), RectifiedFlow()], ids=["vp", "edm", "flow"])
def test_gaps_and_times_are_each_others_inverse(process):
    times = make_times("auto", 6, process)
    assert times_of(process, gaps_of(process, times)) == pytest.approx(times, rel=1e-3, abs=1e-9)
    wild = times_of(process, [3.0, -7.0, -7.0, 3.0, -7.0])
    assert np.all(np.diff(wild) < 0)
    assert angles(process, np.array([0.0])) == 0


# compensation


def test_ratios_of_one_are_plain_unipc_and_searched_ones_lower_every_step(problem):
    found = ended(compensated_plan(Search(problem, 6)))
    if "ratios" in found.details:
        ratios = found.details["ratios"]
        assert ratios[:2] == [1.0, 1.0]
        assert all(BOUNDS[0] <= ratio <= BOUNDS[1] for ratio in ratios)
        assert any(ratio != 1 for ratio in ratios)


def test_compensation_needs_three_predictions(problem):
    with pytest.raises(BadInput, match="at least 3"):
        ended(compensated_plan(Search(problem, 2)))


@pytest.mark.parametrize(("method", "library"), [("compensation", "scipy"), ("solver", "optuna")])
def test_a_missing_library_names_the_extra(method, library, problem, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == library] + [library, "scipy.optimize"]:
        if name.split(".")[0] == library:
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"fewstep\[tune\]"):
        ended(METHODS[method](Search(problem, 4)))


# evolution


def test_mutation_and_crossover_keep_a_candidate_whole():
    rng = np.random.default_rng(0)
    graphs = {"denoiser": 1.0, "small": 0.4}
    a = Genome((0, 10, 20, 30), ("denoiser",) * 4)
    b = Genome((0, 11, 20, 40), ("small",) * 4)
    for _ in range(50):
        child = mutate(a, 50, graphs, rng)
        assert child.places[0] == 0
        assert list(child.places) == sorted(set(child.places))
        assert max(child.places) < 50
        both = crossover(a, b, rng)
        assert both is None or set(both.places) <= {0, 10, 11, 20, 30, 40}


def test_a_budget_makes_some_calls_cheap_ones(problem):
    def predict(x, call, which):
        x0 = denoise(SD15, x, call.t)
        return x0 if call.graph == "denoiser" else 0.98 * x0

    settings = {"graphs": {"denoiser": 1.0, "small": 0.4}, "budget": 3.0}
    cheap = replace(problem, predict=predict)
    run = evolved_plan(Search(cheap, 4, settings=settings), population=12, epochs=4)
    found = ended(run)
    chosen = Genome(tuple(range(4)), tuple(found.details["graphs"]))
    assert chosen.cost(settings["graphs"]) <= 3.0
    with pytest.raises(BadInput, match="budget"):
        ended(evolved_plan(Search(cheap, 4, settings={**settings, "budget": 1.0})))


def test_a_candidates_graphs_are_in_its_plan(problem):
    pool = pool_of(SD15)
    genome = Genome((0, 300, 700), ("denoiser", "small", "denoiser"))
    made = plan_of(problem, "ddim", pool, genome)
    assert [call.graph for call in made.calls] == list(genome.graphs)
    assert [call.t for call in made.calls] == [1000.0, 700.0, 300.0]


# the grid by its bound


def gaussian_problem(spread=0.5):
    """One Gaussian around 0, in many coordinates: D(x, s) = x c^2 / (c^2 + s^2) in the frame of x / alpha."""
    noise = np.random.default_rng(7).standard_normal((48, 64))

    def predict(x, call, which):
        alpha, sigma = float(SD15.alpha(call.t)), float(SD15.sigma(call.t))
        return x * alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)

    return Problem(SD15, predict, noise, spread * noise, 32)


def test_the_bound_of_an_interval_equals_its_closed_form_for_gaussian_data():
    """E |D(x_s, s) - D(x_h, h)|^2 = c^4 (1/(c^2 + s^2) - 1/(c^2 + h^2)) for x_h = x_s + noise."""
    c, low, high = 0.5, 0.4, 1.5
    s = np.exp(np.linspace(np.log(low), np.log(high), 20001))
    values = 2 * s**-3 * c**4 * (1 / (c**2 + s**2) - 1 / (c**2 + high**2))
    exact = float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(s)))
    got = Bound(gaussian_problem(c), samples=32).interval(low, high)
    assert got == pytest.approx(exact, rel=0.05)


def test_the_density_integrates_its_own_shape_exactly():
    low, high, c = 0.1, 2.0, 0.5
    levels, weight = density(low, high, c)
    fine = np.exp(np.linspace(np.log(low), np.log(high), 20001))
    values = 2 * fine**-3 * (1 / (fine**2 + c**2) - 1 / (high**2 + c**2))
    exact = np.sum((values[1:] + values[:-1]) / 2 * np.diff(fine))
    assert np.sum(weight * (1 / (levels**2 + c**2) - 1 / (high**2 + c**2))) == pytest.approx(exact, rel=1e-3)


def test_the_descent_lowers_the_bound_and_keeps_the_ends():
    bound = Bound(gaussian_problem(), samples=16)
    levels = np.exp(np.linspace(np.log(14.0), np.log(0.03), 6))
    before = bound.total(levels)
    after = descend(bound, levels, range(1, 5))
    assert bound.total(after) < before
    assert (after[0], after[-1]) == (levels[0], levels[-1])
    assert np.all(np.diff(after) < 0)


def test_the_arctan_grid_is_nearly_the_bounds_optimum_for_gaussian_data():
    problem = gaussian_problem()
    bound = Bound(problem, samples=16)
    arctan = arctan_levels(problem, 8)
    even = np.exp(np.linspace(np.log(arctan[0]), np.log(arctan[-1]), 8))
    optimum = even
    for _ in range(12):
        optimum = descend(bound, optimum, range(1, 7))
    assert bound.total(optimum) < bound.total(even)


def test_halving_and_resampling_keep_the_ends():
    levels = np.array([8.0, 2.0, 0.5])
    assert halved(levels) == pytest.approx([8.0, 4.0, 2.0, 1.0, 0.5])
    assert between(levels, 5) == pytest.approx([8.0, 4.0, 2.0, 1.0, 0.5])

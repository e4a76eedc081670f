"""A plan is the sampler: same numbers, as a table, through JSON, in either precision."""

import json
import tracemalloc

import numpy as np
import pytest

from fewstep.runtime import EDM, SAMPLERS, DiscreteVP, Plan, RectifiedFlow, Time, plan
from fewstep.runtime.errors import NotLinear, PlanError
from fewstep.runtime.samplers import Step
from fewstep.runtime.times import make_times
from fewstep.runtime.tracing import x0_conversion

SD15 = DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000)

ONLY = {"lcm": (SD15,), "tcd": (SD15,), "consistency": (EDM(),)}
"""Samplers of distilled models, which know one kind of process."""


def home(name):
    return ONLY.get(name, (SD15,))[0]


def network(x, t):
    return np.tanh(x * (1 + float(t) / 1000)) * 0.7 + 0.1 * np.sin(3 * x)


@pytest.mark.parametrize(
    ("name", "process"),
    [(name, process) for name in SAMPLERS for process in ONLY.get(name, (SD15, EDM(), RectifiedFlow()))],
)
def test_the_table_repeats_the_sampler(name, process):
    rng = np.random.default_rng(0)
    x, noises = rng.standard_normal((1, 4, 8, 8)), rng.standard_normal((50, 1, 4, 8, 8))
    times = make_times("auto", 9, process)
    given, drawn = iter(noises), iter(noises)
    direct = list(SAMPLERS[name](network, process, x, times, lambda: next(given)))
    table = list(plan(name, 9, process, times).run(network, x, lambda: next(drawn)))
    assert [step.index for step in table] == [step.index for step in direct] == list(range(len(direct)))
    for one, other in zip(direct, table, strict=True):
        np.testing.assert_allclose(other.x, one.x, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(other.x0, one.x0, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SAMPLERS)
def test_json_round_trip_is_exact(name):
    table = plan(name, 4, home(name))
    assert Plan.from_json(json.dumps(table.to_json())) == table
    assert Plan.from_json(table.to_json()) == table


def test_rows_stay_short_however_many_steps():
    for name in SAMPLERS:
        # the longest: Adams-Bashforth of order 4, where each slope is a state and a prediction
        assert max(len(call.next or ()) for call in plan(name, 50, home(name)).calls) <= 8, name


def test_heun_calls_twice_a_step_but_once_onto_clean():
    table = plan("heun", 4, SD15)
    assert (table.steps, table.states, len(table.calls)) == (4, 4, 7)


def test_denoise_is_told_the_timestep_and_the_row():
    seen = []

    def denoise(x, t):
        assert isinstance(t, Time)
        seen.append((float(t), t.timestep, t.call.scale))
        return x

    list(plan("ddim", 2, SD15).run(denoise, np.zeros((1, 2))))
    assert seen == [(1000.0, 999.0, 1.0), (500.0, 499.0, 1.0)]


def test_float32_stays_float32():
    *_, last = plan("dpmpp_2m", 5, SD15).run(lambda x, t: x, np.ones((1, 4), dtype=np.float32))
    assert last.x.dtype == np.float32


def test_the_callers_array_is_left_alone():
    x = np.ones((1, 4))
    list(plan("euler", 5, SD15).run(network, x))
    np.testing.assert_array_equal(x, 1)


def test_missing_noise_is_an_error_before_the_first_call():
    with pytest.raises(PlanError, match="3 noises"):
        next(plan("lcm", 4, SD15).run(network, np.ones(3)))


def test_a_thousand_images_leave_no_memory_behind():
    table, x = plan("dpmpp_2m", 4, SD15), np.ones((1, 4, 16, 16), dtype=np.float32)
    list(table.run(lambda x, t: x, x))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            for _step in table.run(lambda x, t: x, x):
                pass
        del _step
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < x.nbytes


def test_old_predictions_are_freed_as_the_run_goes_on():
    import weakref

    alive = []

    def denoise(x, t):
        out = x * 0.5
        alive.append(weakref.ref(out))
        return out

    for step in plan("dpmpp_2m", 10, SD15).run(denoise, np.ones(5)):
        del step
        assert sum(ref() is not None for ref in alive) <= 3


def test_the_start_is_noise_with_the_spread_of_unit_data_at_the_start():
    assert plan("ddim", 3, SD15).init == (("z", 0, pytest.approx(1)),)
    assert plan("euler", 3, EDM()).init == (("z", 0, pytest.approx(np.hypot(1, 80))),)
    assert plan("euler", 3, RectifiedFlow()).init == (("z", 0, 1.0),)


@pytest.mark.parametrize("t", [1.0, 400.0, 1000.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_conversions_recover_the_clean_sample(prediction, t):
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 50))
    alpha, sigma = float(SD15.alpha(t)), float(SD15.sigma(t))
    output = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction]
    a, b = x0_conversion(prediction, alpha, sigma)
    np.testing.assert_allclose(a * (alpha * x0 + sigma * eps) + b * output, x0, rtol=1e-9, atol=1e-12)


def test_flow_conversion_recovers_the_clean_sample():
    x0, eps, t = 0.7, -0.2, 0.3
    a, b = x0_conversion("flow", 1 - t, t)
    assert a * ((1 - t) * x0 + t * eps) + b * (eps - x0) == pytest.approx(x0)


def test_epsilon_says_nothing_where_alpha_is_zero():
    with pytest.raises(PlanError, match="alpha is 0"):
        x0_conversion("epsilon", 0.0, 1.0)


def test_v_prediction_starts_from_zero_terminal_snr():
    process = DiscreteVP.from_betas(np.append(np.linspace(1e-4, 0.02, 999), 1.0))
    for name in ("ddim", "euler", "heun", "dpmpp_2m"):
        table = plan(name, 5, process, prediction="v_prediction")
        states = [step.x for step in table.run(lambda x, t: 0.5 * x, np.ones(3))]
        assert all(np.isfinite(x).all() for x in states), name


def test_a_sampler_that_multiplies_samples_is_not_a_plan():
    def squares(denoise, process, x, times, noise):
        yield Step(0, x * x, x)

    with pytest.raises(NotLinear, match="multiply"):
        plan(squares, 1, SD15)


def test_noise_no_row_reads_still_advances_the_stream():
    def wasteful(denoise, process, x, times, noise):
        x0 = denoise(x, times[0])
        noise()
        yield Step(0, x0 + noise(), x0)

    table = plan(wasteful, 1, SD15)
    numbers = iter([np.array([10.0]), np.array([1.0])])
    *_, last = table.run(lambda x, t: x, np.array([0.0]), lambda: next(numbers))
    assert last.x == 1


def damaged(change):
    data = plan("dpmpp_2m", 3, SD15).to_json()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("calls"), "calls"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["calls"].clear(), "missing or too many"),
        (lambda d: d["calls"][0].pop("scale"), "call 0"),
        (lambda d: d["calls"][1].update(t=float("nan")), "call 1: t"),
        (lambda d: d["calls"][1].update(timestep="5"), "call 1: timestep"),
        (lambda d: d["calls"][1].update(x0=[1.0]), "call 1"),
        (lambda d: d["calls"][0]["next"].append(["x", 7, 1.0]), "does not exist yet"),
        (lambda d: d["calls"][0]["next"].append(["d", 1, 1.0]), "does not exist yet"),
        (lambda d: d["calls"][0]["next"].append(["q", 0, 1.0]), "does not exist yet"),
        (lambda d: d["calls"][0]["next"].append(["x", 0]), "kind, index, coefficient"),
        (lambda d: d["calls"][0]["input"].clear(), "at least one"),
        (lambda d: d["calls"][2].update(next=None), "leads to no state"),
        (lambda d: d.update(init=[["z", 0, float("inf")]]), "init"),
        (lambda d: d.update(init=[["x", 0, 1.0]]), "init"),
        (lambda d: d.update(steps=0), "0 steps"),
    ],
)
def test_a_damaged_plan_names_the_row(change, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_json(damaged(change))


def test_text_that_is_not_json_is_refused():
    with pytest.raises(PlanError, match="not JSON"):
        Plan.from_json("{")

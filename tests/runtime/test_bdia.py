"""Inversion: exact where BDIA says exact, approximate and converging where DDIM says so."""

import json
from functools import partial

import numpy as np
import pytest

from fewstep.runtime import EDM, DiscreteVP, Plan, RectifiedFlow, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.samplers.bdia import bdia
from fewstep.runtime.samplers.inversion import bdia_inversion_plan, bdia_plan, ddim_inversion_plan

from .exact import MIXTURE, SD15

PROCESSES = [
    (SD15, lambda n: np.round(np.linspace(1000, 0, n + 1))),
    (EDM(), lambda n: np.append(np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), n) ** 7, 0.0)),
    (RectifiedFlow(), lambda n: np.linspace(1, 0, n + 1)),
]
START = np.random.default_rng(0).standard_normal((3, 5))


def sampled(process, times, gamma=1.0, start=START):
    """Every state, the start first."""
    table = plan(partial(bdia, gamma=gamma), len(times) - 1, process, times)
    x = table.start(start)
    return [x, *(step.x for step in table.run(MIXTURE.denoiser(process), x))]


def last_of(table, process, given):
    states = [step.x for step in table.run(MIXTURE.denoiser(process), table.start(None, given), given=given)]
    return states[-1], states


@pytest.mark.parametrize("steps", [2, 10, 20, 50])
@pytest.mark.parametrize(("process", "times_of"), PROCESSES, ids=["vp", "edm", "flow"])
def test_the_round_trip_is_exact(process, times_of, steps):
    """From noise through DDIM's first step to clean data and back to the noise; then down again to the data."""
    times = times_of(steps)
    states = sampled(process, times)
    inverse = bdia_inversion_plan(process, times)
    assert (inverse.givens, inverse.noises, len(inverse.calls)) == (2, 0, steps - 1)
    noise, way = last_of(inverse, process, [states[-1], states[-2]])
    size = np.abs(states[0]).max()
    assert np.abs(noise - states[0]).max() < 1e-6 * size
    second = way[-2] if steps > 2 else states[-2]
    again, _ = last_of(bdia_plan(process, times), process, [noise, second])
    assert np.abs(again - states[-1]).max() < 1e-6


def test_a_picture_survives_the_way_up_and_down():
    """Editing starts from the picture alone: a step of DDIM inversion makes the second state."""
    picture = np.random.default_rng(1).standard_normal((2, 4)) * 0.7
    times = np.append(np.linspace(1000, 20, 20).round(), 1.0)
    second, _ = last_of(ddim_inversion_plan(SD15, times[:-3:-1]), SD15, [picture])
    noise, way = last_of(bdia_inversion_plan(SD15, times), SD15, [picture, second])
    again, _ = last_of(bdia_plan(SD15, times), SD15, [noise, way[-2]])
    np.testing.assert_allclose(again, picture, atol=1e-9)
    assert np.abs(noise - picture).max() > 0.1


def test_damped_sampling_inverts_too_while_digits_last():
    times = PROCESSES[0][1](10)
    states = sampled(SD15, times, gamma=0.5)
    noise, _ = last_of(bdia_inversion_plan(SD15, times, gamma=0.5), SD15, [states[-1], states[-2]])
    np.testing.assert_allclose(noise, states[0], atol=1e-6)


def test_the_wrong_gamma_does_not_invert():
    times = PROCESSES[0][1](10)
    states = sampled(SD15, times, gamma=0.9)
    noise, _ = last_of(bdia_inversion_plan(SD15, times), SD15, [states[-1], states[-2]])
    assert np.abs(noise - states[0]).max() > 1e-3


def test_zero_terminal_snr_inverts():
    process = DiscreteVP.from_betas(np.append(np.linspace(1e-4, 0.02, 999), 1.0))
    times = np.round(np.linspace(1000, 0, 11))
    table = plan("bdia", 10, process, times, prediction="v_prediction")
    states = [START, *(step.x for step in table.run(MIXTURE.denoiser(process), START))]
    inverse = bdia_inversion_plan(process, times, prediction="v_prediction")
    noise, _ = last_of(inverse, process, [states[-1], states[-2]])
    np.testing.assert_allclose(noise, START, atol=1e-6)


def test_ddim_inversion_follows_the_flow_to_first_order():
    clean, errors = np.array([-1.0, 0.1, 0.8]), []
    for steps in (100, 200):
        times = np.linspace(1, 1000, steps + 1)
        noise, _ = last_of(ddim_inversion_plan(SD15, times), SD15, [clean])
        errors.append(np.abs(noise - MIXTURE.flow(SD15, clean, 1.0, 1000.0)).max())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("make", [bdia_inversion_plan, bdia_plan])
def test_inversions_are_plans_like_any_other(make):
    table = make(SD15, np.round(np.linspace(1000, 0, 6)))
    assert table.init == (("y", 1, 1.0),)
    assert Plan.from_json(json.dumps(table.to_json())) == table
    assert max(len(call.next) for call in table.calls) == 3
    with pytest.raises(PlanError, match="1 given arrays"):
        table.start(None, [START])


def test_inversion_from_clean_data_says_where_to_start():
    with pytest.raises(PlanError, match="small time"):
        ddim_inversion_plan(SD15, [0.0, 500.0, 1000.0])


def test_two_states_need_two_steps():
    with pytest.raises(PlanError, match="2 or more"):
        bdia_inversion_plan(SD15, [1000.0, 0.0])


def test_a_process_with_an_observation_is_refused():
    class Observed(RectifiedFlow):
        def gamma(self, t):
            return 0.0

    with pytest.raises(PlanError, match="observation"):
        bdia_plan(Observed(), [1.0, 0.5, 0.0])


def test_float32_loses_little():
    times = PROCESSES[0][1](20)
    states = sampled(SD15, times, start=START.astype(np.float32))
    assert states[-1].dtype == np.float32
    inverse = bdia_inversion_plan(SD15, times)
    noise, _ = last_of(inverse, SD15, [states[-1], states[-2]])
    assert noise.dtype == np.float32
    assert np.abs(noise - states[0]).max() < 1e-2

"""What no table can express, by name: the same for a sample whatever else is in its batch, and refused when damaged."""

import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from fewstep.runtime import EDM, DiscreteVP, Plan, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.policy import (
    Clip,
    LearnedVariance,
    Threshold,
    TimeShift,
    with_learned_variance,
    with_policies,
    with_time_shift,
)
from fewstep.runtime.tracing import x0_conversion

from .exact import SD15


def network(x, t):
    """What a Denoiser does: the network at the row's timestep, and the row's conversion."""
    a, b, _ = t.call.x0
    return a * x + b * np.tanh(x * (1 + t.timestep / 1000))


def samples(n=4, seed=0):
    """Samples of spreads from 0.5 to 3, so that policies treat them differently."""
    spread = np.linspace(0.5, 3, n).reshape(n, 1, 1, 1)
    return spread * np.random.default_rng(seed).standard_normal((n, 2, 4, 4))


def end(table, x, denoise=network):
    *_, last = table.run(denoise, x)
    return last.x


def test_clip_limits_the_prediction_not_the_state():
    table = with_policies(plan("ddim", 1, SD15, [1000.0, 500.0]), Clip(0.5))
    (step,) = table.run(lambda x, t: x, np.array([-3.0, 0.2, 3.0]))
    np.testing.assert_array_equal(step.x0, [-0.5, 0.2, 0.5])
    assert abs(step.x[0]) > 0.5


@pytest.mark.parametrize(("ratio", "limit"), [(0.995, 1.0), (0.9, 2.0), (0.5, 10.0), (1.0, 1.5)])
def test_threshold_is_diffusers_dynamic_thresholding(ratio, limit):
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=limit
    )
    expected = scheduler._threshold_sample(torch.from_numpy(samples())).numpy()
    np.testing.assert_allclose(Threshold(ratio, limit).apply(samples()), expected, rtol=1e-12)


def test_threshold_leaves_predictions_within_1_alone_and_scales_others_into_it():
    quiet, loud = 0.9 * np.sin(np.arange(50.0)), 7 * np.sin(np.arange(50.0))
    out = Threshold(1.0, 100.0).apply(np.stack([quiet, loud]))
    np.testing.assert_array_equal(out[0], quiet)
    np.testing.assert_allclose(out[1], loud / np.abs(loud).max(), rtol=1e-12)


@pytest.mark.parametrize("policy", [Clip(0.5), Threshold(0.9, 3.0)])
def test_float32_stays_float32(policy):
    assert policy.apply(samples().astype(np.float32)).dtype == np.float32


def test_time_shift_takes_the_nearest_variance_and_the_earlier_of_two():
    shift = TimeShift(((30.0, 3.0, 1.0, 0.0, 0.0), (20.0, 2.0, 1.0, 0.0, 0.0), (10.0, 1.0, 1.0, 0.0, 0.0)))
    sign = np.tile([1.0, -1.0], 8)
    x = np.stack([np.sqrt(v) * sign for v in (9.0, 2.2, 1.7, 0.1, 2.25)])
    np.testing.assert_array_equal(shift.choose(x), [0, 1, 1, 2, 1])
    np.testing.assert_array_equal(shift.choose(np.stack([np.sqrt(2.5) * sign])), [0])


def test_time_shift_ignores_the_mean_of_a_sample():
    shift = TimeShift(((30.0, 3.0, 1.0, 0.0, 0.0), (10.0, 1.0, 1.0, 0.0, 0.0)))
    np.testing.assert_array_equal(shift.choose(100 + np.tile([1.0, -1.0], (1, 8))), [1])


def test_a_shifted_call_is_told_the_time_and_converts_by_it():
    candidates = ((700.0, 4.0, 0.0, 1.0, 0.0), (600.0, 1.0, 0.5, 0.0, 0.0))
    table = plan("ddim", 1, SD15, [700.0, 0.0])
    table = replace(table, calls=(replace(table.calls[0], policies=(TimeShift(candidates),)),))
    asked = []

    def denoise(x, t):
        asked.append((float(t), t.timestep))
        return t.call.x0[0] * x + t.call.x0[1] * 7

    x = np.stack([np.tile([2.0, -2.0], 8), np.tile([1.0, -1.0], 8)])
    (step,) = table.run(denoise, x)
    assert asked == [(700.0, 700.0), (700.0, 600.0)]  # the state's own time stays the grid's
    np.testing.assert_array_equal(step.x0[0], 7)
    np.testing.assert_array_equal(step.x0[1], 0.5 * x[1])


def test_time_shift_offers_the_window_around_the_grids_time_with_its_conversions():
    table = with_time_shift(plan("ddim", 10, SD15), SD15, window=6, cutoff=300)
    shifted = [bool(call.policies) for call in table.calls]
    assert shifted == [False] + [call.timestep > 300 for call in table.calls[1:]]
    assert 0 < sum(shifted) < 9
    call = table.calls[2]
    rows = call.policies[0].candidates
    assert [row[0] for row in rows] == [call.timestep + k for k in (3, 2, 1, 0, -1, -2, -3)]
    for timestep, variance, a, b, c in rows:
        alpha, sigma = float(SD15.alpha(timestep + 1)), float(SD15.sigma(timestep + 1))
        assert variance == pytest.approx(1 - SD15.alphas_cumprod[int(timestep)], rel=1e-12)
        assert (a, b, c) == (*x0_conversion("epsilon", alpha, sigma), 0.0)
    assert call.x0[:2] == pytest.approx(rows[3][2:4])


def test_time_shift_stays_within_the_trained_timesteps():
    table = with_time_shift(plan("ddim", 20, SD15), SD15, window=400, cutoff=0)
    asked = [row[0] for call in table.calls[1:] for policy in call.policies for row in policy.candidates]
    assert (min(asked), max(asked)) == (0, 999)


def test_time_shift_on_a_continuous_process_is_refused():
    with pytest.raises(PlanError, match="a discrete model"):
        with_time_shift(plan("euler", 5, EDM()), EDM())


def test_states_with_the_variance_of_their_time_are_not_shifted():
    table = plan("ddim", 10, SD15)
    sign = np.tile([1.0, -1.0], (1, 32))

    def held(x, t):
        """A prediction that puts the next state at the variance 1 - alphas_cumprod, where there is no data."""
        return 0 * x

    start = SD15.sigma(1000) * sign
    shifted = with_time_shift(table, SD15)
    np.testing.assert_array_equal(end(shifted, start, held), end(table, start, held))
    asked = []
    list(shifted.run(lambda x, t: asked.append(t.timestep) or held(x, t), start))
    assert asked == [call.timestep for call in table.calls]


@pytest.mark.parametrize(
    "change",
    [
        lambda table: with_policies(table, Clip(0.7)),
        lambda table: with_policies(table, Threshold(0.9, 4.0)),
        lambda table: with_policies(table, Clip(2.0), Threshold(0.8, 4.0)),
        lambda table: with_time_shift(table, SD15, window=200, cutoff=100),
        lambda table: with_policies(
            with_time_shift(table, SD15, window=200, cutoff=100), Threshold(0.9, 4.0)
        ),
    ],
    ids=["clip", "threshold", "both", "time shift", "time shift and threshold"],
)
def test_a_sample_does_not_depend_on_its_batch(change):
    table, x = change(plan("dpmpp_2m", 8, SD15)), samples(5)
    together = end(table, x)
    assert np.abs(together - end(plan("dpmpp_2m", 8, SD15), x)).max() > 1e-3  # the policy did act
    for i in range(5):
        np.testing.assert_array_equal(end(table, x[i : i + 1])[0], together[i])
    order = [3, 0, 4, 1, 2]
    np.testing.assert_array_equal(end(table, x[order]), together[order])


def test_samples_that_shift_alike_share_a_call():
    table = with_time_shift(plan("ddim", 5, SD15), SD15, window=100, cutoff=300)
    calls = []

    def denoise(x, t):
        calls.append(len(x))
        return network(x, t)

    end(table, np.repeat(samples(1), 6, axis=0), denoise)
    assert calls == [6] * 5


def test_policies_apply_in_order():
    x0 = np.array([[4.0, 2.0, -4.0, 0.0]])
    table = plan("ddim", 1, SD15, [500.0, 0.0])
    clip_first = end(with_policies(table, Clip(2.0), Threshold(1.0, 9.0)), x0, lambda x, t: x0)
    clip_last = end(with_policies(with_policies(table, Threshold(1.0, 9.0)), Clip(2.0)), x0, lambda x, t: x0)
    np.testing.assert_allclose(clip_first, [[1, 1, -1, 0]], atol=1e-12)
    np.testing.assert_allclose(clip_last, [[1, 0.5, -1, 0]], atol=1e-12)


def test_learned_variance_is_diffusers_learned_range(monkeypatch):
    """The network's second half of channels places each element's variance between the two fixed ones."""
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = diffusers.DDPMScheduler(**beta, clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(12)
    fresh = np.random.default_rng(1).standard_normal((12, *samples().shape))

    def both(x):
        return np.tanh(x), np.sin(2 * x)

    theirs, draws = torch.from_numpy(samples()), iter(fresh)
    monkeypatch.setattr(
        diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: torch.from_numpy(next(draws))
    )
    for t in scheduler.timesteps:
        output = torch.from_numpy(np.concatenate(both(theirs.numpy()), axis=1))
        theirs = scheduler.step(output, t, theirs).prev_sample

    def denoise(x, t):
        output, t.variance = both(x)
        return t.call.x0[0] * x + t.call.x0[1] * output

    process, draws = DiscreteVP(scheduler.alphas_cumprod.double().numpy()), iter(fresh)
    table = plan("ddpm", 12, process, [*(scheduler.timesteps.numpy() + 1.0), 0.0])
    *_, last = with_learned_variance(table, process).run(denoise, samples(), lambda: next(draws))
    np.testing.assert_allclose(last.x, theirs.numpy(), rtol=1e-6, atol=1e-6)
    draws = iter(fresh)
    *_, small = table.run(denoise, samples(), lambda: next(draws))
    assert np.abs(small.x - last.x).max() > 1e-2


def test_learned_variance_needs_noise_and_a_network_that_has_it():
    with pytest.raises(PlanError, match="draws no noise"):
        with_learned_variance(plan("ddim", 3, SD15), SD15)
    table = with_learned_variance(plan("ddpm", 3, SD15), SD15)
    with pytest.raises(PlanError, match="twice the sample's channels"):
        list(table.run(network, samples(), lambda: samples()))


def test_policies_survive_json():
    table = with_policies(with_time_shift(plan("ddim", 6, SD15), SD15), Clip(1.5), LearnedVariance(0.3))
    assert Plan.from_json(json.dumps(table.to_json())) == table


CLIP, THRESHOLD = {"name": "clip", "limit": 1.0}, {"name": "threshold", "ratio": 0.9, "limit": 1.0}
ROW = [500.0, 0.5, 1.0, -1.0, 0.0]
SHIFT = {"name": "time_shift", "candidates": [ROW]}


@pytest.mark.parametrize("policy", [CLIP, THRESHOLD, SHIFT], ids=lambda policy: policy["name"])
def test_a_sound_policy_is_read(policy):
    assert Plan.from_json(damaged([policy])).to_json() == damaged([policy])


def damaged(policies):
    data = plan("ddim", 3, SD15).to_json()
    data["calls"][1]["policies"] = policies
    return data


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        (None, "short list"),
        ({"name": "clip", "limit": 1.0}, "short list"),
        ([CLIP] * 100, "short list"),
        (["clip"], "unknown policy 'clip'"),
        ([{}], "unknown policy"),
        ([{"name": "sharpen"}], "expected one of clip, threshold, time_shift"),
        ([{"name": ["clip"]}], "unknown policy"),
        ([{"name": None}], "unknown policy"),
        ([{"name": "clip"}], "the fields name, limit"),
        ([{**CLIP, "extra": 1}], "the fields name, limit"),
        ([{**CLIP, "limit": 0}], "positive"),
        ([{**CLIP, "limit": -1.0}], "positive"),
        ([{**CLIP, "limit": True}], "positive"),
        ([{**CLIP, "limit": "1"}], "positive"),
        ([{**CLIP, "limit": None}], "positive"),
        ([{**CLIP, "limit": float("nan")}], "positive"),
        ([{**CLIP, "limit": float("inf")}], "positive"),
        ([{**THRESHOLD, "ratio": 1.1}], "ratio at most 1"),
        ([{**THRESHOLD, "ratio": 0.0}], "positive"),
        ([{**SHIFT, "candidates": []}], "1 to 1000 candidates"),
        ([{**SHIFT, "candidates": [ROW] * 1001}], "1 to 1000 candidates"),
        ([{**SHIFT, "candidates": {"0": ROW}}], "1 to 1000 candidates"),
        ([{**SHIFT, "candidates": [ROW[:4]]}], "five finite numbers"),
        ([{**SHIFT, "candidates": [[*ROW[:4], float("nan")]]}], "five finite numbers"),
        ([{**SHIFT, "candidates": [[*ROW[:4], "0"]]}], "five finite numbers"),
        ([{**SHIFT, "candidates": [None]}], "five finite numbers"),
    ],
)
def test_a_damaged_policy_names_the_row(policies, message):
    with pytest.raises(PlanError, match=f"call 1.*{message}"):
        Plan.from_json(damaged(policies))

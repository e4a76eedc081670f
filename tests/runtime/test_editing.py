"""Starts from images, inpainting, inversions and edits with two prompts."""

import json
from functools import partial

import numpy as np
import pytest

from fewstep.runtime import EDM, Plan, RectifiedFlow, plan
from fewstep.runtime.conditional import MeanReverting, ResidualShift
from fewstep.runtime.editing import ddcm, edit_friendly, from_image, implicit_inversion, keep
from fewstep.runtime.errors import PlanError
from fewstep.runtime.policy import Clip, with_policies
from fewstep.runtime.process import lam
from fewstep.runtime.samplers import SAMPLERS, ddim
from fewstep.runtime.times import make_times

from .exact import MIXTURE, SD15

PROCESSES = [SD15, EDM(), RectifiedFlow()]
EVERY = pytest.mark.parametrize("process", PROCESSES, ids=["vp", "edm", "flow"])
ANCESTRAL = ["ddpm", "euler_ancestral", "reverse_chain", "dpmpp_2m_sde", "er_sde", "kdpm2_ancestral"]
RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((2, 5))


def source(seed=1):
    rng = np.random.default_rng(seed)
    return lambda: rng.standard_normal(IMAGE.shape)


def network(x, t):
    """Some smooth network, far from ideal."""
    return np.tanh(1.3 * x) * 0.8 + 0.1 * np.sin(3 * x)


def end(steps):
    *_, last = steps
    return last.x


# image to image


@EVERY
def test_an_image_starts_where_the_forward_process_puts_it(process):
    table, times = from_image("ddim", 10, process, strength=0.4), make_times("auto", 10, process)
    assert len(table.calls) == 4
    assert [call.t for call in table.calls] == times[6:10].tolist()
    assert (table.steps, table.givens) == (4, 1)
    z = source()()
    t = times[6]
    np.testing.assert_allclose(
        table.start(z, [IMAGE]), process.alpha(t) * IMAGE + process.sigma(t) * z, rtol=1e-12
    )


@EVERY
def test_full_strength_runs_the_whole_plan_from_the_same_noise_but_for_what_is_left_of_the_image(process):
    table, plain = from_image("dpmpp_2m", 6, process, strength=1.0), plan("dpmpp_2m", 6, process)
    assert table.calls == plain.calls
    (_, _, sigma), (_, _, alpha) = table.init
    t = table.calls[0].t
    assert (alpha, sigma) == (process.alpha(t), process.sigma(t))
    assert np.hypot(alpha, sigma) == pytest.approx(plain.init[0][2])  # unit data gives the same spread


def test_multistep_samplers_start_anew_on_the_part_that_is_run():
    table, tail = from_image("dpmpp_2m", 10, SD15, strength=0.5), make_times("auto", 10, SD15)[5:]
    assert table.calls == Plan.trace(SAMPLERS["dpmpp_2m"], SD15, tail).calls
    first, plain = table.calls[0].next, plan("ddim", 5, SD15, tail).calls[0].next
    np.testing.assert_allclose([c for *_, c in first], [c for *_, c in plain], rtol=1e-12)


@EVERY
def test_the_less_strength_the_nearer_the_image(process):
    denoise = MIXTURE.denoiser(process)
    found = []
    for strength in (0.1, 0.3, 0.5, 1.0):
        table = from_image("heun", 40, process, strength=strength)
        found.append(
            np.abs(end(table.run(denoise, table.start(source()(), [IMAGE]), None, [IMAGE])) - IMAGE).mean()
        )
    assert found[0] < found[1] < found[2]
    assert found[2] < 1.2 * found[3]
    assert found[0] < 0.25


def test_the_image_comes_after_the_observation():
    process, y = ResidualShift(), source(5)()
    table = from_image("reverse_chain", 4, process, strength=0.5)
    assert table.givens == 2
    shown = []

    def denoise(x, t):
        shown.append((float(t), x))
        return IMAGE

    z = source()()
    list(table.run(denoise, table.start(z, [y, IMAGE]), source(2), [y, IMAGE]))
    t, x = shown[0]
    assert t == 2
    np.testing.assert_allclose(
        x, process.alpha(t) * IMAGE + process.gamma(t) * y + process.sigma(t) * z, rtol=1e-12
    )


@pytest.mark.parametrize("strength", [0.0, -1, 1.1, 0.04, float("nan")])
def test_a_strength_without_a_step_is_refused(strength):
    with pytest.raises(PlanError, match="strength"):
        from_image("ddim", 20, SD15, strength=strength)


def test_image_plans_survive_json():
    table = from_image("unipc", 8, SD15, strength=0.6)
    assert Plan.from_json(json.dumps(table.to_json())) == table


# inpainting


@EVERY
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "tcd", "consistency")])
def test_what_is_known_ends_exactly_as_it_was(process, name):
    try:
        table = plan(name, 6, process)
    except PlanError:
        pytest.skip(f"{name} is not made for this process")
    mask = np.array([1, 1, 0, 0, 0])
    last = end(table.run(keep(network, IMAGE, mask), table.start(source()()), source(2)))
    np.testing.assert_allclose(last[:, :2], IMAGE[:, :2], rtol=1e-9, atol=1e-9)
    assert np.abs(last[:, 2:] - IMAGE[:, 2:]).mean() > 0.1


def test_what_is_painted_follows_what_is_known():
    """Two elements that are always equal: keeping one pulls the other most of the way."""

    def twins(x, t):  # the ideal denoiser of x0 = (a, a), a standard normal
        alpha, sigma = SD15.alpha(t), SD15.sigma(t)
        a = alpha * x.sum(-1, keepdims=True) / (2 * alpha**2 + sigma**2)
        return np.repeat(a, 2, axis=-1)

    known, z = np.array([[1.7, 0.0], [-0.9, 0.0]]), np.array([[0.3, -1.2], [1.0, 0.5]])
    table = plan("dpmpp_2m", 50, SD15)
    free = end(table.run(twins, table.start(z)))
    last = end(table.run(keep(twins, known, np.array([1, 0])), table.start(z)))
    np.testing.assert_array_equal(last[:, 0], known[:, 0])
    assert np.all(np.abs(last[:, 1] - known[:, 0]) < 0.4 * np.abs(free[:, 1] - known[:, 0]))


def test_a_soft_mask_blends():
    half = keep(network, IMAGE, np.full(5, 0.5))
    np.testing.assert_allclose(half(IMAGE, 3.0), (network(IMAGE, 3.0) + IMAGE) / 2)
    assert keep(lambda x, t: x, IMAGE, np.ones(5))(IMAGE.astype(np.float32), 1.0).dtype == np.float32


# edit-friendly noise


@EVERY
@pytest.mark.parametrize("name", ANCESTRAL)
def test_replaying_the_noises_returns_the_image(process, name):
    table = plan(name, 12, process)
    inverted = edit_friendly(table, process, network, IMAGE, source())
    assert len(inverted.noises) == table.noises
    np.testing.assert_allclose(end(inverted.replay(network)), IMAGE, atol=1e-9)


def test_replaying_with_another_network_edits():
    inverted = edit_friendly(plan("ddpm", 12, SD15), SD15, network, IMAGE, source())
    edited = end(inverted.replay(lambda x, t: network(x, t) + 0.3))
    assert 0.05 < np.abs(edited - IMAGE).mean() < 1


def test_states_on_the_way_are_independent_draws_around_the_image():
    """What makes these noises good to edit with: each state is the image with noise of its own."""
    process, n = SD15, 4000
    image = np.full(n, 0.8)
    rng = np.random.default_rng(4)
    table = plan("ddpm", 5, process)
    inverted = edit_friendly(table, process, network, image, lambda: rng.standard_normal(n))
    states = [inverted.start, *(step.x for step in inverted.replay(network))][:5]
    noise = [
        (x - process.alpha(c.t) * image) / process.sigma(c.t)
        for x, c in zip(states, table.calls, strict=True)
    ]
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(5), atol=0.06)
    np.testing.assert_allclose(np.std(noise, axis=1), 1, atol=0.05)


def test_the_noises_of_a_process_with_an_observation_replay_too():
    process, y = MeanReverting(), source(9)()
    table = plan("reverse_chain", 10, process)
    inverted = edit_friendly(table, process, network, IMAGE, source(), (y,))
    assert len(inverted.given) == 2
    np.testing.assert_allclose(end(inverted.replay(network)), IMAGE, atol=1e-9)


def test_policies_are_part_of_the_inversion():
    table = with_policies(plan("ddpm", 6, SD15), Clip(0.5))
    inverted = edit_friendly(table, SD15, network, IMAGE, source())
    np.testing.assert_allclose(end(inverted.replay(network)), IMAGE, atol=1e-9)
    assert Plan.from_json(json.dumps(inverted.plan.to_json())) == inverted.plan


def test_a_deterministic_plan_has_no_noise_to_solve_for():
    with pytest.raises(PlanError, match="no fresh noise"):
        edit_friendly(plan("ddim", 5, SD15), SD15, network, IMAGE, source())


# DDCM


@EVERY
def test_equal_prompts_reproduce_the_source(process):
    times = make_times("auto", 6, process)
    steps = list(ddcm(process, times, network, network, IMAGE, source()))
    assert len(steps) == 6
    np.testing.assert_allclose(steps[-1].x, IMAGE, rtol=1e-12)


def test_ddcm_is_the_published_noise_formula():
    """eps_edit = eps_target - eps_source + eps_consistent, turned into the clean sample; spelled out for two steps."""
    times, fresh = np.array([800.0, 400.0, 0.0]), source(3)
    target = lambda x, t: network(x, t) + 0.2 * np.cos(x)  # noqa: E731
    got = [step.x for step in ddcm(SD15, times, network, target, IMAGE, source(3))]
    edited = IMAGE
    for t, found in zip(times[:-1], got, strict=True):
        a, s, z = float(SD15.alpha(t)), float(SD15.sigma(t)), fresh()
        z_source, z_target = a * IMAGE + s * z, a * edited + s * z
        eps = lambda x, x0, a=a, s=s: (x - a * x0) / s  # noqa: E731
        consistent = (z_source - a * IMAGE) / s
        eps_edit = eps(z_target, target(z_target, t)) - eps(z_source, network(z_source, t)) + consistent
        edited = (z_target - s * eps_edit) / a
        np.testing.assert_allclose(found, edited, rtol=1e-10, atol=1e-12)


def test_ddcm_moves_the_image_as_the_prompts_differ():
    """Ideal networks of two points: the edit is their difference, whatever the image."""
    steps = ddcm(
        SD15, make_times("auto", 4, SD15), lambda x, t: 0 * x + 0.1, lambda x, t: 0 * x + 0.5, IMAGE, source()
    )
    np.testing.assert_allclose(end(steps), IMAGE + 0.4, rtol=1e-12)


# inversion that sampling undoes


@pytest.mark.parametrize("process", [SD15, EDM()], ids=["vp", "edm"])
def test_implicit_inversion_is_undone_by_ddim(process):
    denoise, found = MIXTURE.denoiser(process), []
    ends = lam(process, np.array([process.t_max * 0.5, process.t_max * 1e-3]))
    times = np.append(process.t_of_lam(np.linspace(*ends, 25)), 0.0)
    for iterations in (1, 3, 30):
        table = implicit_inversion(process, times[::-1], iterations=iterations)
        noise = end(table.run(denoise, table.start(IMAGE, [IMAGE]), None, [IMAGE]))
        back = end(Plan.trace(partial(ddim, eta=0.0), process, times).run(denoise, noise))
        found.append(np.abs(back - IMAGE).max())
    assert found[2] < 1e-6
    assert found[2] < found[1] < found[0]

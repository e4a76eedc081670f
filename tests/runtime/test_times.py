"""Time grids: their closed forms, what diffusers computes for the same configuration, and what they refuse."""

import inspect
import math
from functools import partial

import numpy as np
import pytest

from fewstep.model.schedulers import grid_of, process_of
from fewstep.runtime import EDM, DiscreteVP, RectifiedFlow, grids, plan
from fewstep.runtime.errors import PlanError
from fewstep.runtime.grids.betadist import beta_ppf
from fewstep.runtime.grids.levels import MAX_LEVEL
from fewstep.runtime.manifest import SPACINGS, DynamicShift, GridSpec
from fewstep.runtime.process import lam
from fewstep.runtime.times import GRIDS, make_times

from .exact import SD15

FLOW = RectifiedFlow()
PROCESSES = {"vp": SD15, "edm": EDM(), "svd": EDM(sigma_max=700.0), "flow": FLOW}


def zero_terminal_snr():
    """SD-1.5's levels, shifted and scaled to end at alpha 0. Lin et al. 2023, algorithm 1 <arXiv:2305.08891>."""
    alpha = np.sqrt(SD15.alphas_cumprod)
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return DiscreteVP.from_betas(1 - alpha**2 / np.append(1.0, alpha[:-1] ** 2))


PROCESSES["zero_snr"] = zero_terminal_snr()


def serves(name, kind):
    """Which processes a grid is for, as the table in docs/schedulers.md has it."""
    if name.startswith("ays"):
        return kind == "svd" or (kind in ("vp", "edm") and name != "ays_svd") or kind == "zero_snr"
    if name == "shifted":
        return kind == "flow"
    discrete = ("linspace_levels", "lcm", "tcd", "pcm", "turbo", "lightning", "hyper", "dmd2")
    return name not in discrete or kind in ("vp", "zero_snr")


ONLY = {"turbo": (1, 2, 3, 4), "lightning": (1, 2, 4, 8), "hyper": (1, 2, 4, 8, 12, 16), "dmd2": (1, 2, 3, 4)}
BELOW_1000 = ("lcm", "tcd", "pcm", "leading_open", "linspace_open", *ONLY)


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name", ["auto", *GRIDS])
def test_a_grid_falls_from_noise_to_clean_at_any_number_of_steps(name, kind):
    process = PROCESSES[kind]
    if not serves(name, kind):
        with pytest.raises(PlanError, match="time grid"):
            make_times(name, 1, process)
        return
    for steps in ONLY.get(name, (*range(1, 51), *(() if name in BELOW_1000 else (1000,)))):
        times = make_times(name, steps, process)
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        assert np.all(np.diff(times) < 0)
        assert times[0] <= process.t_max


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("name", GRIDS)
def test_one_step_starts_from_noise(name, kind):
    """Not at the first level, where some of diffusers' grids start when asked for one step."""
    if not serves(name, kind):
        return
    process = PROCESSES[kind]
    elsewhere = {"hyper": 801.0, "dmd2": 400.0, "leading": 1.0, "leading_open": process.t_max / 2}
    if name == "leading_open" and kind in ("vp", "zero_snr"):
        elsewhere[name] = 501.0
    if name == "leading" and kind not in ("vp", "zero_snr"):
        elsewhere[name] = process.t_max
    start = make_times(name, 1, process)[0]
    if name.startswith("ays"):
        assert process.sigma(start) / process.alpha(start) == pytest.approx(
            min(grids.AYS[name[4:]][0], process.sigma(process.t_max) / process.alpha(process.t_max))
        )
    else:
        assert start == elsewhere.get(name, process.t_max)


def test_discrete_grids_land_on_trained_levels():
    for name in ("trailing", "leading", "leading_open", "linspace_levels", "linspace_open", "lcm", "pcm"):
        times = make_times(name, 7, SD15)
        np.testing.assert_array_equal(times, np.round(times), err_msg=name)


def test_a_thousand_steps_visit_every_level():
    np.testing.assert_array_equal(make_times("trailing", 1000, SD15), np.arange(1000, -1, -1))


# closed forms


def levels(process, times):
    return process.sigma(times) / process.alpha(times)


@pytest.mark.parametrize("process", [SD15, EDM()], ids=["vp", "edm"])
def test_karras_levels_are_even_after_the_root(process):
    for rho in (7.0, 3.0):
        found = levels(process, make_times(partial(grids.karras, rho=rho), 9, process)[:-1]) ** (1 / rho)
        np.testing.assert_allclose(np.diff(found), np.diff(found)[0], rtol=1e-9)


@pytest.mark.parametrize("name", ["logsnr", "lu", "exponential"])
@pytest.mark.parametrize("process", [SD15, EDM()], ids=["vp", "edm"])
def test_log_snr_is_even(process, name):
    steps = np.diff(lam(process, make_times(name, 9, process)[:-1]))
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


def test_exponential_on_a_flow_is_even_in_the_logarithm_of_t():
    np.testing.assert_allclose(make_times("exponential", 4, FLOW), [1, 0.1, 0.01, 0.001, 0], rtol=1e-12)


@pytest.mark.parametrize("process", [FLOW, zero_terminal_snr()], ids=["flow", "zero_snr"])
@pytest.mark.parametrize("name", ["logsnr", "karras", "exponential", "beta"])
def test_where_alpha_reaches_0_the_grid_counts_its_level_as_float16_would(process, name):
    """diffusers' alpha^2 = 2^-24; the first time itself is where alpha is 0."""
    times = make_times(name, 9, process)
    assert times[0] == process.t_max
    if name == "logsnr":
        gaps = np.diff(np.append(-math.log(MAX_LEVEL), lam(process, times[1:-1])))
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)


@pytest.mark.parametrize("process", [SD15, EDM(), FLOW], ids=["vp", "edm", "flow"])
def test_arctan_is_even_in_the_angle(process):
    for c in (0.5, 1.5):
        times = make_times(partial(grids.arctan, c=c), 9, process)[:-1]
        angle = np.arctan2(process.sigma(times), c * process.alpha(times))
        np.testing.assert_allclose(np.diff(angle), np.diff(angle)[0], rtol=1e-9)


def test_arctan_assumes_the_spread_of_data_that_edm_does():
    named, stated = (make_times(g, 5, EDM()) for g in ("arctan", partial(grids.arctan, c=EDM().sigma_data)))
    np.testing.assert_array_equal(named, stated)


def test_arctan_is_the_best_grid_of_one_inner_time_for_ddim_on_a_gaussian():
    """N(0, c^2) data: two DDIM steps from t_max to the end; no inner level does better than arctan's."""
    process, c = EDM(sigma_min=0.01), 0.5

    def scale(level):  # what two Euler steps multiply x by, on the ideal denoiser x c^2 / (c^2 + s^2)
        steps = [(process.t_max, level), (level, process.sigma_min)]
        return math.prod(1 + (b - a) * a / (c**2 + a**2) for a, b in steps)

    exact = math.hypot(c, process.sigma_min) / math.hypot(c, process.t_max)
    best = make_times(partial(grids.arctan, c=c), 3, process)[1]
    error = abs(scale(best) - exact)
    assert all(abs(scale(best * f) - exact) > error for f in (0.8, 0.9, 1.1, 1.25))


def test_quadratic_is_even_in_the_square_root():
    for process in (SD15, EDM(), FLOW):
        root = np.sqrt(make_times("quadratic", 9, process)[:-1])
        np.testing.assert_allclose(np.diff(root), np.diff(root)[0], rtol=1e-9)


def test_sgm_uniform_is_even_in_the_networks_timestep_and_leaves_the_first_level_out():
    for process in (SD15, EDM(), FLOW):
        timesteps = process.timestep(make_times("sgm_uniform", 9, process)[:-1])
        low = process.timestep({SD15: 1.0, FLOW: 1e-3}.get(process, 0.002))
        np.testing.assert_allclose(np.diff(np.append(timesteps, low)), np.diff(timesteps)[0], rtol=1e-9)


def test_shifted_times_divide_the_odds_of_clean_by_the_shift():
    """t' / (1 - t') = s t / (1 - t)."""
    even, t = (make_times(name, 8, FLOW)[1:-1] for name in ("trailing", partial(grids.shifted, shift=5.0)))
    np.testing.assert_allclose(t / (1 - t), 5 * even / (1 - even), rtol=1e-12)


def test_linear_quadratic_is_a_line_that_runs_smoothly_into_a_parabola():
    for steps in (2, 3, 10, 50):
        gone = 1 - make_times("linear_quadratic", steps, FLOW)
        half = steps // 2
        np.testing.assert_allclose(gone[: half + 1], np.arange(half + 1) * 0.025 / half, atol=1e-12)
        assert gone[-1] == 1
        third = np.diff(gone[half:], 3)
        np.testing.assert_allclose(third, 0, atol=1e-12)


@pytest.mark.parametrize(("name", "process"), [("sd15", SD15), ("sdxl", SD15), ("svd", EDM(sigma_max=700.0))])
def test_align_your_steps_is_the_published_table_at_ten_steps(name, process):
    from diffusers.schedulers import AysSchedules

    key = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}[name]
    times = make_times(f"ays_{name}", 10, process)
    # the first knot, 14.615, rounds SD-1.5's last level, 14.6146
    np.testing.assert_allclose(levels(process, times), AysSchedules[f"{key}Sigmas"], rtol=3e-5)
    np.testing.assert_allclose(levels(process, times)[1:], AysSchedules[f"{key}Sigmas"][1:], rtol=1e-9)


def test_align_your_steps_at_twenty_steps_puts_geometric_means_between_its_knots():
    ten, twenty = (levels(SD15, make_times("ays_sdxl", n, SD15)[:-1]) for n in (10, 20))
    np.testing.assert_allclose(twenty[2::2], ten[1:], rtol=1e-9)
    np.testing.assert_allclose(twenty[3:-1:2], np.sqrt(ten[1:-1] * ten[2:]), rtol=1e-9)
    assert twenty[-1] == pytest.approx(math.sqrt(0.113 * 0.029))


def test_phases_of_pcm_start_at_the_top_and_at_every_edge():
    np.testing.assert_array_equal(make_times("pcm", 4, SD15), [1000, 740, 500, 240, 0])
    np.testing.assert_array_equal(make_times("pcm", 2, SD15), [1000, 500, 0])
    np.testing.assert_array_equal(make_times("pcm", 50, SD15), make_times("lcm", 50, SD15))


def test_distilled_models_are_asked_at_the_timesteps_they_know():
    def timesteps(name, steps):
        return SD15.timestep(make_times(name, steps, SD15)[:-1]).tolist()

    for name in ("turbo", "lightning", "hyper", "dmd2"):
        assert timesteps(name, 4) == [999, 749, 499, 249]
    assert timesteps("lightning", 1) == [999]
    assert timesteps("hyper", 1) == [800]
    assert timesteps("dmd2", 1) == [399]
    assert timesteps("lcm", 4) == timesteps("tcd", 4) == [999, 759, 499, 259]


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.5, 2.0), (3.0, 1.5), (1.0, 1.0), (10.0, 0.3)])
def test_quantiles_of_the_beta_distribution(a, b):
    from scipy.stats import beta

    p = np.append(np.linspace(0, 1, 301), [1e-6, 1 - 1e-6])
    np.testing.assert_allclose(beta_ppf(p, a, b), beta.ppf(p, a, b), rtol=0, atol=1e-10)


# what the model itself says


def test_auto_is_the_models_own_grid():
    own = GridSpec(spacing="karras", rho=5.0)
    np.testing.assert_array_equal(
        make_times("auto", 5, SD15, own), make_times(partial(grids.karras, rho=5.0), 5, SD15)
    )
    assert make_times("auto", 2, SD15)[1] == 500  # trailing
    assert make_times("auto", 2, FLOW)[1] == pytest.approx(0.001)  # linspace
    assert np.array_equal(make_times("auto", 5, EDM()), make_times("karras", 5, EDM()))


def test_every_grid_can_be_a_models_own():
    assert set(SPACINGS) == {"auto", *GRIDS}


def test_every_option_of_a_grid_is_reached_by_partial():
    for grid in GRIDS.values():
        function = grid.func if isinstance(grid, partial) else grid
        kinds = {p.kind for p in list(inspect.signature(function).parameters.values())[3:]}
        assert kinds <= {inspect.Parameter.KEYWORD_ONLY}
    low, high = levels(
        SD15, make_times(partial(grids.karras, sigma_min=0.1, sigma_max=10.0), 5, SD15)[[4, 0]]
    )
    assert (low, high) == (pytest.approx(0.1), pytest.approx(10.0))


def test_a_plan_takes_a_name_a_function_or_the_times_themselves():
    by_name = plan("ddim", 5, SD15, "karras")
    assert by_name == plan("ddim", 5, SD15, grids.karras)
    assert by_name == plan("ddim", 5, SD15, make_times("karras", 5, SD15))
    assert by_name == plan(
        "ddim", 5, SD15, lambda steps, process, grid: make_times("karras", steps, process)[:-1]
    )


def test_samplers_of_distilled_models_take_their_grid_where_there_is_one():
    for sampler in ("lcm", "tcd"):
        assert [call.timestep for call in plan(sampler, 4, SD15).calls] == [999, 759, 499, 259]
        assert plan(sampler, 4, SD15, "trailing").calls[1].timestep == 749


def test_the_end_is_clean_or_the_first_level():
    clean, ddim_only, all_of_them = (GridSpec(final=final) for final in ("clean", "first", "sigma_min"))
    for sampler, spec, end in [
        ("ddim", clean, 0),
        ("ddim", ddim_only, 1),
        ("dpmpp_2m", ddim_only, 0),
        ("dpmpp_2m", all_of_them, 1),
    ]:
        last = plan(sampler, 4, SD15, grid=spec)
        ends = plan(sampler, 4, SD15, np.append(make_times("trailing", 4, SD15)[:-1], float(end)))
        assert last == ends
    # nothing is left between a grid that reaches the first level itself and that level
    assert make_times("karras", 5, SD15, all_of_them)[-1] == 0


def test_the_shift_of_an_image_grows_with_its_tokens():
    """Flux: mu 0.5 at 256 tokens, 1.15 at 4096."""
    spec = GridSpec(dynamic=DynamicShift())
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert grids.at_resolution(spec, tokens).shift == pytest.approx(math.exp(mu))
        linear = GridSpec(dynamic=DynamicShift(kind="linear"))
        assert grids.at_resolution(linear, tokens).shift == pytest.approx(mu)
    assert grids.at_resolution(GridSpec(shift=3.0), 4096).shift == 3.0


# the same numbers as diffusers

BETAS = {
    "sd15": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {
        "beta_schedule": "linear",
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
}
STEPS = (1, 2, 3, 7, 10, 20, 30, 50)


def configurations():
    spacings = [{"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")]
    over_levels = [{f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")]
    both = [{**spacing, "use_karras_sigmas": True} for spacing in spacings[1:]]
    ends = [{"final_sigmas_type": final} for final in ("zero", "sigma_min")]
    for name, options, finals in [
        ("DPMSolverMultistep", [*spacings, *over_levels, *both, {"use_lu_lambdas": True}], ends),
        ("DPMSolverSinglestep", [{}, *over_levels], [{}]),
        ("UniPCMultistep", [*spacings, *over_levels, *both], ends),
        ("SASolver", [*spacings, *over_levels], [{}]),
        ("DEISMultistep", [*spacings, *over_levels, *both], [{}]),
        ("EulerDiscrete", [*spacings, *over_levels, *both], ends),
        ("EulerAncestralDiscrete", spacings, [{}]),
        ("HeunDiscrete", [*spacings, *over_levels, *both], [{}]),
        ("LMSDiscrete", [*spacings, *over_levels], [{}]),
    ]:
        for option in (option | final for option in options for final in finals):
            yield pytest.param(name, option, id="-".join([name, *map(str, option.values())]))


def built(name, **config):
    """A diffusers scheduler, and the process of its very levels, which are a float32 product of many factors."""
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    alphas = scheduler.alphas_cumprod.double().numpy().copy()
    if config.get("rescale_betas_zero_snr"):
        alphas[-1] = 0.0  # diffusers has 2^-24 here
    return scheduler, DiscreteVP(alphas)


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize(("name", "options"), list(configurations()))
def test_levels_are_diffusers(name, options, betas):
    scheduler, process = built(name, **BETAS[betas], **options)
    grid = grid_of(scheduler)
    if betas == "zero_snr" and "rescale_betas_zero_snr" not in inspect.signature(type(scheduler)).parameters:
        return
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        if steps == 1 and (grid.spacing == "linspace" or grid.ends in ("linspace", "leading")):
            continue  # diffusers starts at the first level; see test_one_step_starts_from_noise
        sigmas = scheduler.sigmas.double().numpy()
        if name == "HeunDiscrete":  # all but the first twice, for its second calls
            sigmas = sigmas[[0, *range(1, len(sigmas), 2)]]
        times = make_times("auto", steps, process, grid)
        if grid.final == "sigma_min" and sigmas[-2] <= sigmas[-1] * (1 + 1e-6):
            times, sigmas = times[:-1], sigmas[:-1]  # its last step goes nowhere; ours goes to clean
        if betas == "zero_snr" and times[0] == process.t_max:
            times, sigmas = times[1:], sigmas[1:]
        np.testing.assert_allclose(
            levels(process, times), sigmas, rtol=1e-6, atol=1e-12, err_msg=f"{steps} steps"
        )


@pytest.mark.parametrize("betas", ["sd15", "cosine"])
@pytest.mark.parametrize(
    ("name", "options"),
    [c for c in configurations() if c.values[0] in ("DPMSolverMultistep", "EulerDiscrete")],
)
def test_the_networks_timestep_is_diffusers_to_a_tenth_of_a_level_or_to_its_rounding(name, options, betas):
    """diffusers interpolates log sigma between levels where we interpolate log alpha, so equal noise has times that
    differ; some of its schedulers then round or cut them to whole numbers."""
    scheduler, process = built(name, **BETAS[betas], **options)
    grid = grid_of(scheduler)
    for steps in STEPS[1:]:
        scheduler.set_timesteps(steps)
        ours = process.timestep(make_times("auto", steps, process, grid)[:-1])
        whole = name == "DPMSolverMultistep"
        assert np.abs(ours - scheduler.timesteps.double().numpy()).max() < (1.09 if whole else 0.09)


def test_timesteps_of_schedulers_without_levels_are_diffusers():
    import diffusers

    for name in ("DDIM", "DDPM", "LCM", "TCD"):
        for spacing in ("linspace", "leading", "trailing"):
            scheduler = getattr(diffusers, f"{name}Scheduler")(timestep_spacing=spacing, steps_offset=1)
            grid = grid_of(scheduler)
            for steps in STEPS[spacing == "linspace" :]:  # one step of linspace starts at the first level
                scheduler.set_timesteps(steps)
                ours = SD15.timestep(make_times("auto", steps, SD15, grid)[:-1])
                np.testing.assert_array_equal(
                    ours, scheduler.timesteps.numpy(), err_msg=f"{name} {spacing} {steps}"
                )


@pytest.mark.parametrize("spacing", ["even", "karras", "exponential", "beta"])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, "exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_times_of_a_flow_are_diffusers(spacing, shift, terminal):
    from diffusers import FlowMatchEulerDiscreteScheduler

    options = {f"use_{spacing}_sigmas": True} if spacing != "even" else {}
    dynamic = isinstance(shift, str)
    options |= {"use_dynamic_shifting": True, "time_shift_type": shift} if dynamic else {"shift": shift}
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=terminal, **options)
    for tokens in (256, 1000) if dynamic else (0,):
        grid = grids.at_resolution(grid_of(scheduler), tokens)
        mu = {"mu": math.log(grid.shift) if shift == "exponential" else grid.shift} if dynamic else {}
        for steps in STEPS:
            if terminal and steps == 1:
                continue  # diffusers divides by zero
            scheduler.set_timesteps(steps, **mu)
            times = make_times("auto", steps, FLOW, grid)
            np.testing.assert_allclose(times, scheduler.sigmas.double().numpy(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "name", ["UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep"]
)
def test_times_of_a_flow_in_the_dpm_solver_family_are_diffusers(name, shift):
    config = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
    scheduler, _ = built(name, **config)
    assert process_of(scheduler) == FLOW
    for steps in STEPS:
        scheduler.set_timesteps(steps)
        times = make_times("auto", steps, FLOW, grid_of(scheduler))[:-1]
        # UniPC starts 1e-6 short of 1; DEIS ends by repeating its last level, we on clean
        np.testing.assert_allclose(times, scheduler.sigmas.double().numpy()[:-1], rtol=1.1e-6)


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_levels_of_edm_are_diffusers(name, spacing):
    import diffusers

    scheduler = getattr(diffusers, f"{name}Scheduler")(sigma_schedule=spacing, rho=5.0)
    process = process_of(scheduler)
    for steps in STEPS[1:]:  # one step of its exponential starts at sigma_min
        scheduler.set_timesteps(steps)
        times = make_times("auto", steps, process, grid_of(scheduler))
        np.testing.assert_allclose(times, scheduler.sigmas.double().numpy(), rtol=3e-6)


def test_options_that_a_scheduler_does_not_read_are_not_its_grid():
    """diffusers keeps the whole of another scheduler's config when one is made from it."""
    for name, spacing in [
        ("DDIM", "leading"),
        ("EulerAncestralDiscrete", "leading"),
        ("DPMSolverSinglestep", "karras"),
    ]:
        config = {"timestep_spacing": "leading", "use_karras_sigmas": True, "use_flow_sigmas": name == "DDIM"}
        scheduler, _ = built(name, **config)
        assert grid_of(scheduler).spacing == spacing
        assert isinstance(process_of(scheduler), DiscreteVP)


# what is refused


@pytest.mark.parametrize("steps", [0, -1, 10**6, 2.5, True, "20"])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(PlanError, match="1 to 1000"):
        plan("ddim", steps, SD15)
    with pytest.raises(PlanError, match="1 to 1000"):
        make_times("trailing", steps, SD15)


@pytest.mark.parametrize(("name", "near"), [("karas", "karras"), ("ays", "ays_s"), ("linespace", "linspace")])
def test_an_unknown_grid_names_the_nearest(name, near):
    with pytest.raises(PlanError, match=f"time grid '{name}'.*did you mean .*{near}"):
        plan("ddim", 5, SD15, name)


def test_times_that_rise_repeat_or_leave_the_process_are_refused():
    for times, what in [
        ([500.0, 600.0, 0.0], "repeat or rise"),
        ([500.0, 500.0, 0.0], "repeat or rise"),
        ([1001.0, 500.0, 0.0], "times from 1001 to 0; expected times within 0 and 1000"),
        ([500.0, 5.0, -1.0], "within 0 and 1000"),
        ([500.0, math.nan, 0.0], "finite"),
        ([900.0, 0.0], "2 times for 2 steps; expected 3 times"),
    ]:
        with pytest.raises(PlanError, match=what):
            plan("ddim", 2, SD15, times)


def test_more_steps_than_a_grid_tells_apart_are_refused():
    small = DiscreteVP.from_schedule("linear", 1e-4, 0.02, 10)
    for name in ("trailing", "leading", "linspace_open", "linspace_levels"):
        with pytest.raises(PlanError, match="use fewer steps or another time grid"):
            make_times(name, 11, small)
    for name, expected in [("lcm", "at most 50"), ("pcm", "at most 50"), ("lightning", "1, 2, 4 or 8")]:
        with pytest.raises(PlanError, match=f"51 steps on the {name} grid; expected {expected}"):
            make_times(name, 51, SD15)


def test_a_function_must_give_one_time_a_step():
    with pytest.raises(PlanError, match=r"times of shape \(6,\) for 5 steps"):
        make_times(lambda steps, process, grid: np.arange(steps, -1, -1.0), 5, SD15)


def test_a_table_beyond_the_process_is_refused():
    with pytest.raises(PlanError, match=r"ays from noise level 700 .* levels of at most 14\.61"):
        make_times("ays_svd", 10, SD15)


def test_levels_that_do_not_fall_are_refused():
    with pytest.raises(PlanError, match="sigma_max above sigma_min"):
        make_times(partial(grids.karras, sigma_min=20.0), 5, SD15)

"""Ways to lay out a sampler's times: one grid, one function.

A grid is called with (steps, process, grid) and returns [steps] falling process times, noisiest first; `make_times`
appends where the sample ends. Options are keyword-only, for functools.partial: partial(karras, rho=5.0). GRIDS at the
end has them all by name.

Where a grid is laid out over noise levels, a level is sigma / alpha for a discrete or EDM process and t itself for
rectified flow, as diffusers has it; `log_snr_even` and `arctan` take sigma / alpha for all three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from .betadist import beta_ppf
from .errors import PlanError
from .manifest import GridSpec
from .process import EDM, Array, DiscreteVP, Process, RectifiedFlow

Grid = Callable[[int, Process, GridSpec], Array]

MAX_LEVEL = math.sqrt(2**24 - 1)
"""Where alpha reaches 0, its noise level counts as this: alpha^2 = 2^-24, the smallest positive float16 that diffusers
puts in its place (EulerDiscreteScheduler, rescale_betas_zero_snr). The time itself stays t_max."""

LEVELS = 1000
"""Noise levels of a rectified flow's schedule in diffusers (num_train_timesteps), which set its cleanest time."""


def trailing(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the last noise level down, never at the first. Lin et al. 2023, table 2 <arXiv:2305.08891>."""
    top = grid.sigma_max if _is_flow(process) and grid.sigma_max else process.t_max
    return _finish(top - np.arange(steps) * (top / steps), process, grid)


def leading(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the first noise level up, short of the last; Stable Diffusion 1.x's habit, with steps_offset 1."""
    n = process.t_max
    if not is_discrete(process):
        return _finish(np.arange(steps, 0, -1) * (n / steps), process, grid)
    return np.asarray(np.arange(steps)[::-1] * np.floor(n / steps) + grid.steps_offset + 1.0)


def leading_open(steps: int, process: Process, grid: GridSpec) -> Array:
    """`leading` with one step more, its cleanest left out: what the DPM-Solver family means by it in diffusers."""
    n = process.t_max
    if not is_discrete(process):
        return _finish(np.arange(steps, 0, -1) * (n / (steps + 1)), process, grid)
    return np.asarray(np.arange(steps, 0, -1) * np.floor(n / (steps + 1)) + grid.steps_offset + 1.0)


def linspace(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the last noise level to the first, both included.

    A discrete process is asked between its levels, at the noise that linear interpolation gives (diffusers' Euler).
    """
    if not isinstance(process, DiscreteVP):
        return _finish(np.linspace(process.t_max, _t_min(process, grid), steps), process, grid)
    t = np.linspace(process.t_max, 1.0, steps)
    below = np.floor(t)
    part, above = t - below, np.minimum(below + 1, process.t_max)
    level = (1 - part) * _level(process, below) + part * _level(process, above)
    return np.where(part == 0, t, _at(process, level))


def linspace_levels(steps: int, process: Process, grid: GridSpec) -> Array:
    """`linspace` rounded onto trained levels: what DDIM, DDPM and PNDM mean by it in diffusers."""
    _need(is_discrete(process), "linspace_levels", process, "a discrete model")
    if steps == 1:  # diffusers starts at the first level here, where nothing is left to draw
        return np.full(1, process.t_max)
    return np.round(np.linspace(0.0, process.t_max - 1, steps))[::-1] + 1


def linspace_open(steps: int, process: Process, grid: GridSpec) -> Array:
    """`linspace_levels` with one step more, its cleanest left out: the DPM-Solver family in diffusers."""
    if not is_discrete(process):
        return _finish(np.linspace(process.t_max, _lowest(process), steps + 1)[:-1], process, grid)
    return np.asarray(np.round(np.linspace(0.0, process.t_max - 1, steps + 1))[:0:-1] + 1)


def sgm_uniform(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in the network's timestep from the last level to the first, the first left out; ComfyUI's sgm_uniform."""
    low = _lowest(process)
    if isinstance(process, EDM):  # its timestep is a logarithm
        return np.asarray(np.geomspace(process.t_max, low, steps + 1)[:-1])
    t = np.linspace(process.t_max, low, steps + 1)[:-1]
    return _finish(t, process, grid) if _is_flow(process) else t


def quadratic(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in the square root of t: denser near clean. Song, Meng and Ermon 2020, appendix D.2 <arXiv:2010.02502>."""
    t = np.linspace(math.sqrt(process.t_max), math.sqrt(_t_min(process, grid)), steps) ** 2
    t = np.minimum(t, process.t_max)
    return _finish(t, process, grid, whole=False)


def karras(
    steps: int,
    process: Process,
    grid: GridSpec,
    *,
    rho: float = 0.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Levels even after the rho-th root; rho 7 unless the model says. Karras et al. 2022, eq. 5 <arXiv:2206.00364>."""
    rho = rho or grid.rho
    high, low = _ends(steps, process, grid, sigma_min, sigma_max)
    return _at(process, np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho)


def exponential(
    steps: int,
    process: Process,
    grid: GridSpec,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Levels even in their logarithm: on a discrete or EDM process the same as `log_snr_even`."""
    high, low = _ends(steps, process, grid, sigma_min, sigma_max)
    return _at(process, np.exp(np.linspace(math.log(high), math.log(low), steps)))


def beta(
    steps: int,
    process: Process,
    grid: GridSpec,
    *,
    a: float = 0.6,
    b: float = 0.6,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Levels at quantiles of Beta(a, b), dense at both ends. Lee et al. 2024, a = b = 0.6 <arXiv:2407.12173>.

    Over levels, as diffusers has it; the paper and ComfyUI lay the quantiles out over timesteps.
    """
    high, low = _ends(steps, process, grid, sigma_min, sigma_max)
    return _at(process, low + beta_ppf(1 - np.linspace(0, 1, steps), a, b) * (high - low))


def log_snr_even(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in log(alpha / sigma). Lu et al. 2022, section 3.3 <arXiv:2206.00927>."""
    high, low = np.log(_ratio(process, np.array([process.t_max, _t_min(process, grid)])))
    return _at_ratio(process, np.exp(np.linspace(high, low, steps)))


def arctan(steps: int, process: Process, grid: GridSpec, *, c: float = 0.5) -> Array:
    """Even in arctan(sigma / (alpha c)): the exact optimum of first order on N(0, c^2) data.

    Sabour, Fidler and Kreis 2024, the Gaussian case <arXiv:2404.14507>. c is the data's standard deviation; 0.5 is
    EDM's sigma_data.
    """
    high, low = np.arctan(_ratio(process, np.array([process.t_max, _t_min(process, grid)]), top=np.inf) / c)
    return _at_ratio(process, c * np.tan(np.linspace(high, low, steps)))


def ays(steps: int, process: Process, grid: GridSpec, *, knots: tuple[float, ...]) -> Array:
    """Align Your Steps: published noise levels of ten steps, other numbers by interpolation of their logarithm.

    Sabour, Fidler and Kreis 2024 <arXiv:2404.14507>; the last of the knots only serves interpolation.
    """
    top = float(_ratio(process, process.t_max))
    _need(not _is_flow(process), "ays", process, "a discrete or EDM model: no table is published for flows")
    # the table is rounded to three digits
    _need(
        knots[0] <= top * 1.001, f"ays from noise level {knots[0]:g}", process, f"levels of at most {top:.4g}"
    )
    place = np.linspace(0, len(knots) - 1, steps + 1)[:-1]
    return _at(process, np.exp(np.interp(place, np.arange(len(knots)), np.log(knots))))


def linear_quadratic(steps: int, process: Process, grid: GridSpec, *, threshold: float = 0.025) -> Array:
    """Half of the steps evenly through the first `threshold` of the noise, the rest quadratically to clean.

    Genmo 2024, Mochi 1 (infer.py); LTX has the same. Over levels, as ComfyUI scales it to other processes.
    """
    half = steps // 2
    if half == 0:
        return np.full(1, process.t_max)
    i, rest = np.arange(steps, dtype=np.float64), steps - half
    # the parabola meets the line at `half` and reaches 1 at `steps`
    lag = half - threshold * steps
    curve = lag / (half * rest**2)
    slope = threshold / half - 2 * lag / rest**2
    gone = np.where(i < half, i * threshold / half, curve * (i**2 + half**2) + slope * i)
    return _at(process, float(_level(process, process.t_max)) * (1 - gone))


def shifted(steps: int, process: Process, grid: GridSpec, *, shift: float = 0.0) -> Array:
    """Rectified flow, even and then shifted towards noise. Esser et al. 2024, section 5.3.2 <arXiv:2403.03206>.

    shift  s in t' = s t / (1 + (s - 1) t); the model's own, or SD3's 3 where it has none; see `resolution_shift`
    """
    _need(_is_flow(process), "shifted", process, "a rectified flow")
    own = grid.shift if grid.shift != 1.0 else 3.0
    return trailing(steps, process, replace(grid, shift=shift or own))


def lcm_times(steps: int, process: Process, grid: GridSpec) -> Array:
    """The grid LCMs are distilled on: every 20th of 1000 levels. Luo et al. 2023, section 4.3 <arXiv:2310.04378>.

    TCD, Zheng et al. 2024 <arXiv:2402.19159>, takes the same steps.
    """
    _need(isinstance(process, DiscreteVP), "lcm", process, "a discrete model")
    _steps(steps, range(1, 51), "lcm", "at most 50, the levels LCMs are distilled on")
    levels = np.arange(1, 51)[::-1] * (process.t_max // 50)
    return np.asarray(levels[np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)])


def pcm(steps: int, process: Process, grid: GridSpec) -> Array:
    """From the edge of one phase to that of the next, `steps` phases on LCM's 50 levels.

    Wang et al. 2024, phased consistency <arXiv:2405.18407>: a student of M phases jumps exactly from edge to edge.
    """
    _need(isinstance(process, DiscreteVP), "pcm", process, "a discrete model")
    _steps(steps, range(1, 51), "pcm", "at most 50, the levels phases are made of")
    edges = np.floor(np.linspace(0, 50, steps, endpoint=False))[:0:-1]
    return np.append(50.0, edges) * (process.t_max // 50)


def distilled(
    steps: int, process: Process, grid: GridSpec, *, name: str, only: tuple[int, ...], single: float = 0.0
) -> Array:
    """`trailing`, for the numbers of steps a family of distilled models exists in.

    single  the network's timestep of the model's one-step form, where that is not the last
    """
    _need(isinstance(process, DiscreteVP), name, process, "a discrete model")
    _steps(
        steps,
        only,
        name,
        f"{', '.join(map(str, only[:-1]))} or {only[-1]}, what such models are distilled to",
    )
    return np.array([single + 1]) if single and steps == 1 else trailing(steps, process, grid)


AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""The tables of Align Your Steps, as published and in diffusers (AysSchedules); the last knot is where the model's
levels end."""

GRIDS: dict[str, Grid] = {
    # even in t
    "trailing": trailing,
    "leading": leading,
    "leading_open": leading_open,
    "linspace": linspace,
    "linspace_levels": linspace_levels,
    "linspace_open": linspace_open,
    "sgm_uniform": sgm_uniform,
    "quadratic": quadratic,
    "shifted": shifted,
    # over noise levels
    "karras": karras,
    "exponential": exponential,
    "beta": beta,
    "logsnr": log_snr_even,
    "lu": log_snr_even,
    "arctan": arctan,
    "linear_quadratic": linear_quadratic,
    "ays_sd15": partial(ays, knots=AYS["sd15"]),
    "ays_sdxl": partial(ays, knots=AYS["sdxl"]),
    "ays_svd": partial(ays, knots=AYS["svd"]),
    # of distilled models
    "lcm": lcm_times,
    "tcd": lcm_times,
    "pcm": pcm,
    # Sauer et al. 2023, section 4 <arXiv:2311.17042>
    "turbo": partial(distilled, name="turbo", only=(1, 2, 3, 4)),
    # Lin, Wang and Yang 2024 <arXiv:2402.13929>
    "lightning": partial(distilled, name="lightning", only=(1, 2, 4, 8)),
    # Ren et al. 2024 <arXiv:2404.13686>; its model card runs the one-step U-Net at timestep 800
    "hyper": partial(distilled, name="hyper", only=(1, 2, 4, 8, 12, 16), single=800.0),
    # Yin et al. 2024 <arXiv:2405.14867>: 999, 749, 499, 249, and the one-step SDXL at 399
    "dmd2": partial(distilled, name="dmd2", only=(1, 4), single=399.0),
}
"""Every grid by the name users know it by."""


def resolution_shift(
    tokens: int,
    *,
    kind: str = "exponential",
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> float:
    """The shift s for an image of so many tokens: mu grows linearly with them; s = exp(mu), or mu for kind "linear".

    The defaults are Flux's (FlowMatchEulerDiscreteScheduler and calculate_shift in diffusers).
    """
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    return math.exp(mu) if kind == "exponential" else mu


def at_resolution(grid: GridSpec, tokens: int) -> GridSpec:
    """The grid of an image of so many tokens, where the model's shift depends on them; otherwise the grid itself."""
    d = grid.dynamic
    if d is None:
        return grid
    shift = resolution_shift(
        tokens,
        kind=d.kind,
        base_shift=d.base_shift,
        max_shift=d.max_shift,
        base_tokens=d.base_tokens,
        max_tokens=d.max_tokens,
    )
    return replace(grid, shift=shift)


def _finish(t: ArrayLike, process: Process, grid: GridSpec, *, whole: bool = True) -> Array:
    """Even times as the process has them: on whole levels, or with a flow's shift and stretch."""
    t = np.asarray(t, dtype=np.float64)
    if whole and is_discrete(process):
        return np.round(t)  # half to even, as numpy and diffusers round
    if _is_flow(process):
        t = _shift(t, grid.shift)
        if grid.terminal is not None and t[-1] < 1:  # LTX: the last one is to be `terminal`
            t = 1 - (1 - t) * (1 - grid.terminal) / (1 - t[-1])
    return np.asarray(t)


def _shift(t: Array, s: float) -> Array:
    return np.asarray(s * t / (1 + (s - 1) * t))


def _lowest(process: Process) -> float:
    """The cleanest time a network is asked about."""
    return (
        1.0
        if isinstance(process, DiscreteVP)
        else float(getattr(process, "sigma_min", process.t_max / LEVELS))
    )


def _t_min(process: Process, grid: GridSpec) -> float:
    """The cleanest time before a grid's own shift."""
    low = _lowest(process)
    # diffusers shifts a fixed schedule's ends when it is built and again when steps are set
    return float(_shift(np.array(low), grid.shift)) if _is_flow(process) and grid.dynamic is None else low


def _level(process: Process, t: ArrayLike) -> Array:
    return np.asarray(t, dtype=np.float64) if _is_flow(process) else _ratio(process, t)


def _ratio(process: Process, t: ArrayLike, top: float = MAX_LEVEL) -> Array:
    """sigma / alpha, at most `top`."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(process.sigma(t) / process.alpha(t), top))


def _at(process: Process, level: Array) -> Array:
    return np.asarray(np.minimum(level, 1.0)) if _is_flow(process) else _at_ratio(process, level)


def _at_ratio(process: Process, ratio: Array) -> Array:
    """The times at which sigma / alpha is `ratio`; the last time exactly for what reaches it."""
    top = float(_ratio(process, process.t_max)) * (1 - 1e-9)
    return np.where(ratio >= top, process.t_max, np.minimum(process.t_of_lam(-np.log(ratio)), process.t_max))


def _ends(
    steps: int, process: Process, grid: GridSpec, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """Levels of the noisiest and the cleanest time: the caller's, the model's, the process's."""
    if grid.ends and steps > 1:
        ends = GRIDS[grid.ends](steps, process, grid)
    else:
        ends = _finish(np.array([process.t_max, _t_min(process, grid)]), process, grid, whole=False)
    high = float(sigma_max or grid.sigma_max or _level(process, ends[0]))
    low = float(sigma_min or grid.sigma_min or _level(process, ends[-1]))
    if not 0 < low < high:
        raise PlanError(
            f"noise levels from {high:g} to {low:g}", expected="sigma_max above sigma_min above 0"
        )
    return high, low


def is_discrete(process: Process) -> bool:
    """Whether only whole times are levels the network was trained on."""
    return isinstance(process, DiscreteVP) or bool(getattr(process, "discrete", False))


def _is_flow(process: Process) -> bool:
    return isinstance(process, RectifiedFlow)


def _need(ok: bool, name: str, process: Process, expected: str) -> None:
    if not ok:
        raise PlanError(
            f"time grid {name} for a process of kind {process.to_json()['kind']}",
            expected=expected,
            fix="use auto, the model's own grid",
        )


def _steps(steps: int, known: ArrayLike, name: str, expected: str) -> None:
    if steps not in np.asarray(known):
        raise PlanError(f"{steps} steps on the {name} grid", expected=expected)

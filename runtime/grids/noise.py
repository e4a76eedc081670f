"""Grids laid out over noise levels: a level is what levels.py says it is."""

from __future__ import annotations

import math

import numpy as np

from ..errors import PlanError
from ..manifest import GridSpec
from ..process import Array, Process
from .betadist import beta_ppf
from .even import EVEN
from .levels import at, at_ratio, finish, is_flow, level_of, need, ratio_of, t_min


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
    high, low = bounds(steps, process, grid, sigma_min, sigma_max)
    return at(process, np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho)


def exponential(
    steps: int,
    process: Process,
    grid: GridSpec,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Array:
    """Levels even in their logarithm: on a discrete or EDM process the same as `log_snr_even`."""
    high, low = bounds(steps, process, grid, sigma_min, sigma_max)
    return at(process, np.exp(np.linspace(math.log(high), math.log(low), steps)))


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
    high, low = bounds(steps, process, grid, sigma_min, sigma_max)
    return at(process, low + beta_ppf(1 - np.linspace(0, 1, steps), a, b) * (high - low))


def log_snr_even(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in log(alpha / sigma). Lu et al. 2022, section 3.3 <arXiv:2206.00927>."""
    high, low = np.log(ratio_of(process, np.array([process.t_max, t_min(process, grid)])))
    return at_ratio(process, np.exp(np.linspace(high, low, steps)))


def arctan(steps: int, process: Process, grid: GridSpec, *, c: float = 0.5) -> Array:
    """Even in arctan(sigma / (alpha c)): the exact optimum of first order on N(0, c^2) data.

    Sabour, Fidler and Kreis 2024, the Gaussian case <arXiv:2404.14507>. c is the data's standard deviation; 0.5 is
    EDM's sigma_data.
    """
    high, low = np.arctan(ratio_of(process, np.array([process.t_max, t_min(process, grid)]), top=np.inf) / c)
    return at_ratio(process, c * np.tan(np.linspace(high, low, steps)))


def ays(steps: int, process: Process, grid: GridSpec, *, knots: tuple[float, ...]) -> Array:
    """Align Your Steps: published noise levels of ten steps, other numbers by interpolation of their logarithm.

    Sabour, Fidler and Kreis 2024 <arXiv:2404.14507>; the last of the knots only serves interpolation.
    """
    top = float(ratio_of(process, process.t_max))
    need(not is_flow(process), "ays", process, "a discrete or EDM model: no table is published for flows")
    # the table is rounded to three digits
    need(
        knots[0] <= top * 1.001, f"ays from noise level {knots[0]:g}", process, f"levels of at most {top:.4g}"
    )
    place = np.linspace(0, len(knots) - 1, steps + 1)[:-1]
    return at(process, np.exp(np.interp(place, np.arange(len(knots)), np.log(knots))))


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
    return at(process, float(level_of(process, process.t_max)) * (1 - gone))


def bounds(
    steps: int, process: Process, grid: GridSpec, sigma_min: float | None, sigma_max: float | None
) -> tuple[float, float]:
    """Levels of the noisiest and the cleanest time: the caller's, the model's, the process's."""
    if grid.ends and steps > 1:
        ends = EVEN[grid.ends](steps, process, grid)
    else:
        ends = finish(np.array([process.t_max, t_min(process, grid)]), process, grid, whole=False)
    high = float(sigma_max or grid.sigma_max or level_of(process, ends[0]))
    low = float(sigma_min or grid.sigma_min or level_of(process, ends[-1]))
    if not 0 < low < high:
        raise PlanError(
            f"noise levels from {high:g} to {low:g}", expected="sigma_max above sigma_min above 0"
        )
    return high, low


AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""The tables of Align Your Steps, as published and in diffusers (AysSchedules); the last knot is where the model's
levels end."""

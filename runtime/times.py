"""Time grids: at which noise levels a sampler calls the network.

A grid is [steps + 1] float64 process times, strictly decreasing; the last one is where the sample ends, 0 for clean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .errors import PlanError
from .manifest import GridSpec
from .process import Array, DiscreteVP, Process, RectifiedFlow
from .process import lam as log_snr

MAX_STEPS = 1000
"""More steps than any trained discrete model has noise levels; a larger number is a typing error."""


def check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise PlanError(
            f"{steps!r} steps", expected=f"a whole number from 1 to {MAX_STEPS}", fix="try --steps 20"
        )


def make_times(name: str, steps: int, process: Process, grid: GridSpec = GridSpec()) -> Array:  # noqa: B008
    """The named grid. "auto" is what the process's users expect: the model's own spacing for discrete models, even
    in t for rectified flow, Karras for EDM.

    Raises PlanError for an unknown name or a number of steps the process cannot tell apart.
    """
    check_steps(steps)
    if name == "auto":
        name = (
            grid.spacing if isinstance(process, DiscreteVP) else "linspace" if _is_flow(process) else "karras"
        )
    if name not in GRIDS:
        raise PlanError.unknown("time grid", name, ["auto", *GRIDS])
    times = GRIDS[name](steps, process, grid)
    end = 1.0 if grid.final == "first" and isinstance(process, DiscreteVP) else 0.0
    times = np.append(times, end)
    if len(times) > 2 and times[-2] == end == 1.0:
        times[-1] = (
            0.0  # the grid's own last level is already the first trained one: only clean is left below it
        )
    return check_times(times, process)


def check_times(times: ArrayLike, process: Process, *, rising: bool = False) -> Array:
    """Raises PlanError unless the times are finite, strictly decreasing and inside [0, t_max].

    rising  accept strictly rising times too: an inversion goes from clean to noise
    """
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or len(times) < 2 or not np.all(np.isfinite(times)):
        raise PlanError(f"times of shape {times.shape}", expected="at least two finite numbers in one row")
    falls = np.diff(times) < 0
    if not (falls.all() or (rising and not falls.any() and np.all(np.diff(times) > 0))):
        raise PlanError(
            f"times that repeat or rise over {len(times) - 1} steps",
            expected="strictly decreasing times",
            fix="use fewer steps or another time grid",
        )
    if times.max() > process.t_max * (1 + 1e-9) or times.min() < 0:
        raise PlanError(
            f"times from {times[0]:g} to {times[-1]:g}", expected=f"times within 0 and {process.t_max:g}"
        )
    return times


def trailing(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the last noise level down, never at the first. Lin et al. 2023, table 2 <arXiv:2305.08891>."""
    n = process.t_max
    return np.asarray(_levels(n - np.arange(steps) * (n / steps), process))


def leading(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the first noise level up, short of the last; Stable Diffusion 1.x's habit, with steps_offset 1."""
    n = process.t_max
    ratio = np.floor(n / steps) if isinstance(process, DiscreteVP) else n / steps
    offset = grid.steps_offset + 1.0 if isinstance(process, DiscreteVP) else n / steps
    return np.asarray(np.arange(steps)[::-1] * ratio + offset)


def linspace(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the last noise level to the first, both included."""
    if isinstance(process, DiscreteVP):
        return np.asarray(np.linspace(process.t_max, 1.0, steps))
    return np.asarray(np.linspace(process.t_max, _t_min(process), steps))


def karras(steps: int, process: Process, grid: GridSpec) -> Array:
    """sigma/alpha even after the rho-th root, rho = 7. Karras et al. 2022, equation 5 <arXiv:2206.00364>."""
    if _is_flow(process):
        raise PlanError(
            "time grid 'karras' for rectified flow", expected="a process whose alpha stays above 0"
        )
    rho = 7.0
    low, high = np.exp(-log_snr(process, np.array([_t_min(process), process.t_max])))
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho
    return np.asarray(np.minimum(process.t_of_lam(-np.log(ramp)), process.t_max))


def log_snr_even(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in log(alpha / sigma). Lu et al. 2022, section 3.3 <arXiv:2206.00927>."""
    if _is_flow(process):
        raise PlanError(
            "time grid 'logsnr' for rectified flow", expected="a process whose alpha stays above 0"
        )
    low, high = log_snr(process, np.array([process.t_max, _t_min(process)]))
    return np.asarray(np.minimum(process.t_of_lam(np.linspace(low, high, steps)), process.t_max))


def lcm_times(steps: int, process: Process, grid: GridSpec) -> Array:
    """The grid LCMs are distilled on: every 20th of 1000 levels. Luo et al. 2023, section 4.3 <arXiv:2310.04378>."""
    if not isinstance(process, DiscreteVP):
        raise PlanError("time grid 'lcm' for a continuous process", expected="a discrete model")
    if steps > 50:
        raise PlanError(
            f"{steps} steps on the lcm grid", expected="at most 50, the levels LCMs are distilled on"
        )
    levels = np.arange(1, 51)[::-1] * (process.t_max // 50)
    return np.asarray(levels[np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)])


GRIDS = {
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "karras": karras,
    "logsnr": log_snr_even,
    "lcm": lcm_times,
}


def _levels(t: Array, process: Process) -> Array:
    """Onto whole trained levels, where the process has them (half to even, as numpy and diffusers round)."""
    return np.round(t) if isinstance(process, DiscreteVP) else t


def _t_min(process: Process) -> float:
    """The cleanest time a network is asked about."""
    if isinstance(process, DiscreteVP):
        return 1.0
    return float(getattr(process, "sigma_min", process.t_max / MAX_STEPS))


def _is_flow(process: Process) -> bool:
    return isinstance(process, RectifiedFlow)

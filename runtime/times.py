"""Time grids: at which noise levels a sampler calls the network. The grids themselves are in grids/.

A grid's times are [steps + 1] float64 process times, strictly decreasing; the last one is where the sample ends, 0 for
clean.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .errors import PlanError
from .grids import GRIDS, Grid
from .grids.levels import is_discrete
from .manifest import GridSpec
from .process import EDM, Array, Process, RectifiedFlow

__all__ = ["GRIDS", "MAX_STEPS", "Grid", "check_steps", "check_times", "find_grid", "make_times"]

MAX_STEPS = 1000
"""More steps than any trained discrete model has noise levels; a larger number is a typing error."""


def check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise PlanError(
            f"{steps!r} steps", expected=f"a whole number from 1 to {MAX_STEPS}", fix="try --steps 20"
        )


def make_times(name: str | Grid, steps: int, process: Process, grid: GridSpec = GridSpec()) -> Array:  # noqa: B008
    """The named grid, or any function like those in GRIDS. "auto" is the model's own, and where it has none what the
    process's users expect: trailing for discrete models, linspace for rectified flow, Karras for EDM.

    Raises PlanError for an unknown name or a number of steps the process cannot tell apart.
    """
    check_steps(steps)
    if name == "auto":
        name = grid.spacing
    if name == "auto":
        name = {RectifiedFlow: "linspace", EDM: "karras"}.get(type(process), "trailing")
    layout = find_grid(name) if isinstance(name, str) else name
    times = np.asarray(layout(steps, process, grid), dtype=np.float64)
    if times.shape != (steps,):
        raise PlanError(
            f"a grid that gives times of shape {times.shape} for {steps} steps",
            expected=f"{steps} times; the end is appended",
        )
    end = 1.0 if grid.final != "clean" and is_discrete(process) else 0.0
    # a grid whose own last level is already the first trained one: only clean is left below it
    reached = end == 1.0 and abs(times[-1] - end) < 1e-9
    return check_times(np.append(times, 0.0 if reached else end), process)


def find_grid(name: str) -> Grid:
    """The grid of that name. Raises PlanError with the nearest names."""
    if name not in GRIDS:
        raise PlanError.unknown("time grid", name, ["auto", *GRIDS])
    return GRIDS[name]


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

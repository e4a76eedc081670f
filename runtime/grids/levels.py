"""What grids are laid out over: a process's times, and its noise levels.

A level is sigma / alpha for a discrete or EDM process and t itself for rectified flow, as diffusers has it; a ratio is
sigma / alpha for all.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from ..errors import PlanError
from ..manifest import DynamicShift, GridSpec
from ..process import Array, DiscreteVP, Process, RectifiedFlow

MAX_LEVEL = math.sqrt(2**24 - 1)
"""Where alpha reaches 0, its noise level counts as this: alpha^2 = 2^-24, the smallest positive float16 that diffusers
puts in its place (EulerDiscreteScheduler, rescale_betas_zero_snr). The time itself stays t_max."""

NOTHING = 1e-100
"""An alpha this small is 0: DiscreteVP keeps its logarithm finite."""

LEVELS = 1000
"""Noise levels of a rectified flow's schedule in diffusers (num_train_timesteps), which set its cleanest time."""


def is_discrete(process: Process) -> bool:
    """Whether only whole times are levels the network was trained on."""
    return isinstance(process, DiscreteVP) or bool(getattr(process, "discrete", False))


def is_flow(process: Process) -> bool:
    return isinstance(process, RectifiedFlow)


def finish(t: ArrayLike, process: Process, grid: GridSpec, *, whole: bool = True) -> Array:
    """Even times as the process has them: on whole levels, or with a flow's shift and stretch."""
    t = np.asarray(t, dtype=np.float64)
    if whole and is_discrete(process):
        return np.round(t)  # half to even, as numpy and diffusers round
    if is_flow(process):
        t = shifted_by(t, grid.shift)
        if grid.terminal is not None and t[-1] < 1:  # LTX: the last one is to be `terminal`
            t = 1 - (1 - t) * (1 - grid.terminal) / (1 - t[-1])
    return np.asarray(t)


def shifted_by(t: Array, s: float) -> Array:
    return np.asarray(s * t / (1 + (s - 1) * t))


def lowest(process: Process) -> float:
    """The cleanest time a network is asked about."""
    return 1.0 if is_discrete(process) else float(getattr(process, "sigma_min", process.t_max / LEVELS))


def t_min(process: Process, grid: GridSpec) -> float:
    """The cleanest time before a grid's own shift."""
    low = lowest(process)
    # diffusers shifts a fixed schedule's ends when it is built and again when steps are set
    return float(shifted_by(np.array(low), grid.shift)) if is_flow(process) and grid.dynamic is None else low


def level_of(process: Process, t: ArrayLike) -> Array:
    return np.asarray(t, dtype=np.float64) if is_flow(process) else ratio_of(process, t)


def ratio_of(process: Process, t: ArrayLike, top: float = MAX_LEVEL) -> Array:
    """sigma / alpha, or `top` where alpha is 0."""
    sigma, alpha = process.sigma(t), process.alpha(t)
    return np.asarray(np.divide(sigma, alpha, where=alpha > NOTHING, out=np.full_like(alpha, top)))


def at(process: Process, level: Array) -> Array:
    return np.asarray(np.minimum(level, 1.0)) if is_flow(process) else at_ratio(process, level)


def at_ratio(process: Process, ratio: Array) -> Array:
    """The times at which sigma / alpha is `ratio`; the last time exactly for what reaches it."""
    top = float(ratio_of(process, process.t_max)) * (1 - 1e-9)
    return np.where(ratio >= top, process.t_max, np.minimum(process.t_of_lam(-np.log(ratio)), process.t_max))


def resolution_shift(tokens: int, dynamic: DynamicShift = DynamicShift()) -> float:  # noqa: B008 - frozen
    """The shift s for an image of so many tokens: mu grows linearly with them; s = exp(mu), or mu for kind "linear".

    As calculate_shift and FlowMatchEulerDiscreteScheduler in diffusers; the defaults are Flux's.
    """
    d = dynamic
    slope = (d.max_shift - d.base_shift) / (d.max_tokens - d.base_tokens)
    mu = d.base_shift + slope * (tokens - d.base_tokens)
    return math.exp(mu) if d.kind == "exponential" else mu


def at_resolution(grid: GridSpec, tokens: int) -> GridSpec:
    """The grid of an image of so many tokens, where the model's shift depends on them; otherwise the grid itself."""
    return grid if grid.dynamic is None else replace(grid, shift=resolution_shift(tokens, grid.dynamic))


def need(ok: bool, name: str, process: Process, expected: str) -> None:
    if not ok:
        raise PlanError(
            f"time grid {name} for a process of kind {process.to_json()['kind']}",
            expected=expected,
            fix="use auto, the model's own grid",
        )


def need_steps(steps: int, known: Container[int], name: str, expected: str) -> None:
    if steps not in known:
        raise PlanError(f"{steps} steps on the {name} grid", expected=expected)

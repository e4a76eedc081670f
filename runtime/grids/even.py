"""Grids even in the process's time, or in a simple function of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..manifest import GridSpec
from ..process import EDM, Array, DiscreteVP, Process
from .levels import at, finish, is_discrete, is_flow, level_of, lowest, need, t_min


def trailing(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the last noise level down, never at the first. Lin et al. 2023, table 2 <arXiv:2305.08891>."""
    top = grid.sigma_max if is_flow(process) and grid.sigma_max else process.t_max
    return finish(top - np.arange(steps) * (top / steps), process, grid)


def leading(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the first noise level up, short of the last; Stable Diffusion 1.x's habit, with steps_offset 1."""
    n = process.t_max
    if not is_discrete(process):
        return finish(np.arange(steps, 0, -1) * (n / steps), process, grid)
    return np.asarray(np.arange(steps)[::-1] * np.floor(n / steps) + grid.steps_offset + 1.0)


def leading_open(steps: int, process: Process, grid: GridSpec) -> Array:
    """`leading` with one step more, its cleanest left out: what the DPM-Solver family means by it in diffusers."""
    n = process.t_max
    if not is_discrete(process):
        return finish(np.arange(steps, 0, -1) * (n / (steps + 1)), process, grid)
    return np.asarray(np.arange(steps, 0, -1) * np.floor(n / (steps + 1)) + grid.steps_offset + 1.0)


def linspace(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even from the last noise level to the first, both included.

    A discrete process is asked between its levels, at the noise that linear interpolation gives (diffusers' Euler).
    """
    if not isinstance(process, DiscreteVP):
        return finish(np.linspace(process.t_max, t_min(process, grid), steps), process, grid)
    t = np.linspace(process.t_max, 1.0, steps)
    below = np.floor(t)
    part, above = t - below, np.minimum(below + 1, process.t_max)
    level = (1 - part) * level_of(process, below) + part * level_of(process, above)
    return np.where(part == 0, t, at(process, level))


def linspace_levels(steps: int, process: Process, grid: GridSpec) -> Array:
    """`linspace` rounded onto trained levels: what DDIM, DDPM and PNDM mean by it in diffusers."""
    need(is_discrete(process), "linspace_levels", process, "a discrete model")
    if steps == 1:  # diffusers starts at the first level here, where nothing is left to draw
        return np.full(1, process.t_max)
    return np.round(np.linspace(0.0, process.t_max - 1, steps))[::-1] + 1


def linspace_open(steps: int, process: Process, grid: GridSpec) -> Array:
    """`linspace_levels` with one step more, its cleanest left out: the DPM-Solver family in diffusers."""
    if not is_discrete(process):
        return finish(np.linspace(process.t_max, lowest(process), steps + 1)[:-1], process, grid)
    return np.asarray(np.round(np.linspace(0.0, process.t_max - 1, steps + 1))[:0:-1] + 1)


def sgm_uniform(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in the network's timestep from the last level to the first, the first left out; ComfyUI's sgm_uniform."""
    low = lowest(process)
    if isinstance(process, EDM):  # its timestep is a logarithm
        return np.asarray(np.geomspace(process.t_max, low, steps + 1)[:-1])
    t = np.linspace(process.t_max, low, steps + 1)[:-1]
    return finish(t, process, grid) if is_flow(process) else t


def quadratic(steps: int, process: Process, grid: GridSpec) -> Array:
    """Even in the square root of t: denser near clean. Song, Meng and Ermon 2020, appendix D.2 <arXiv:2010.02502>."""
    t = np.linspace(math.sqrt(process.t_max), math.sqrt(t_min(process, grid)), steps) ** 2
    t = np.minimum(t, process.t_max)
    return finish(t, process, grid, whole=False)


def shifted(steps: int, process: Process, grid: GridSpec, *, shift: float = 0.0) -> Array:
    """Rectified flow, even and then shifted towards noise. Esser et al. 2024, section 5.3.2 <arXiv:2403.03206>.

    shift  s in t' = s t / (1 + (s - 1) t); the model's own, or SD3's 3 where it has none; see `resolution_shift`
    """
    need(is_flow(process), "shifted", process, "a rectified flow")
    own = grid.shift if grid.shift != 1.0 else 3.0
    return trailing(steps, process, replace(grid, shift=shift or own))


EVEN = {
    "trailing": trailing,
    "leading": leading,
    "leading_open": leading_open,
    "linspace": linspace,
    "linspace_levels": linspace_levels,
    "linspace_open": linspace_open,
}
"""The grids that can bound a grid over levels (GridSpec.ends)."""

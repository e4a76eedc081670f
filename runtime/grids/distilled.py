"""Grids of models distilled to few steps."""

from __future__ import annotations

import numpy as np

from ..manifest import GridSpec
from ..process import Array, DiscreteVP, Process
from .even import trailing
from .levels import need, need_steps


def lcm_times(steps: int, process: Process, grid: GridSpec) -> Array:
    """The grid LCMs are distilled on: every 20th of 1000 levels. Luo et al. 2023, section 4.3 <arXiv:2310.04378>.

    TCD, Zheng et al. 2024 <arXiv:2402.19159>, takes the same steps.
    """
    need(isinstance(process, DiscreteVP), "lcm", process, "a discrete model")
    need_steps(steps, range(1, 51), "lcm", "at most 50, the levels LCMs are distilled on")
    levels = np.arange(1, 51)[::-1] * (process.t_max // 50)
    return np.asarray(levels[np.floor(np.linspace(0, 50, steps, endpoint=False)).astype(int)])


def pcm(steps: int, process: Process, grid: GridSpec) -> Array:
    """From the edge of one phase to that of the next, `steps` phases on LCM's 50 levels.

    Wang et al. 2024, phased consistency <arXiv:2405.18407>: a student of M phases jumps exactly from edge to edge.
    """
    need(isinstance(process, DiscreteVP), "pcm", process, "a discrete model")
    need_steps(steps, range(1, 51), "pcm", "at most 50, the levels phases are made of")
    edges = np.floor(np.linspace(0, 50, steps, endpoint=False))[:0:-1]
    return np.append(50.0, edges) * (process.t_max // 50)


def distilled(
    steps: int, process: Process, grid: GridSpec, *, name: str, only: tuple[int, ...], single: float = 0.0
) -> Array:
    """`trailing`, for the numbers of steps a family of distilled models exists in.

    single  the network's timestep of the model's one-step form, where that is not the last
    """
    need(isinstance(process, DiscreteVP), name, process, "a discrete model")
    need_steps(
        steps,
        only,
        name,
        f"{', '.join(map(str, only[:-1]))} or {only[-1]}, what such models are distilled to",
    )
    return np.array([single + 1]) if single and steps == 1 else trailing(steps, process, grid)

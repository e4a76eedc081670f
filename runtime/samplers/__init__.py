"""Samplers: from noise to data in few network calls. One algorithm, one file, one short function.

A sampler is a generator over anything that adds and scales: arrays when it runs, symbols when `Plan.trace` compiles
it into a table of numbers. It calls `denoise` and yields a Step whenever it has a new state. All share one signature:

    sampler(denoise, process, x, times, noise) -> Iterator[Step]

    denoise  (x_t, t) -> estimate of x_0, same shape
    process  the forward process; samplers read its alpha and sigma, in float64
    x        the state at times[0]
    times    [steps + 1] float64, decreasing; may end at 0, where sigma is 0 and the step is exact
    noise    () -> fresh standard normal of x's shape; deterministic samplers ignore it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..process import Array, Process
from .ddim import ddim
from .dpmpp import dpmpp_2m
from .euler import euler, heun
from .lcm import lcm
from .step import Denoise, Noise, Step

Sampler = Callable[[Denoise, Process, Array, Array, Noise], Iterator[Step]]

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
    "lcm": lcm,
}
"""Every sampler by the name users know it by."""

__all__ = ["SAMPLERS", "Denoise", "Noise", "Sampler", "Step", "ddim", "dpmpp_2m", "euler", "heun", "lcm"]

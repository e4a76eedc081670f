"""When a few-step student is called, and when a network that is asked at any time is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Model
from ..model.training import Turn
from ..runtime.errors import BadInput
from ..runtime.grids import at_resolution
from ..runtime.process import EDM, Array, DiscreteVP, Process
from ..runtime.times import make_times

__all__ = ["drawn_times", "random_times", "spaced", "stage_times"]

Tensor = Any

P_MEAN, P_STD = -1.2, 1.2
"""Of the logarithm of an EDM's noise levels in training (Karras et al. 2022, arXiv:2206.00364, table 1)."""


def drawn_times(model: Model, steps: int) -> Array:
    """[steps + 1] process times, falling to 0: those that `made` with a DDIMScheduler, and `spaced`, are drawn at.

    Raises BadInput for a number of steps that the levels of a discrete model do not divide into: diffusers' DDIM then
    goes to other times than the network is called at next.
    """
    process = model.process
    if isinstance(process, DiscreteVP):
        if process.t_max % steps:
            divisors = [k for k in range(1, 65) if process.t_max % k == 0]
            raise BadInput(
                f"{steps} steps of {model.name}, which has {process.t_max:.0f} noise levels",
                expected="a number that divides them",
                fix=f"one of {', '.join(map(str, divisors))}",
            )
        return make_times("trailing", steps, process)
    grid, sample = spaced(model).grid, model.sample
    return make_times(
        "auto", steps, process, at_resolution(grid, sample.height * sample.width // sample.multiple**2)
    )


def stage_times(model: Model, steps: int) -> Array:
    """[2 steps + 1] times of twice the steps, falling to 0, of which every other one is a time of `steps`.

    Raises BadInput for a model whose grids do not lie in each other like that.
    """
    if isinstance(model.process, DiscreteVP):
        return make_times("trailing", 2 * steps, model.process)
    times = drawn_times(model, 2 * steps)
    if not np.allclose(times[::2], drawn_times(model, steps), rtol=1e-6, atol=0):
        raise BadInput(
            f"{model.name}, whose {steps} steps are no half of its {2 * steps}",
            expected="even times: discrete noise levels, or a flow without a scheduler of its own",
            fix="pcm in place of progressive",
        )
    return times


def spaced(model: Model) -> Model:
    """A flow without a scheduler of its own is drawn at even times: its usual last step, a thousandth long, is no help
    to a student of few. Any other model stays as it is."""
    if isinstance(model.process, DiscreteVP | EDM) or model.scheduler is not None:
        return model
    return replace(model, grid=replace(model.grid, spacing="trailing"))


def random_times(turn: Turn, process: Process) -> Tensor:
    """[batch] times at which denoisers of the process are trained: even over levels or times, log-normal over sigma."""
    if isinstance(process, DiscreteVP):
        return turn.integers(1, int(process.t_max) + 1)
    if isinstance(process, EDM):
        th = torch()
        x0 = turn.batch.x0
        sigma = th.exp(P_MEAN + P_STD * th.randn(len(x0), generator=turn.random))
        return sigma.clamp(process.sigma_min, process.sigma_max).to(x0.device)
    low = process.t_max * 1e-3  # a flow's cleanest time in diffusers; noise read off clean data is 0 / 0
    return turn.uniform(low, process.t_max)

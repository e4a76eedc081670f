"""What methods share that pull the distribution of a student's samples to the teacher's.

A second network, the fake, learns to denoise what the student draws: the difference between its answer and the
teacher's on one noisy sample is the direction in which the student has to move (Wang et al. 2023, arXiv:2305.16213,
section 3.2; Yin et al. 2023, arXiv:2311.18828, equation 7). No pictures are needed for it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.libraries import torch
from ..model.model import Model
from ..model.training import Batch, Denoising, Estimate, Turn
from ..runtime.process import EDM, DiscreteVP
from .student import Setting
from .times import drawn_times

__all__ = [
    "LEAST",
    "Leap",
    "Pull",
    "between",
    "cleanest",
    "diffused",
    "fake_loss",
    "fake_of",
    "first",
    "followed",
    "leap",
    "least",
    "listed",
    "pull",
    "step_times",
    "walked",
]

Tensor = Any
Module = Any
Condition = Mapping[str, Tensor]

LEAST = 0.02
"""Share of the longest time below which nothing is compared: DMD2's, arXiv:2405.14867, official code."""
SNR_CAP = 5.0
"""Of the fake's weights; min-SNR (Hang et al. 2023, arXiv:2303.09556), its default."""
TINY = 1e-6
"""Of a sample's size: two equal estimates divide by it."""
KARRAS_RHO = 7.0
"""Noise levels of EDM are even in their 7th root (Karras et al. 2022, arXiv:2206.00364, section 3)."""


def step_times(model: Model, steps: int) -> Tensor:
    """[steps + 1] float32 process times at which a student of so many steps is called, the last one clean.

    Raises BadInput for a number that the levels of a discrete model do not divide into.
    """
    return torch().as_tensor(drawn_times(model, steps), dtype=torch().float32)


def fake_of(teacher: Module) -> Module:
    """A copy of the teacher that may learn."""
    return copy.deepcopy(teacher).requires_grad_(True)


def first(denoising: Denoising, noise: Tensor) -> Tensor:
    """The sample at the longest time, as samplers begin with it."""
    process = denoising.process
    return noise * process.sigma_max if isinstance(process, EDM) else noise


@dataclass(frozen=True)
class Leap:
    """One step of the student, [batch, ...]: from x at time t, where its own steps led, towards time s."""

    x: Tensor
    t: Tensor
    s: Tensor
    estimate: Estimate
    """The student's at (x, t)."""


def leap(
    turn: Turn, at: Setting, network: Module, times: Tensor, *, fresh: bool = False, learns: bool
) -> Leap:
    """A step of the student, each sample's at random among all its steps, from where its own steps before led.

    times   [steps + 1]
    fresh   see `walked`
    learns  whether gradients flow through the step; through those before it none do
    """
    th, condition = torch(), turn.batch.condition
    times = times.to(turn.batch.x0.device)
    i = turn.integers(0, len(times) - 1)
    noise = turn.normal(turn.batch.x0)
    with th.no_grad():
        renoise = turn if fresh else None
        x = walked(at.denoising, network, first(at.denoising, noise), times, i, condition, renoise)
    with th.set_grad_enabled(learns):
        estimate = at.denoising(network, x, times[i], condition)
    return Leap(x, times[i], times[i + 1], estimate)


def walked(
    denoising: Denoising,
    network: Module,
    x: Tensor,
    times: Tensor,
    steps: Tensor,
    condition: Condition,
    fresh: Turn | None = None,
) -> Tensor:
    """Where the network's first steps[b] steps lead sample b: DDIM, or with fresh noise after every step.

    x  [batch, ...] at times[0]; fresh draws the noise, None for DDIM
    """
    x = x.clone()
    for j in range(int(steps.max())):
        going = (steps > j).nonzero().squeeze(1)
        t, s = (times[k].expand(len(going)) for k in (j, j + 1))
        here = x[going]
        estimate = denoising(network, here, t, {name: value[going] for name, value in condition.items()})
        if fresh is None:
            x[going] = denoising.ddim(estimate, s).to(x.dtype)
        else:
            x[going] = denoising.noised(estimate.x0, fresh.normal(x)[going], s).to(x.dtype)
    return x


def between(denoising: Denoising, turn: Turn, low: Tensor | float, high: Tensor) -> Tensor:
    """[batch] times at random, even between low and high; even in the 7th root for EDM."""
    share = turn.uniform(0, 1)
    if isinstance(denoising.process, EDM):
        low_root = torch().as_tensor(low, device=high.device) ** (1 / KARRAS_RHO)
        high_root = high ** (1 / KARRAS_RHO)
        return (low_root + share * (high_root - low_root)) ** KARRAS_RHO
    return low + share * (high - low)


def least(denoising: Denoising) -> float:
    """The cleanest time at which anything is compared."""
    process = denoising.process
    return process.sigma_min if isinstance(process, EDM) else LEAST * process.t_max


def cleanest(denoising: Denoising) -> float:
    """The cleanest time a network was trained at: level 0 of a discrete model."""
    process = denoising.process
    if isinstance(process, EDM):
        return process.sigma_min
    return 1.0 if isinstance(process, DiscreteVP) else 1e-3 * process.t_max  # as flows end in diffusers


def diffused(denoising: Denoising, x: Tensor, s: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """A sample of q(x_t | x_s) for t >= s."""
    ratio, fresh = denoising.onward(s, t)
    return ratio * x + fresh * noise


@dataclass(frozen=True)
class Pull:
    """Where two networks' opinions of one noisy sample want a clean estimate to move."""

    difference: Tensor
    """[batch, ...]: the guided teacher's clean estimate less the fake's. Guidance goes into the student with it."""
    size: Tensor
    """[batch, 1, 1, 1]: mean |x0 - teacher's|: in its units all times and samples weigh alike (DMD, equation 8)."""


def pull(at: Setting, fake: Module, x0: Tensor, x: Tensor, t: Tensor, batch: Batch) -> Pull:
    """What teacher and fake make of x at time t, whose clean estimate by the student is x0. No gradients."""
    with torch().no_grad():
        right = at.denoising.guided(at.teacher, x, t, batch.condition, batch.nothing, at.guidance).x0
        own = at.denoising(fake, x, t, batch.condition).x0
        size = (x0 - right).abs().flatten(1).mean(1).clamp(min=TINY)
        return Pull(right - own, size.view(-1, *[1] * (x0.ndim - 1)))


def followed(x0: Tensor, pull: Pull, huber_c: float) -> Tensor:
    """A loss whose gradient moves x0 along the pull: a distance to sg[x0 + difference], in units of its size.

    huber_c  of the pseudo-Huber distance; 0 for half the squared one, whose gradient is the difference itself
    """
    th = torch()
    apart = x0 - (x0.detach() + pull.difference)
    distance = th.sqrt(apart.square() + huber_c**2) - huber_c if huber_c else 0.5 * apart.square()
    return (distance / pull.size).mean()


def fake_loss(
    denoising: Denoising,
    fake: Module,
    x0: Tensor,
    x: Tensor,
    t: Tensor,
    condition: Condition,
    weight: Tensor | float = 1.0,
    *,
    cap: float | None = SNR_CAP,
) -> Tensor:
    """The squared error of the fake's output at (x, t), whose clean sample is x0, weighted with min(1, cap / SNR).

    For a network that predicts noise this is min-SNR; the others keep the error they were trained with.
    """
    alpha, sigma = denoising.signal(t)
    noise = (x - alpha * x0) / sigma
    error = (denoising.output(fake, x, t, condition) - denoising.target(x0, noise, t)).square()
    if cap is not None:
        weight = weight * (cap * sigma.square() / alpha.square()).clamp(max=1.0)
    return (weight * error).mean()


def listed(steps: int, also: Sequence[int]) -> tuple[int, ...]:
    """All numbers of steps a student is made for."""
    return tuple(dict.fromkeys((steps, *also)))

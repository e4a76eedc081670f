"""Consistency training: a consistency model out of data alone, without steps of a teacher.

Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models" <arXiv:2310.14189>, table 1.

The paper's networks are EDM's, f = c_skip x + c_out F with noise levels that begin at 0.002. Here f is what any network
says of clean data, x0: noise levels are sigma / alpha, samples x / alpha. That is the paper's form for a network that
predicts v, for which x0 = alpha^2 (x / alpha) - sigma v is EDM's preconditioning with sigma_data 1; one that predicts
noise has f(x, 0) = x as well, but its errors at much noise are multiplied. It makes sense as finetuning of a
denoiser, whose x0 is right on average where the student's has to be right for each sample.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.grids.levels import at_ratio, lowest, ratio_of
from ..runtime.process import Array, Process
from ..runtime.progress import Progress
from .losses import ICT_C
from .student import Setting, few_step_scheduler, made, taught

__all__ = ["ICT", "chances", "ict_loss", "intervals_at", "noise_levels"]

Tensor = Any

RHO = 7
P_MEAN, P_STD = -1.1, 2.0
"""Of the logarithm of noise levels in training."""
SIGMA_DATA = 0.5
"""Standard deviation of the data that P_MEAN was chosen for."""


@dataclass(frozen=True)
class ICT:
    """A pass: the denoiser becomes a consistency model by its own answers at neighbouring noise levels.

    No teacher is called in training, so a step costs half of lcm's; but it takes many more steps. The paper's dropout
    and RAdam are not part of it: denoisers come with the dropout they were trained with, and the rate rises slowly.
    """

    steps: int = 2
    """That the model is then drawn with unless told otherwise."""
    first: int = 10
    """Intervals between noise levels as the training begins; they double as often as it takes to reach `last`."""
    last: int = 1280
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """The data: drawn under guidance, they put it into the student."""
    training: Training = Training(steps=10_000, rate=1e-4)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("first", 2), ("last", self.first)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} of ict: {getattr(self, name)}", expected=f"at least {least}")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit, a loss turned NaN."""

        def lesson(setting: Setting) -> Lesson:
            spread = setting.samples.std()
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: ict_loss(turn, setting, self, spread)},
                setting.key,
            )

        trained = yield from taught(self, model, ctx, lesson, stage="ict")
        scheduler = few_step_scheduler(model, "LCMScheduler")
        return made(self, model, trained, scheduler=scheduler, steps=self.steps)


def ict_loss(turn: Turn, at: Setting, how: ICT, spread: float) -> Mapping[str, Tensor]:
    """(sqrt(||f(x + l' z, l') - f^-(x + l z, l)||^2 + c^2) - c) / (l' - l) of neighbouring levels l < l'.

    spread  standard deviation of all samples
    f^- is the network itself without gradients, and the identity at the least level.
    """
    th, batch, denoising = torch(), turn.batch, at.denoising
    levels = noise_levels(denoising.process, intervals_at(turn.share, how.first, how.last))
    chance = th.as_tensor(chances(levels, spread))
    i = th.multinomial(chance, len(batch.x0), replacement=True, generator=turn.random).numpy()
    s, t = (th.as_tensor(at_ratio(denoising.process, levels[k]), device=batch.x0.device) for k in (i, i + 1))
    z = turn.normal(batch.x0)
    with th.no_grad():
        x_s = denoising.noised(batch.x0, z, s)
        alpha, _ = denoising.signal(s)
        begins = th.as_tensor(i == 0, device=s.device).view(-1, 1, 1, 1)
        right = th.where(begins, x_s / alpha, denoising(turn.student, x_s, s, batch.condition).x0)
    got = denoising(turn.student, denoising.noised(batch.x0, z, t), t, batch.condition).x0
    c = ICT_C * math.sqrt(got[0].numel())
    distance = th.sqrt((got - right).square().flatten(1).sum(1) + c * c) - c
    weight = th.as_tensor(1 / (levels[i + 1] - levels[i]), dtype=th.float32, device=got.device)
    return {"huber": (weight * distance).mean() / c}


def intervals_at(share: float, first: int, last: int) -> int:
    """N - 1: doubled from first to last in equal parts of the training (the paper's step schedule)."""
    doublings = math.floor(math.log2(last // first)) + 1
    return min(first << math.floor(share * doublings), last)


def noise_levels(process: Process, intervals: int) -> Array:
    """[intervals + 1] rising sigma / alpha, even in the 7th root (Karras et al. 2022, arXiv:2206.00364, equation 5)."""
    low, high = (float(ratio_of(process, t)) ** (1 / RHO) for t in (lowest(process), process.t_max))
    return np.asarray(np.linspace(low, high, intervals + 1) ** RHO)


def chances(levels: Array, spread: float) -> Array:
    """[intervals] how often each is drawn: log-normal over levels, moved to data of this standard deviation."""
    mean = P_MEAN + math.log(spread / SIGMA_DATA)
    below = np.array([math.erf((math.log(level) - mean) / (math.sqrt(2) * P_STD)) for level in levels])
    chance = np.diff(below)
    return np.asarray(chance / chance.sum())

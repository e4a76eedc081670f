"""Finetuning of a whole few-step sampler by the distance between batches of features, without pairs or critics.

Aiello et al. 2023, "Fast Inference in Denoising Diffusion Models via MMD Finetuning" <arXiv:2301.07969>. All steps of
DDIM are unrolled and differentiated through. A last mile after pruning or other distillation, of some hundred steps.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .matching import first, step_times
from .student import Setting, few_step_scheduler, made, taught
from .times import spaced

__all__ = ["MMD", "cubic", "mmd_loss", "squared_mmd", "teacher_features"]

Tensor = Any
Features = Callable[[Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""Clean samples, their conditions and noise of their shape -> [batch, features]."""


@dataclass(frozen=True)
class MMD:
    """A pass: the samples of a few-step student get the features of the latents it learns on."""

    steps: int = 4
    """Of the student, by DDIM: all of them are kept for the backward pass."""
    guidance: float = 0.0
    """Of the teacher that draws the latents; 0 for the model's own."""
    look: float = 0.1
    """Share of the longest time up to which samples are noised before the teacher's middle is asked for features: a
    denoiser knows no clean samples."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=300, batch=32, rate=1e-5, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0 or not 0 < self.look < 1:
            raise BadInput(
                f"steps {self.steps}, guidance {self.guidance}, look {self.look} of mmd",
                expected="at least 1 step, guidance not below 0, look between 0 and 1",
            )
        if self.training.batch < 2:
            raise BadInput(f"batch {self.training.batch} of mmd", expected="at least 2: pairs are compared")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit or a network without stages, Wrong for a loss turned NaN."""
        times = step_times(model, self.steps)

        def lesson(setting: Setting) -> Lesson:
            features = teacher_features(setting, self.look)
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: mmd_loss(turn, setting, times, features)},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(self, model, ctx, lesson, stage="mmd", guidance=self.guidance)
        scheduler = few_step_scheduler(model, "DDIMScheduler")
        return made(self, spaced(model), trained, scheduler=scheduler, steps=self.steps)


def mmd_loss(turn: Turn, at: Setting, times: Tensor, features: Features) -> Mapping[str, Tensor]:
    """MMD^2 of the student's samples and the latents, of the same conditions."""
    batch, denoising = turn.batch, at.denoising
    x = first(denoising, turn.normal(batch.x0))
    times = times.to(x.device)
    for t, s in pairwise(times):
        step = denoising(turn.student, x, t.expand(len(x)), batch.condition)
        x = denoising.ddim(step, s.expand(len(x)))
    noise = turn.normal(x)
    with torch().no_grad():
        right = features(batch.x0, batch.condition, noise)
    return {"mmd": squared_mmd(features(x, batch.condition, noise), right)}


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of MMD^2 (equation 4): x, y [batch, features].

    x_i and y_i have one condition and so are alike: their pair is left out, as x_i with itself is.
    """
    m = len(x)

    def others(k: Tensor) -> Tensor:
        return (k.sum() - k.diagonal().sum()) / (m * (m - 1))

    return others(cubic(x, x)) + others(cubic(y, y)) - 2 * others(cubic(x, y))


def cubic(x: Tensor, y: Tensor) -> Tensor:
    """(<x, y> / dimension + 1)^3, the paper's kernel and that of the Kernel Inception Distance: [n, m]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def teacher_features(at: Setting, look: float) -> Features:
    """The middle of the teacher, averaged over the map and of unit size in every channel, at one small noise level.

    Raises BadInput for a teacher without stages.
    """
    from .critics import middle, seen_at

    th, denoising = torch(), at.denoising
    where, time = middle(at.teacher), look * denoising.process.t_max

    def features(x0: Tensor, condition: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        from .critics import network_inputs

        t = th.full((len(x0),), time, device=x0.device)
        sample, timestep = network_inputs(denoising, denoising.noised(x0, noise, t), t)
        seen = seen_at(at.teacher, where, (sample, timestep, *condition.values()), stop=True)[1].float()
        size = seen.detach().square().mean().sqrt().clamp(min=1e-6)
        return (seen / size).mean((2, 3))

    return features

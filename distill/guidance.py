"""Guidance distillation: one call of the student answers what guidance needs two calls of the teacher for.

Meng et al. 2022, "On Distillation of Guided Diffusion Models" <arXiv:2210.03142>, stage one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .losses import squared
from .student import Setting, made, taught, teacher_of
from .times import random_times

__all__ = ["DistillGuidance", "Scales", "guidance_loss"]

Tensor = Any
Module = Any
Condition = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scales:
    """Guidance scales that a student is taught together, and the one it is left with: a table of a recipe.

    Told the scale while it learns, it can become the plain network of any of them afterwards: the same pass run again
    with another `baked` finds its training done.
    """

    low: float = 0.0
    high: float = 0.0
    """0: one scale only, the teacher's; the student is told nothing."""
    baked: float = 0.0
    """The one that comes out; 0 for the teacher's own."""

    def __post_init__(self) -> None:
        if self.high and not (
            1 <= self.low < self.high and (not self.baked or self.low <= self.baked <= self.high)
        ):
            raise BadInput(
                f"scales from {self.low} to {self.high}, baked {self.baked}",
                expected="1 <= low <= baked <= high, low below high",
            )
        if not self.high and (self.low or self.baked):
            raise BadInput("low or baked of scales without high", expected="a range of scales")

    def unbaked(self) -> Scales:
        """What the training depends on: it is one for all that may be baked."""
        return replace(self, baked=0.0)

    def learner(self, network: Module) -> Module:
        """What is trained: the network, told the scale where there is a range."""
        if not self.high:
            return network
        from .scaled_network import ScaledNetwork

        return ScaledNetwork(network)

    def draw(self, turn: Turn, own: float) -> float | Tensor:
        """The teacher's guidance in this turn: [batch] of the range, or its own."""
        return turn.uniform(self.low, self.high) if self.high else own

    def told(self, condition: Condition, scale: float | Tensor) -> Condition:
        """What the learner is fed beside sample and time."""
        return {**condition, "scale": scale} if self.high else condition

    def left(self, network: Module, own: float) -> Module:
        """The plain network at the one scale. Raises BadInput where the teacher's own lies outside the range."""
        if not self.high:
            return network
        from .scaled_network import baked

        return baked(network, self.chosen(own))

    def chosen(self, own: float) -> float:
        if self.high and not self.baked and not self.low <= own <= self.high:
            raise BadInput(
                f"scales from {self.low} to {self.high}, while the teacher's own is {own}",
                expected="a range that holds it",
                fix="say with `baked` which one is to come out",
            )
        return self.baked or own


@dataclass(frozen=True)
class DistillGuidance:
    """A pass: the denoiser answers as under guidance, in one call; its steps and its sampler stay as they are."""

    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    scales: Scales = Scales()
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=2000, rate=1e-4)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.guidance < 0:
            raise BadInput(f"guidance {self.guidance} to distill", expected="at least 0")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a model without guidance, a teacher that does not fit, a loss turned NaN."""
        teacher = teacher_of(model, ctx)
        own = self.guidance or teacher.guidance.scale
        if teacher.guidance.kind == "none" or (own == 1 and not self.scales.high):
            raise BadInput(
                f"guidance of {teacher.name} to distill, which is drawn without",
                expected="a teacher with a guidance scale other than 1",
                fix="take guidance out of [recipe] passes, or say which with its `guidance`",
            )
        scale = self.scales.chosen(own)

        def lesson(setting: Setting) -> Lesson:
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: guidance_loss(turn, setting, self)},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            replace(self, scales=self.scales.unbaked()),
            model,
            ctx,
            lesson,
            stage="guidance",
            guidance=self.guidance,
            student=self.scales.learner,
        )
        network = self.scales.left(trained.student, own)
        return made(self, model, trained, network=network, measured={"scale": scale})


def guidance_loss(turn: Turn, at: Setting, how: DistillGuidance) -> Mapping[str, Tensor]:
    """|| student(x_t, t, c, w) - (plain + w (told - plain)) ||^2 in the network's own output, at every noise level."""
    batch, denoising = turn.batch, at.denoising
    t, w = random_times(turn, denoising.process), how.scales.draw(turn, at.guidance)
    x = denoising.noised(batch.x0, turn.normal(batch.x0), t)
    with torch().no_grad():
        there = denoising.guided(at.teacher, x, t, batch.condition, batch.nothing, w)
        right = denoising.target(there.x0, there.noise, t)
    got = denoising.output(turn.student, x, t, how.scales.told(batch.condition, w))
    return {"squared": squared(got, right)}

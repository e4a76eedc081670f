"""Distribution matching distillation with fresh noise between the steps, and a critic for it if there is real data.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis" <arXiv:2405.14867>. Every step
leaps to clean data and noises it again, and the leaps of all steps are matched together: what they draw in sum is
right, each alone need not be (tdm tells them apart by their segments). Several turns of the fake for each of the
student's replace the regression that the first DMD needed (Yin et al. 2023, arXiv:2311.18828).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.process import DiscreteVP
from ..runtime.progress import Progress
from .losses import squared
from .matching import between, fake_loss, fake_of, first, followed, leap, least, pull, step_times
from .student import Setting, few_step_scheduler, made, taught
from .times import spaced

__all__ = ["DMD2", "dmd2_fake_loss", "dmd2_loss", "regression_loss"]

Tensor = Any

MOST = 0.98
"""Share of the longest time up to which samples are compared: the official code's."""
BETAS = (0.0, 0.99)
"""Of AdamW. The official code keeps (0.9, 0.999) over a hundred thousand steps; in hundreds that overshoots."""


@dataclass(frozen=True)
class DMD2:
    """A pass: the denoiser becomes a student of few leaps, with fresh noise after each, without guidance."""

    steps: int = 4
    """Of the student: it is drawn with so many."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    fake_turns: int = 5
    """Updates of the fake for each of the student's: the paper's two time scales, 10 for its SD-1.5."""
    fake_rate: float = 1.0
    """The fake's learning rate over the student's."""
    critic: float = 0.0
    """Weight of the student's adversarial loss, 1e-3 in the paper's SD-1.5; 0 does without. The real data are the
    latents: better ones than the teacher draws make a better student than the teacher."""
    critic_fake: float = 1e-2
    """Weight of the critic's own loss beside the fake's: the paper's."""
    regression: int = 0
    """First turns of the student, which learns the teacher's latents from their own noise: for one step, whose leap
    from noise is too far for the fake to follow."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """Only the prompts matter, unless there is a critic or a regression."""
    training: Training = Training(steps=2000, rate=1e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name, least_allowed in (("steps", 1), ("fake_turns", 1), ("regression", 0)):
            if getattr(self, name) < least_allowed:
                raise BadInput(f"{name} of dmd2: {getattr(self, name)}", expected=f"at least {least_allowed}")
        if min(self.guidance, self.critic, self.critic_fake) < 0 or not self.fake_rate > 0:
            raise BadInput(
                f"guidance {self.guidance}, critic {self.critic}, critic_fake {self.critic_fake}, fake_rate "
                f"{self.fake_rate} of dmd2",
                expected="none below 0, fake_rate above it",
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit, a critic where the network has no stages, several steps of
        a process without discrete levels; Wrong for a loss turned NaN."""
        if self.steps > 1 and not isinstance(model.process, DiscreteVP):
            raise BadInput(
                f"dmd2 of {self.steps} steps for {model.name}, whose process is {model.process.to_json()['kind']}",
                expected="discrete noise levels: its scheduler, which noises again, knows no others",
                fix="tdm in its place, or steps = 1",
            )
        times = step_times(model, self.steps)

        def lesson(setting: Setting) -> Lesson:
            fake = fake_of(setting.teacher)
            if self.critic:
                from .critics import Opinion

                fake = Opinion.of(fake, setting.model)
            return Lesson(
                {"student": setting.student, "fake": fake},
                {
                    "student": lambda turn: (
                        regression_loss(turn, setting, times)
                        if turn.step < self.regression
                        else dmd2_loss(turn, setting, self, times)
                    ),
                    "fake": lambda turn: dmd2_fake_loss(turn, setting, self, times),
                },
                setting.key,
                turns=lambda step: (
                    ("student",) if step < self.regression else (*("fake",) * self.fake_turns, "student")
                ),
                rates={"fake": self.fake_rate},
                betas=BETAS,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            self,
            model,
            ctx,
            lesson,
            stage="dmd2",
            guidance=self.guidance,
            drawn=bool(self.critic or self.regression),
        )
        scheduler = few_step_scheduler(model, "LCMScheduler" if self.steps > 1 else "DDIMScheduler")
        if scheduler is not None and self.steps > 1:
            scheduler["original_inference_steps"] = (
                self.steps
            )  # its grid is then the trailing one of these steps
        return made(self, spaced(model), trained, scheduler=scheduler, steps=self.steps)


def dmd2_loss(turn: Turn, at: Setting, how: DMD2, times: Tensor) -> Mapping[str, Tensor]:
    """The student's: its clean samples, noised anywhere, move to where teacher and fake agree (section 4)."""
    step = leap(turn, at, turn.student, times, fresh=True, learns=True)
    x0 = step.estimate.x0
    t = between(at.denoising, turn, least(at.denoising), MOST * torch().full_like(step.t, times[0]))
    x = at.denoising.noised(x0, turn.normal(x0), t)
    towards = pull(at, turn.networks["fake"], x0, x.detach(), t, turn.batch)
    losses = {"pull": followed(x0, towards, 0.0), "apart": towards.difference.square().mean().sqrt()}
    if how.critic:
        from .critics import opinion

        real = opinion(at.denoising, turn.networks["fake"], x, t, turn.batch.condition)
        losses["critic"] = how.critic * torch().nn.functional.softplus(-real).mean()
    return losses


def dmd2_fake_loss(turn: Turn, at: Setting, how: DMD2, times: Tensor) -> Mapping[str, Tensor]:
    """The fake's: it denoises the student's clean samples at all times, and tells them from real ones."""
    th, batch, fake = torch(), turn.batch, turn.networks["fake"]
    step = leap(turn, at, turn.student, times, fresh=True, learns=False)
    x0 = step.estimate.x0
    t = between(at.denoising, turn, least(at.denoising), th.full_like(step.t, times[0]))
    x = at.denoising.noised(x0, turn.normal(x0), t)
    losses = {"denoising": fake_loss(at.denoising, fake, x0, x, t, batch.condition, cap=None)}
    if how.critic:
        from .critics import opinion

        softplus = th.nn.functional.softplus
        real = at.denoising.noised(batch.x0, turn.normal(x0), t)
        both = [opinion(at.denoising, fake, one, t, batch.condition) for one in (x, real)]
        losses["critic"] = how.critic_fake * (softplus(both[0]) + softplus(-both[1])).mean()
    return losses


def regression_loss(turn: Turn, at: Setting, times: Tensor) -> Mapping[str, Tensor]:
    """The teacher's latents from the noise it drew them from, in one leap. Raises BadInput for pictures' latents."""
    x = first(at.denoising, turn.batch.start())
    t = times[0].to(x.device).expand(len(x))
    got = at.denoising(turn.student, x, t, turn.batch.condition).x0
    return {"regression": squared(got, turn.batch.x0)}

"""The adversarial stage of SDXL-Lightning: one step of the student must look like several of the teacher.

Lin, Wang and Yang 2024, "SDXL-Lightning: Progressive Adversarial Diffusion Distillation" <arXiv:2402.13929>. A squared
error over a long step is a mean over all it may become, and blurs; a discriminator asks for one of them. While it sees
where the step began it also keeps the student on the teacher's way; afterwards it sees the ends alone, which lets a
student of small capacity leave the way for a sharper end. Progressive distillation comes before it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .matching import cleanest, diffused, first, step_times
from .student import Setting, few_step_scheduler, made, taught
from .times import spaced

__all__ = ["Adversarial", "Pair", "discriminator_loss", "pair_of", "student_loss"]

Tensor = Any
Look = tuple[Tensor, Tensor]

BETAS = (0.0, 0.99)
"""Of Adam, for student and discriminators: the paper's, section 4."""


@dataclass(frozen=True)
class Adversarial:
    """A pass: a few-step student is sharpened by a discriminator that sees its steps beside the teacher's."""

    steps: int = 4
    """Of the student, by DDIM."""
    substeps: int = 8
    """Of the guided teacher inside one of the student's: the paper's first such stage goes from 32 to 4 * 2 steps."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    paired: float = 0.5
    """Share of the training in which the discriminator sees where a step began. The paper trains both parts alike."""
    looks: tuple[float, ...] = ()
    """Times, as shares of the longest, up to one of which an end is noised before it is judged. Empty: judged as it
    is. The paper's for 1 and 2 steps: (0.01, 0.25, 0.5, 0.75)."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=1000, rate=2e-5, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("steps", "substeps"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} of adversarial: {getattr(self, name)}", expected="at least 1")
        if not 0 <= self.paired <= 1 or self.guidance < 0 or not all(0 < look < 1 for look in self.looks):
            raise BadInput(
                f"paired {self.paired}, guidance {self.guidance}, looks {list(self.looks)} of adversarial",
                expected="shares from 0 to 1, guidance not below 0",
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit or a network without stages, Wrong for a loss turned NaN."""
        times = step_times(model, self.steps)
        last_paired = round(self.paired * self.training.steps)

        def lesson(setting: Setting) -> Lesson:
            from .critics import Discriminator

            pairs, ends = (Discriminator.of(setting.teacher, setting.model, number) for number in (2, 1))

            def judge(step: int) -> str:
                return "pairs" if step < last_paired else "ends"

            def discriminate(turn: Turn) -> Mapping[str, Tensor]:
                return discriminator_loss(turn, setting, self, times, judge(turn.step))

            return Lesson(
                {"student": setting.student, "pairs": pairs, "ends": ends},
                {
                    "student": lambda turn: student_loss(turn, setting, self, times, judge(turn.step)),
                    "pairs": discriminate,
                    "ends": discriminate,
                },
                setting.key,
                turns=lambda step: (judge(step), "student"),
                betas=BETAS,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(self, model, ctx, lesson, stage="adversarial", guidance=self.guidance)
        scheduler = few_step_scheduler(model, "DDIMScheduler")
        return made(self, spaced(model), trained, scheduler=scheduler, steps=self.steps)


@dataclass(frozen=True)
class Pair:
    """A step, [batch, ...]: where it begins, where the teacher's small steps and the student's single one end."""

    x: Tensor
    t: Tensor
    s: Tensor
    teachers: Tensor | None
    students: Tensor


def discriminator_loss(
    turn: Turn, at: Setting, how: Adversarial, times: Tensor, judge: str
) -> Mapping[str, Tensor]:
    """-log D(the teacher's end) - log(1 - D(the student's)), equation 8."""
    with torch().no_grad():
        pair = pair_of(turn, at, how, times, teachers=True)
    softplus, critic = torch().nn.functional.softplus, turn.networks[judge]
    real = _verdict(turn, at, how, critic, judge, pair, pair.teachers)
    fake = _verdict(turn, at, how, critic, judge, pair, pair.students)
    return {"told": (softplus(-real) + softplus(fake)).mean()}


def student_loss(
    turn: Turn, at: Setting, how: Adversarial, times: Tensor, judge: str
) -> Mapping[str, Tensor]:
    """-log D(the student's end), equation 9."""
    pair = pair_of(turn, at, how, times, teachers=False)
    real = _verdict(turn, at, how, turn.networks[judge], judge, pair, pair.students)
    return {"fooled": torch().nn.functional.softplus(-real).mean()}


def pair_of(turn: Turn, at: Setting, how: Adversarial, times: Tensor, *, teachers: bool) -> Pair:
    """A step of every sample at random among the student's; the first begins with noise alone (section 3.5)."""
    th, batch, denoising = torch(), turn.batch, at.denoising
    times = times.to(batch.x0.device)
    i = turn.integers(0, len(times) - 1)
    t, s, noise = times[i], times[i + 1], turn.normal(batch.x0)
    beginning = (i == 0).view(-1, *[1] * (noise.ndim - 1))
    x = th.where(beginning, first(denoising, noise), denoising.noised(batch.x0, noise, t))
    end = None
    if teachers:
        end = x
        for k in range(how.substeps):
            begin, until = (t + (s - t) * j / how.substeps for j in (k, k + 1))
            step = denoising.guided(at.teacher, end, begin, batch.condition, batch.nothing, at.guidance)
            end = denoising.ddim(step, until)
    estimate = denoising(turn.student, x, t, batch.condition)
    return Pair(x, t, s, end, denoising.ddim(estimate, s))


def _verdict(
    turn: Turn, at: Setting, how: Adversarial, critic: Any, judge: str, pair: Pair, end: Tensor
) -> Tensor:
    """[batch] logits about an end, beside its beginning or alone; noised up to one of the looks."""
    from .critics import verdict

    th, s = torch(), pair.s
    if how.looks:
        look = th.tensor(how.looks, device=s.device)[turn.integers(0, len(how.looks))]
        s = th.maximum(s, look * at.denoising.process.t_max)
        end = diffused(at.denoising, end, pair.s, s, turn.normal(end))  # no noise where it is noisier already
    s = s.clamp(min=cleanest(at.denoising))
    both: list[Look] = [(end, s)]
    if judge == "pairs":
        both.append((pair.x, pair.t))
    return verdict(at.denoising, critic, both, turn.batch.condition)

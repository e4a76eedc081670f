"""Progressive distillation: a student whose one step is two of its teacher's, again and again until few are left.

Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models" <arXiv:2202.00512>, algorithm 2.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Trained, Training, Turn, train
from ..runtime.errors import BadInput
from ..runtime.process import Array
from ..runtime.progress import Progress, within
from .student import DRAWN_SHARE, Setting, few_step_scheduler, made, prepared
from .times import drawn_times, spaced, stage_times

__all__ = ["Progressive", "progressive_loss"]

Tensor = Any


@dataclass(frozen=True)
class Progressive:
    """A pass: start -> start / 2 -> ... -> steps, each stage the teacher of the next, guidance going in with the first.

    `training` says how each stage is trained. SDXL-Lightning (Lin et al. 2024, arXiv:2402.13929) takes this for its
    first stage.
    """

    steps: int = 4
    """That the model is then drawn with, by DDIM."""
    start: int = 32
    """Steps of the guided teacher that the first stage halves: steps times a power of 2."""
    guidance: float = 0.0
    """Of the teacher in the first stage; 0 for the model's own."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=1000, rate=1e-4)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"steps of progressive: {self.steps}", expected="at least 1")
        if self.guidance < 0:
            raise BadInput(f"guidance {self.guidance} of progressive", expected="at least 0")
        halvings, rest = divmod(self.start, self.steps)
        if rest or halvings < 2 or halvings & (halvings - 1):
            raise BadInput(
                f"{self.start} steps to start with for {self.steps} steps in progressive",
                expected="steps times 2, 4, 8, ...",
                fix=f"start = {8 * self.steps}",
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """Steps of each stage's student."""
        found = []
        count = self.start
        while count > self.steps:
            count //= 2
            found.append(count)
        return tuple(found)

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """A finished stage is not trained again where the run was interrupted in a later one.

        Raises BadInput for steps whose times the model does not have, a teacher that does not fit, a loss turned NaN.
        """
        drawn_times(model, self.steps)
        ways = [stage_times(model, count) for count in self.stages]
        setting = yield from within(
            prepared(self, model, ctx, self.latents, guidance=self.guidance), 0, DRAWN_SHARE
        )
        how = replace(self.training, seed=self.training.seed + ctx.seed)
        losses: dict[str, Mapping[str, float]] = {}
        trained: Trained | None = None
        for number, (count, times) in enumerate(zip(self.stages, ways, strict=True)):
            begin, end = (DRAWN_SHARE + (1 - DRAWN_SHARE) * n / len(ways) for n in (number, number + 1))
            trained = yield from within(
                train(_lesson(setting, times), setting.samples, how, ctx.store, f"progressive-{count}"),
                begin,
                end,
            )
            losses[str(count)] = trained.losses
            learner = copy.deepcopy(trained.student).requires_grad_(True)
            setting = replace(setting, teacher=trained.student, student=learner, guidance=1.0)
        assert trained is not None
        scheduler = few_step_scheduler(model, "DDIMScheduler")
        return spaced(
            made(self, model, trained, scheduler=scheduler, steps=self.steps, measured={"stages": losses})
        )


def _lesson(at: Setting, times: Array) -> Lesson:
    return Lesson(
        {"student": at.student},
        {"student": lambda turn: progressive_loss(turn, at, times)},
        at.key,
        frozen=(at.teacher,),
    )


def progressive_loss(turn: Turn, at: Setting, times: Array) -> Mapping[str, Tensor]:
    """max(SNR, 1) || x0 - x0~ ||^2: with x0~ one step of DDIM from t to s ends where two of the teacher end.

    times  [2 steps + 1]: the teacher's, falling to 0; every other one is the student's
    """
    th, batch, denoising = torch(), turn.batch, at.denoising
    i = 2 * turn.integers(0, len(times) // 2).cpu().numpy()
    t, middle, s = (th.as_tensor(times[i + k], device=batch.x0.device) for k in (0, 1, 2))
    x = denoising.noised(batch.x0, turn.normal(batch.x0), t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = denoising.signal(t), denoising.signal(s)
    with th.no_grad():
        x_s = x
        for begin, end in ((t, middle), (middle, s)):
            step = denoising.guided(at.teacher, x_s, begin, batch.condition, batch.nothing, at.guidance)
            x_s = denoising.ddim(step, end)
        ratio = sigma_s / sigma_t
        right = (x_s - ratio * x) / (alpha_s - ratio * alpha_t)
        weight = (alpha_t / sigma_t).square().clamp(min=1)  # section 4, "truncated SNR"
    got = denoising(turn.student, x, t, batch.condition).x0
    return {"squared": (weight * (got - right).square()).mean()}

"""Trajectory distribution matching: every step of a few-step student ends where the teacher's samples are at that time.

Luo et al. 2025, "Learning Few-Step Diffusion Models by Trajectory Distribution Matching" <arXiv:2503.06674>. The
student is a deterministic sampler of K steps. What step i leaves behind is noised to a random time of that step's own
segment and shown to the teacher and to the fake, which knows the student's samples; segments do not overlap, so that
one fake tells the K distributions apart by their time. No data is needed, prompts alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Batch, Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .matching import (
    Leap,
    between,
    diffused,
    fake_loss,
    fake_of,
    followed,
    leap,
    least,
    listed,
    pull,
    step_times,
)
from .student import Setting, few_step_scheduler, made, taught
from .times import spaced

__all__ = ["TDM", "tdm_fake_loss", "tdm_loss"]

Tensor = Any

TARGETS = ("clean", "noise")


@dataclass(frozen=True)
class TDM:
    """A pass: the denoiser becomes a student of few deterministic steps without guidance. Needs no data."""

    steps: int = 4
    """Of the student: it is drawn with so many."""
    also: tuple[int, ...] = ()
    """Other numbers of steps it is trained for as well, each batch for one of them. It is not told which."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    target: str = "clean"
    """What the fake learns of a sample that is noisy still: clean, the student's clean estimate, as the official code
    does; noise, the noise added since, which makes the fake the exact score of the student's distribution."""
    huber_c: float = 1e-3
    """Of the pseudo-Huber loss, as in the official code; 0 for the squared one."""
    fake_rate: float = 5.0
    """The fake's learning rate over the student's: the official code's."""
    fake_turns: int = 1
    """Updates of the fake for each of the student's."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """Only the prompts matter: nothing is drawn."""
    training: Training = Training(steps=2000, rate=1e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for count in (self.steps, self.fake_turns, *self.also):
            if count < 1:
                raise BadInput(
                    f"steps {self.steps}, also {list(self.also)}, fake_turns {self.fake_turns} of tdm",
                    expected="at least 1 each",
                )
        if self.target not in TARGETS:
            raise BadInput(f"target of tdm: {self.target!r}", expected=" or ".join(TARGETS))
        if self.huber_c < 0 or self.guidance < 0 or not self.fake_rate > 0:
            raise BadInput(
                f"huber_c {self.huber_c}, guidance {self.guidance}, fake_rate {self.fake_rate} of tdm",
                expected="none below 0, fake_rate above it",
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit or prompts it does not take, Wrong for a loss turned NaN."""
        grids = [step_times(model, steps) for steps in listed(self.steps, self.also)]

        def lesson(setting: Setting) -> Lesson:
            kept: list[Segment] = []
            return Lesson(
                {"student": setting.student, "fake": fake_of(setting.teacher)},
                {
                    "student": lambda turn: tdm_loss(turn, setting, self, grids, kept),
                    "fake": lambda turn: tdm_fake_loss(turn, setting, self, grids, kept),
                },
                setting.key,
                turns=lambda step: ("student", *("fake",) * self.fake_turns),
                rates={"fake": self.fake_rate},
                betas=BETAS,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            self, model, ctx, lesson, stage="tdm", guidance=self.guidance, drawn=False
        )
        scheduler = few_step_scheduler(model, "DDIMScheduler")
        return made(self, spaced(model), trained, scheduler=scheduler, steps=self.steps)


BETAS = (0.0, 0.95)
"""Of AdamW, for both networks: the official code's."""


@dataclass(frozen=True)
class Segment:
    """What a step of the student leaves behind at its end, noised to a time of that step's own segment."""

    batch: Batch
    step: Leap
    x: Tensor
    t: Tensor
    added: Tensor
    """The noise since the end of the step."""


def tdm_loss(
    turn: Turn, at: Setting, how: TDM, grids: Sequence[Tensor], kept: list[Segment] | None = None
) -> Mapping[str, Tensor]:
    """The student's: its clean estimate moves to where teacher and fake agree about the segment.

    kept  gets what was drawn: the fake's turn after this one learns from it
    """
    one = _segment(turn, at, _grid(turn, grids), learns=True)
    if kept is not None:
        kept.append(one)
    x0 = one.step.estimate.x0
    towards = pull(at, turn.networks["fake"], x0, one.x, one.t, turn.batch)
    return {
        "pull": followed(x0, towards, how.huber_c),
        "apart": towards.difference.square().mean().sqrt(),
    }


def tdm_fake_loss(
    turn: Turn, at: Setting, how: TDM, grids: Sequence[Tensor], kept: list[Segment] | None = None
) -> Mapping[str, Tensor]:
    """The fake's: it denoises what the student's steps leave behind; what was kept, if anything."""
    one = kept.pop(0) if kept else _segment(turn, at, _grid(turn, grids), learns=False)
    x0, x = one.step.estimate.x0.detach(), one.x
    alpha, sigma = at.denoising.signal(one.t)
    if how.target == "noise":
        _, fresh = at.denoising.onward(one.step.s, one.t)
        x0 = (x - sigma.square() / fresh.clamp(min=1e-8) * one.added) / alpha
        weight = (fresh / sigma).square()  # of one unit of noise, whatever came before it
    else:
        weight = _gaussian((x - alpha * x0) / sigma, one.added)
    condition = one.batch.condition
    return {"denoising": fake_loss(at.denoising, turn.networks["fake"], x0, x, one.t, condition, weight)}


def _grid(turn: Turn, grids: Sequence[Tensor]) -> Tensor:
    """The times of this batch's number of steps: each number's in its turn."""
    return grids[int(torch().randint(len(grids), (1,), generator=turn.random))]


def _segment(turn: Turn, at: Setting, times: Tensor, *, learns: bool) -> Segment:
    step = leap(turn, at, turn.student, times, learns=learns)
    t = between(at.denoising, turn, step.s.clamp(min=least(at.denoising)), step.t)
    added = turn.normal(step.x)
    end = at.denoising.ddim(step.estimate, step.s).detach()
    return Segment(turn.batch, step, diffused(at.denoising, end, step.s, t, added), t, added)


def _gaussian(mixed: Tensor, added: Tensor) -> Tensor:
    """exp(-|mixed|^2 / 2d) / exp(-|added|^2 / 2d): the student's noise counts as far as it looks like noise."""
    energy = mixed.square().flatten(1).mean(1) - added.square().flatten(1).mean(1)
    return (-0.5 * energy).exp().view(-1, *[1] * (mixed.ndim - 1))

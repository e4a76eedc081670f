"""Score identity distillation: a generator of one step, from no data, through the teacher's and the fake's gradients.

Zhou et al. 2024, "Score identity Distillation" <arXiv:2404.04057>, algorithm 1; with a guided teacher as in "Long and
Short Guidance in Score identity Distillation" <arXiv:2406.01561>. Unlike DMD's, the loss is differentiated through both
networks.
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
from .matching import between, fake_loss, fake_of, first, least, step_times
from .student import Setting, few_step_scheduler, made, taught
from .times import spaced

__all__ = ["SiD", "sid_fake_loss", "sid_loss"]

Tensor = Any

MOST = 0.8
"""Share of the longest time up to which samples are compared: 800 of 1000, the official code's."""
BETAS = (0.0, 0.999)
"""Of Adam, for both networks: the official code's."""


@dataclass(frozen=True)
class SiD:
    """A pass: the denoiser becomes a generator of one step. Needs no data. Begins with noise at the longest time."""

    alpha: float = 1.2
    """How much of the squared difference is taken off: 1.2 in most of the paper's experiments, 1 in some."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    fake_rate: float = 1.0
    """The fake's learning rate over the student's: the paper's are equal."""
    fake_turns: int = 1
    """Updates of the fake for each of the student's."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """Only the prompts matter: nothing is drawn."""
    training: Training = Training(steps=2000, rate=1e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.guidance < 0 or not self.fake_rate > 0 or self.fake_turns < 1:
            raise BadInput(
                f"guidance {self.guidance}, fake_rate {self.fake_rate}, fake_turns {self.fake_turns} of sid",
                expected="guidance not below 0, fake_rate above it, fake_turns at least 1",
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit or prompts it does not take, Wrong for a loss turned NaN."""
        times = step_times(model, 1)

        def lesson(setting: Setting) -> Lesson:
            return Lesson(
                {"student": setting.student, "fake": fake_of(setting.teacher)},
                {
                    "student": lambda turn: sid_loss(turn, setting, self.alpha, times),
                    "fake": lambda turn: sid_fake_loss(turn, setting, times),
                },
                setting.key,
                turns=lambda step: (*("fake",) * self.fake_turns, "student"),
                rates={"fake": self.fake_rate},
                betas=BETAS,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            self, model, ctx, lesson, stage="sid", guidance=self.guidance, drawn=False
        )
        scheduler = few_step_scheduler(model, "DDIMScheduler")
        return made(self, spaced(model), trained, scheduler=scheduler, steps=1)


def sid_loss(turn: Turn, at: Setting, alpha: float, times: Tensor) -> Mapping[str, Tensor]:
    """(f - g) . ((f - y) - alpha (f - g)) over |y - f|: y the student's, f and g teacher's and fake's of y noised.

    The first factor estimates the gradient of the divergence; the second cancels the part of its square that a fake
    which lags behind gets wrong (equations 20 to 23).
    """
    batch, denoising = turn.batch, at.denoising
    y = _drawn(turn, at, times)
    t = between(denoising, turn, least(denoising), MOST * times[0].to(y.device).expand(len(y)))
    x = denoising.noised(y, turn.normal(y), t)
    f = denoising.guided(at.teacher, x, t, batch.condition, batch.nothing, at.guidance).x0
    g = denoising(turn.networks["fake"], x, t, batch.condition).x0
    size = (y - f).detach().abs().flatten(1).mean(1).clamp(min=1e-5)  # the official code's
    product = ((f - g) * ((f - y) - alpha * (f - g))).flatten(1).mean(1)
    return {"identity": (product / size).mean(), "apart": (f - g).detach().square().mean().sqrt()}


def sid_fake_loss(turn: Turn, at: Setting, times: Tensor) -> Mapping[str, Tensor]:
    """The fake's: it denoises what the student draws."""
    with torch().no_grad():
        y = _drawn(turn, at, times)
    t = between(at.denoising, turn, least(at.denoising), times[0].to(y.device).expand(len(y)))
    x = at.denoising.noised(y, turn.normal(y), t)
    return {"denoising": fake_loss(at.denoising, turn.networks["fake"], y, x, t, turn.batch.condition)}


def _drawn(turn: Turn, at: Setting, times: Tensor) -> Tensor:
    """[batch, ...]: clean samples of the student."""
    noise = turn.normal(turn.batch.x0)
    t = times[0].to(noise.device).expand(len(noise))
    return at.denoising(turn.student, first(at.denoising, noise), t, turn.batch.condition).x0

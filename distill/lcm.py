"""Latent consistency distillation: one call leaps from any time to clean data, guidance included.

Luo et al. 2023, "Latent Consistency Models" <arXiv:2310.04378>, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.process import DiscreteVP
from ..runtime.progress import Progress
from .guidance import Scales
from .losses import pseudo_huber
from .solver import Solver, teacher_step
from .student import Setting, few_step_scheduler, made, taught, teacher_of

__all__ = ["LCM", "boundary", "check_process", "consistency", "lcm_loss"]

Tensor = Any

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0
"""Both as every published LCM has them, and as the sampler `lcm` of the runtime."""


@dataclass(frozen=True)
class LCM:
    """A pass: the denoiser becomes a consistency model that draws in 2 to 8 calls without guidance."""

    steps: int = 4
    """That the model is then drawn with unless told otherwise; training does not depend on it."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    intervals: int = 50
    """Of the DDIM grid that the teacher steps on: the paper's skip of 20 of 1000 levels."""
    huber_c: float = 1e-3
    """Of the pseudo-Huber loss, as in diffusers' training script."""
    scales: Scales = Scales()  # noqa: RUF009 - frozen
    """A range of guidance in place of the one scale, as in the paper (5 to 15 there)."""
    solver: Solver = Solver()  # noqa: RUF009 - frozen
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=2000, rate=1e-4, average=0.95)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("intervals", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} of lcm: {getattr(self, name)}", expected=f"at least {least}")
        if not self.huber_c > 0 or self.guidance < 0:
            raise BadInput(
                f"huber_c {self.huber_c}, guidance {self.guidance} of lcm", expected="huber_c above 0"
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a model without discrete noise levels, a teacher that does not fit, a loss turned NaN."""
        check_process("lcm", model)
        own = self.guidance or teacher_of(model, ctx).guidance.scale
        self.scales.chosen(own)

        def lesson(setting: Setting) -> Lesson:
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: lcm_loss(turn, setting, self)},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            replace(self, scales=self.scales.unbaked()),
            model,
            ctx,
            lesson,
            stage="lcm",
            guidance=self.guidance,
            student=self.scales.learner,
        )
        network = self.scales.left(trained.student, own)
        scheduler = few_step_scheduler(model, "LCMScheduler")
        return made(self, model, trained, network=network, scheduler=scheduler, steps=self.steps)


def check_process(name: str, model: Model) -> None:
    """Raises BadInput for a model without discrete noise levels."""
    if not isinstance(model.process, DiscreteVP):
        raise BadInput(
            f"{name} for {model.name}, whose process is {model.process.to_json()['kind']}",
            expected="discrete noise levels: the boundary condition counts in timesteps",
            fix="tdm or pcm in its place",
        )


def lcm_loss(turn: Turn, at: Setting, how: LCM) -> Mapping[str, Tensor]:
    """|| f(x_t, t) - f^-(x_s, s) ||: s is the grid's next time towards clean, x_s the teacher's guided DDIM step."""
    th, batch, denoising = torch(), turn.batch, at.denoising
    width = denoising.process.t_max / how.intervals
    n = turn.integers(0, how.intervals)
    t, s = (n + 1) * width, th.clamp(n * width, min=1.0)  # level 0, time 1: the cleanest the network knows
    x = denoising.noised(batch.x0, turn.normal(batch.x0), t)
    w = how.scales.draw(turn, at.guidance)
    x_s = teacher_step(turn, denoising, at.teacher, x, t, s, batch.condition, w, how.solver)
    condition = how.scales.told(batch.condition, w)
    with th.no_grad():
        right = consistency(turn.average, at, x_s, s, condition)
    got = consistency(turn.student, at, x, t, condition)
    return {"huber": pseudo_huber(got, right, how.huber_c)}


def consistency(network: Any, at: Setting, x: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
    """f(x, t) = c_skip x + c_out x0."""
    c_skip, c_out = boundary(t - 1)
    return c_skip * x + c_out * at.denoising(network, x, t, condition).x0


def boundary(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, [batch, 1, 1, 1]: f(x, 0) = x (section 4.1; the scaled timestep from the official models)."""
    scaled = TIMESTEP_SCALING * timestep.float().view(-1, 1, 1, 1)
    whole = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / whole, scaled / whole.sqrt()

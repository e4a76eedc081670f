"""BOOT: a generator of one step that follows its teacher's way from the noise on, time by time, from no data.

Gu et al. 2023, "BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping" <arXiv:2306.05544>. The
student is shown the noise alone and a time t; it answers the signal y_t that lies in the teacher's sample then,
x_t = alpha_t y_t + sigma_t noise. The longest time is learned from the teacher, every other from the one before it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Denoising, Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.process import DiscreteVP
from ..runtime.progress import Progress
from .losses import squared
from .student import Setting, made, taught

__all__ = ["BOOT", "boot_loss", "boot_scheduler", "signal_of"]

Tensor = Any
Module = Any

END = 2.0
"""What the student is told for time 0, level 1: of two levels, a scheduler of one trailing step calls the second. Not
level 0, since diffusers' Stable Diffusion pipelines move leading steps on by one."""


@dataclass(frozen=True)
class BOOT:
    """A pass: the denoiser becomes a generator of one step. Needs no data and no second network that learns."""

    intervals: int = 50
    """Euler steps of the signal's ODE from noise to data, even in time. Data of width 0.4 becomes 0.332 wide with 20,
    0.367 with 50, 0.382 with 100; a turn of the training costs the same, but each time waits for the one before it."""
    boundary: float = 0.1
    """Share of the samples that learn where the way begins: the teacher's own answer to the noise."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """Only the prompts matter: nothing is drawn."""
    training: Training = Training(steps=2000, rate=1e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.intervals < 2 or self.guidance < 0:
            raise BadInput(
                f"intervals {self.intervals}, guidance {self.guidance} of boot",
                expected="intervals at least 2, guidance not below 0",
            )
        if not 0 < self.boundary < 1:
            raise BadInput(f"boundary of boot: {self.boundary}", expected="a share between 0 and 1")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a model without discrete noise levels, a teacher that does not fit, a loss turned NaN."""
        if not isinstance(model.process, DiscreteVP):
            raise BadInput(
                f"boot for {model.name}, whose process is {model.process.to_json()['kind']}",
                expected="discrete noise levels: its scheduler has to read noise at a timestep of data",
                fix="reflow and flow_guided in its place",
            )
        reads = _reading(model)

        def lesson(setting: Setting) -> Lesson:
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: boot_loss(turn, setting, self, reads)},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            self, model, ctx, lesson, stage="boot", guidance=self.guidance, drawn=False
        )
        process = _at_once(model.process)
        scheduler = boot_scheduler(process, reads.prediction)
        return made(
            self, model, trained, scheduler=scheduler, steps=1, prediction=reads.prediction, process=process
        )


def boot_loss(turn: Turn, at: Setting, how: BOOT, reads: Denoising) -> Mapping[str, Tensor]:
    """|| g(noise, s) - (rho y_t + (1 - rho) f(x_t, t)) ||^2, rho = sigma_s alpha_t / (sigma_t alpha_s).

    f is the teacher's clean estimate at x_t = alpha_t y_t + sigma_t noise, y_t = g(noise, t) without gradients: DDIM's
    step from t to s, told of the signal. At the longest time || g(noise, T) - f(noise, T) ||^2.
    """
    th, batch, denoising = torch(), turn.batch, at.denoising
    noise = turn.normal(batch.x0)
    longest = denoising.process.t_max
    width = longest / how.intervals
    n = turn.integers(1, how.intervals + 1)
    begins = turn.uniform(0, 1) < how.boundary
    t = th.where(begins, longest, n * width)
    s = th.where(begins, longest, (n - 1) * width)  # at time 0 rho is 0 and y the clean estimate
    (alpha_t, sigma_t), (alpha_s, sigma_s) = denoising.signal(t), denoising.signal(s)
    here = begins.view(-1, 1, 1, 1)
    with th.no_grad():
        y = signal_of(reads, turn.student, noise, t, batch.condition)
        x = th.where(here, noise, alpha_t * y + sigma_t * noise)
        f = denoising.guided(at.teacher, x, t, batch.condition, batch.nothing, at.guidance).x0
        rho = sigma_s * alpha_t / (sigma_t * alpha_s)
        right = th.where(here, f, rho * y + (1 - rho) * f)
    got = signal_of(reads, turn.student, noise, s, batch.condition)
    return {"signal": squared(got, right)}


def signal_of(
    reads: Denoising, network: Module, noise: Tensor, t: Tensor, condition: Mapping[str, Tensor]
) -> Tensor:
    """y_t = g(noise, t). Whatever the time, the output is read as at the longest: noise is what the network sees there,
    so that the teacher's weights answer rightly at the first step of the training."""
    output = reads.output(network, noise, t.clamp(min=END), condition)
    return reads.read(output, noise, t * 0 + reads.process.t_max).x0


def boot_scheduler(process: DiscreteVP, prediction: str) -> dict[str, Any]:
    """The config of a diffusers scheduler that calls the student once, with noise, at timestep 1."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": int(process.t_max),
        "trained_betas": list(process.source["betas"]),
        "prediction_type": prediction,
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # unread; Stable Diffusion pipelines set it
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }


def _at_once(process: DiscreteVP) -> DiscreteVP:
    """Two levels, the other process's first and last: at timestep 1 the student is shown noise, and noise is read."""
    first, last = process.alphas_cumprod[0], process.alphas_cumprod[-1]
    return DiscreteVP.from_betas(np.array([1 - first, 1 - last / first]))


def _reading(model: Model) -> Denoising:
    """How the student's output is read. Noise at the longest time says next to nothing of the data: a student of a
    teacher that predicts it answers clean data instead, and has to learn to."""
    return Denoising(model.process, "sample" if model.prediction == "epsilon" else model.prediction)

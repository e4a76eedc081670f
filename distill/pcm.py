"""Phased consistency: the way from noise to data falls into as many phases as there will be steps, and one call leaps
from anywhere in a phase straight to its end.

Wang et al. 2024, "Phased Consistency Models" <arXiv:2405.18407>. Its adversarial term is not part of this file.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Denoising, Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.process import EDM, Array, DiscreteVP, Process
from ..runtime.progress import Progress
from .losses import pseudo_huber
from .solver import Solver, teacher_step
from .student import Setting, few_step_scheduler, made, taught
from .times import drawn_times, spaced

__all__ = ["PCM", "Phases", "jump", "pcm_loss"]

Tensor = Any
Module = Any
Condition = Mapping[str, Tensor]

RHO = 7
"""Root in which an EDM's noise levels are even (Karras et al. 2022, arXiv:2206.00364, section 3)."""
EMPTY = 0.1
"""Share of samples without a condition where guidance is kept, as in the paper's code."""


@dataclass(frozen=True)
class PCM:
    """A pass: the denoiser draws in exactly `steps` deterministic calls of DDIM, guidance included."""

    steps: int = 4
    """Phases, and calls that the model is then drawn with: other numbers need another student."""
    segments: tuple[int, ...] = ()
    """Phases over the training, each number for an equal share of it; the last is `steps`. (8, 4, 2) is MLCM's way
    (Xie et al. 2024, arXiv:2406.05768): long leaps grow out of short ones. Empty for `steps` alone."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    guided: bool = False
    """The student keeps classifier-free guidance, and so negative prompts: it learns from an unguided teacher."""
    intervals: int = 50
    """Steps of the teacher from noise to data, shared out evenly to the phases: the paper's 50."""
    huber_c: float = 1e-3
    """Of the pseudo-Huber loss: the paper's code."""
    solver: Solver = Solver()  # noqa: RUF009 - frozen
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=2000, rate=1e-4, average=0.95)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("intervals", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} of pcm: {getattr(self, name)}", expected=f"at least {least}")
        if not self.huber_c > 0 or self.guidance < 0:
            raise BadInput(
                f"huber_c {self.huber_c}, guidance {self.guidance} of pcm", expected="huber_c above 0"
            )
        if self.segments and (self.segments[-1] != self.steps or min(self.segments) < 1):
            raise BadInput(
                f"segments {list(self.segments)} of pcm for {self.steps} steps",
                expected=f"numbers of phases, the last of them {self.steps}",
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for steps that the model's noise levels do not divide into, a teacher that does not fit, a
        loss turned NaN."""
        if self.guided and model.guidance.kind == "none":
            raise BadInput(
                f"guided students of {model.name}, which knows no guidance", expected="guided = false"
            )
        phases = [
            Phases.of(model.process, drawn_times(model, count), self.intervals)
            for count in self.segments or (self.steps,)
        ]

        def lesson(setting: Setting) -> Lesson:
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: pcm_loss(turn, setting, self, phases)},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(self, model, ctx, lesson, stage="pcm", guidance=self.guidance)
        return spaced(
            made(
                self,
                model,
                trained,
                scheduler=few_step_scheduler(model, "DDIMScheduler"),
                steps=self.steps,
                guided=self.guided,
            )
        )


@dataclass(frozen=True, eq=False)
class Phases:
    """The teacher's grid, cut at the phases' edges. float64 [pairs] each: t, the next time s, the edge below both."""

    t: Array
    s: Array
    edge: Array

    @classmethod
    def of(cls, process: Process, edges: Array, intervals: int) -> Phases:
        """edges  [phases + 1], falling to 0; each phase gets its share of the intervals, and one at least"""
        count = max(1, round(intervals / (len(edges) - 1)))
        power = RHO if isinstance(process, EDM) else 1
        share = np.linspace(0, 1, count + 1)
        pairs = []
        for high, low in pairwise(edges):
            begin, end = high ** (1 / power), low ** (1 / power)
            inner = (begin + share[1:-1] * (end - begin)) ** power
            inner = np.round(inner) if isinstance(process, DiscreteVP) else inner
            times = np.unique(np.concatenate([[low], inner, [high]]))[::-1]
            pairs += [(t, s, low) for t, s in pairwise(times)]
        return cls(*np.array(pairs).T)


def pcm_loss(turn: Turn, at: Setting, how: PCM, phases: Sequence[Phases]) -> Mapping[str, Tensor]:
    """|| f(x_t, t -> e) - f^-(x_s, s -> e) ||: s is the grid's next time towards the edge e, x_s the teacher's step.

    f^- is the student itself without gradients (section 3.1), not an average.
    """
    th, batch, denoising = torch(), turn.batch, at.denoising
    now = phases[int(turn.share * len(phases))]
    n = turn.integers(0, len(now.t)).cpu().numpy()
    t, s, edge = (th.as_tensor(times[n], device=batch.x0.device) for times in (now.t, now.s, now.edge))
    condition, scale = batch.condition, at.guidance
    if how.guided:
        condition, scale = sometimes_nothing(turn), 1.0
    x = denoising.noised(batch.x0, turn.normal(batch.x0), t)
    x_s = teacher_step(turn, denoising, at.teacher, x, t, s, condition, scale, how.solver)
    with th.no_grad():
        right = jump(turn.student, denoising, x_s, s, edge, condition)
    got = jump(turn.student, denoising, x, t, edge, condition)
    return {"huber": pseudo_huber(got, right, how.huber_c)}


def jump(
    network: Module, denoising: Denoising, x: Tensor, t: Tensor, edge: Tensor, condition: Condition
) -> Tensor:
    """f(x, t -> e) = alpha_e x0 + sigma_e noise of the network's estimate; x itself at the edge (equation 9)."""
    th = torch()
    there = (t <= edge).view(-1, *[1] * (x.ndim - 1))
    asked = th.where(t > 0, t, denoising.process.t_max)  # clean data needs no network; any time will do
    return th.where(there, x, denoising.ddim(denoising(network, x, asked, condition), edge))


def sometimes_nothing(turn: Turn) -> Condition:
    """The batch's conditions, a tenth of them those of nothing."""
    th, batch = torch(), turn.batch
    assert batch.nothing is not None
    empty = turn.uniform(0, 1) < EMPTY
    return {
        name: th.where(empty.view(-1, *[1] * (told.ndim - 1)), batch.nothing[name], told)
        for name, told in batch.condition.items()
    }

"""Rectified flow: a student that goes straight from the noise to what its teacher makes of that very noise.

Liu et al. 2022, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow"
<arXiv:2209.03003>; annealing reflow and flow-guided distillation are of Zhu et al. 2024, "SlimFlow: Training Smaller
One-Step Diffusion Models with Rectified Flow" <arXiv:2407.12718>. Times are those of the runtime: 1 is noise, 0 data.

The teacher may be of any process. Where it is no flow, the student has its weights to begin with and nothing more: a
flow's network is fed other times, the sample in another scale, and answers noise - x0.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Denoising, Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.plan import plan
from ..runtime.process import DiscreteVP, RectifiedFlow
from ..runtime.progress import Progress
from .losses import squared
from .student import Setting, made, taught
from .times import spaced

__all__ = ["FlowGuided", "Reflow", "flow_guided_loss", "flow_of", "flow_scheduler", "reflow_loss"]

Tensor = Any
Module = Any

EARLIEST, LATEST = 0.2, 0.8
"""Times from which the straight flow leads on to the end (SlimFlow's code)."""
TIMESTEPS = 1000
"""That a flow's network is told for time 1 where the teacher has no number of levels (diffusers' default)."""


@dataclass(frozen=True)
class Reflow:
    """A pass: the denoiser becomes a rectified flow along the straight lines of (noise, what the teacher draws of it).

    The pairs are drawn once, guidance included, and the teacher is not called again.
    """

    steps: int = 2
    """That the model is then drawn with unless told otherwise; training does not depend on it."""
    anneal: float = 0.5
    """Share of the training over which beta falls from 1, noise of no pair, to 0: annealing reflow. 0 for reflow from
    the first step on. SlimFlow lets it fall to the end; here the rate has by then fallen to nothing as well."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """Drawn by a sampler without noise of its own: the first noise has to decide."""
    training: Training = Training(steps=2000, rate=1e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.steps < 1 or self.guidance < 0:
            raise BadInput(
                f"steps {self.steps}, guidance {self.guidance} of reflow", expected="at least 1, at least 0"
            )
        if not 0 <= self.anneal <= 1:
            raise BadInput(f"anneal of reflow: {self.anneal}", expected="a share of the training, 0 to 1")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for latents of a sampler with noise, a teacher that does not fit, a loss turned NaN."""
        done = yield from _straightened(self, model, ctx, "reflow", self.steps)
        return done

    def beta(self, share: float) -> float:
        """Of the noise in a pair, at this share of the training."""
        return max(0.0, 1 - share / self.anneal) if self.anneal else 0.0

    def loss(self, turn: Turn, flow: Denoising, straight: Module) -> Mapping[str, Tensor]:
        return reflow_loss(turn, flow, self.beta(turn.share))


@dataclass(frozen=True)
class FlowGuided:
    """A pass: a rectified flow becomes a generator of one step: SlimFlow's flow-guided distillation.

    The flow that guides is the model as the pass gets it. It has to be straight, that is after reflow: a bent one, such
    as the first teacher's, leads from a point of a straight line to other data than the line. Distances are squared
    ones; the paper has LPIPS beside them, which needs a network of pictures.
    """

    weight: float = 1.0
    """Of where the flow leads from the student's own line, beside the pairs. 0: the pairs alone."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    """The same as for reflow, then they are drawn once for both."""
    training: Training = Training(steps=2000, rate=1e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.weight < 0 or self.guidance < 0:
            raise BadInput(
                f"weight {self.weight}, guidance {self.guidance} of flow_guided", expected="neither below 0"
            )

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a model that is no flow, and what reflow does."""
        if model.prediction != "flow":
            raise BadInput(
                f"flow_guided of {model.name}, whose network predicts {model.prediction}",
                expected="a rectified flow",
                fix="run the pass reflow first",
            )
        done = yield from _straightened(self, model, ctx, "flow-guided", 1)
        return done

    def loss(self, turn: Turn, flow: Denoising, straight: Module) -> Mapping[str, Tensor]:
        return flow_guided_loss(turn, flow, straight, self.weight)


def reflow_loss(turn: Turn, flow: Denoising, beta: float = 0.0) -> Mapping[str, Tensor]:
    """|| v(x_t, t) - (z' - x0) ||^2 at x_t = (1 - t) x0 + t z', z' = sqrt(1 - beta^2) z + beta xi.

    z is the noise that the teacher drew x0 from, xi noise of no pair.
    """
    batch = turn.batch
    z = batch.start()
    if beta:
        z = (1 - beta**2) ** 0.5 * z + beta * turn.normal(z)
    t = turn.uniform(0, 1)
    v = flow.output(turn.student, flow.noised(batch.x0, z, t), t, batch.condition)
    return {"squared": squared(v, flow.target(batch.x0, z, t))}


def flow_guided_loss(turn: Turn, flow: Denoising, straight: Module, weight: float) -> Mapping[str, Tensor]:
    """|| x^ - x0 ||^2 + weight || x^ - x' ||^2: x^ = z - v(z, 1) is the student's one step from the noise of x0.

    x' = x_t - t u(x_t, t) is where the straight flow u leads from x_t = (1 - t) x^ + t z, on the student's line.
    """
    th, batch = torch(), turn.batch
    z = batch.start()
    got = flow(turn.student, z, th.ones(len(z), device=z.device), batch.condition).x0
    losses = {"pairs": squared(got, batch.x0)}
    if weight:
        t = turn.uniform(EARLIEST, LATEST)
        with th.no_grad():
            end = flow(straight, flow.noised(got, z, t), t, batch.condition).x0
        losses["flow"] = weight * squared(got, end)
    return losses


def flow_of(model: Model) -> RectifiedFlow:
    """The process of the flow that the model becomes; its own where it is one."""
    if isinstance(model.process, RectifiedFlow):
        return model.process
    levels = model.process.t_max if isinstance(model.process, DiscreteVP) else TIMESTEPS
    return RectifiedFlow(timestep_scale=float(levels))


def flow_scheduler(flow: RectifiedFlow) -> dict[str, Any]:
    """The config of a diffusers scheduler that draws the flow by Euler steps at even times.

    DPM-Solver++ of the first order is Euler on a flow. diffusers' FlowMatchEulerDiscreteScheduler would spend its last
    step on a thousandth of the way, and the pipelines of U-Nets and DiT do not take it.
    """
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": round(flow.timestep_scale),
        "solver_order": 1,
        "algorithm_type": "dpmsolver++",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "steps_offset": 1,  # unread; Stable Diffusion pipelines set it
    }


def _straightened(
    job: Reflow | FlowGuided,
    model: Model,
    ctx: Context,
    stage: str,
    steps: int,
) -> Generator[Progress, None, Model]:
    """Train the student's flow by the job's loss, and put it into the model as a flow."""
    teacher = model if ctx.teacher is None else ctx.teacher
    _check_sampler(teacher, job.latents)
    process = flow_of(model)
    flow = Denoising(process, "flow")
    # an earlier reflow may have made it another process than its teacher's; latents and conditions are the same
    alike = model
    if model.prediction == "flow":
        alike = replace(model, process=teacher.process, prediction=teacher.prediction)

    straight = model.parts[model.denoiser].module

    def lesson(setting: Setting) -> Lesson:
        return Lesson(
            {"student": setting.student},
            {"student": lambda turn: job.loss(turn, flow, straight)},
            setting.key,
            frozen=(straight,),
        )

    trained = yield from taught(job, alike, ctx, lesson, stage=stage, guidance=job.guidance)
    own = isinstance(model.process, RectifiedFlow) and model.prediction == "flow"
    return made(
        job,
        spaced(model),
        trained,
        scheduler=None if own else flow_scheduler(process),
        steps=steps,
        prediction="flow",
        process=process,
    )


def _check_sampler(teacher: Model, how: Latents) -> None:
    way = plan(how.sampler, how.steps, teacher.process, prediction=teacher.prediction, grid=teacher.grid)
    if way.noises:
        raise BadInput(
            f"latents drawn by {how.sampler}, which adds noise on its way",
            expected="a sampler whose first noise decides what is drawn",
            fix='sampler = "dpmpp_2m" or "ddim"',
        )

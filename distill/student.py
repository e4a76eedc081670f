"""What all distilling passes share: the teacher, the student, the run, and the model that comes out."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..model.fingerprint import model_fingerprint
from ..model.libraries import diffusers, quiet
from ..model.model import Context, Model, Part, Pass
from ..model.pairs import check_alike
from ..model.schedulers import grid_of
from ..model.training import (
    Denoising,
    Latents,
    Lesson,
    Processes,
    Samples,
    Trained,
    Training,
    given_samples,
    prepare_samples,
    train,
)
from ..runtime.process import Process
from ..runtime.progress import Progress, within
from .pictures import encode_pictures, pictures_for

__all__ = [
    "Setting",
    "few_step_scheduler",
    "lesson_key",
    "made",
    "prepared",
    "taught",
    "teacher_of",
]

Module = Any

DRAWN_SHARE = 0.25
"""Of a pass's progress bar: the time that drawing the latents takes. A guess, for the bar alone."""
DIGEST = 12
"""Bytes of a lesson's key."""


class Method(Pass, Protocol):
    """A pass that trains: its two tables of a recipe."""

    @property
    def latents(self) -> Latents: ...
    @property
    def training(self) -> Training: ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method has to work with when it writes its lesson."""

    model: Model
    """The student's model as it is given to the pass."""
    denoising: Denoising
    student: Module
    """A copy of the model's denoiser, which the lesson may train."""
    teacher: Module
    """The teacher's denoiser; never trained."""
    guidance: float
    """The teacher's, 1 where it knows none."""
    samples: Samples
    key: str
    """Of everything above and of the pass's fields."""


def taught(
    job: Method,
    model: Model,
    ctx: Context,
    lesson_of: Callable[[Setting], Lesson],
    *,
    stage: str,
    guidance: float = 0.0,
    student: Callable[[Module], Module] | None = None,
    drawn: bool = True,
) -> Generator[Progress, None, Trained]:
    """Draw what is learned on with the teacher, write the lesson, train it.

    guidance  of the teacher; 0 for the model's own
    drawn     False for a method that needs prompts or labels alone: the latents are zeros then
    student   what is trained, made of a copy of the model's denoiser; the copy itself where None
    Raises BadInput for a teacher that does not fit, and what `prepare_samples` and `train` raise.
    """
    setting = yield from within(
        prepared(job, model, ctx, job.latents, guidance=guidance, student=student, drawn=drawn),
        0,
        DRAWN_SHARE,
    )
    how = replace(job.training, seed=job.training.seed + ctx.seed)
    lesson, samples = lesson_of(setting), setting.samples
    result = yield from within(train(lesson, samples, how, ctx.store, stage), DRAWN_SHARE, 1.0)
    return result


def prepared(
    job: Pass,
    model: Model,
    ctx: Context,
    latents: Latents,
    *,
    guidance: float = 0.0,
    student: Callable[[Module], Module] | None = None,
    drawn: bool = True,
) -> Generator[Progress, None, Setting]:
    """What `taught` does before it trains, with its arguments: for methods that train several times."""
    teacher = teacher_of(model, ctx)
    if guidance:
        latents = replace(latents, guidance=guidance)
    if drawn and latents.pictures:
        samples = yield from _of_pictures(teacher, latents, ctx)
    elif drawn:
        samples = yield from prepare_samples(teacher, latents, ctx.store, Processes.found())
    else:
        samples = _undrawn(teacher, latents)
    scale = (guidance or teacher.guidance.scale) if samples.nothing is not None else 1.0
    # an earlier pass may have frozen it
    network = copy.deepcopy(model.parts[model.denoiser].module).requires_grad_(True)
    return Setting(
        model,
        Denoising.of(model),
        network if student is None else student(network),
        teacher.parts[teacher.denoiser].module,
        scale,
        samples,
        lesson_key(job, model, teacher, samples, ctx.seed),
    )


def _of_pictures(teacher: Model, latents: Latents, ctx: Context) -> Generator[Progress, None, Samples]:
    """Real pictures as the teacher's encoder sees them. Raises BadInput for a folder the model cannot learn from."""
    found = pictures_for(teacher, Path(latents.pictures), skip_unreadable=latents.skip_unreadable)
    encoded = yield from encode_pictures(teacher, found, ctx.store, mirrored=latents.mirrored)
    return given_samples(teacher, encoded.latents, encoded.subjects)


def _undrawn(teacher: Model, latents: Latents) -> Samples:
    """Every prompt or label once, with a latent of zeros."""
    subjects, sample = latents.subjects(teacher), teacher.sample
    shape = (sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    return given_samples(teacher, np.zeros((len(subjects), *shape), np.float32), subjects)


def teacher_of(model: Model, ctx: Context) -> Model:
    """Whom the student learns from. Raises BadInput where the two cannot be compared."""
    teacher = model if ctx.teacher is None else ctx.teacher
    check_alike(model, teacher, fix="take the model that the student was made from as --teacher")
    return teacher


def lesson_key(job: Pass, model: Model, teacher: Model, samples: Samples, seed: int) -> str:
    """Letters that stand for all a training came from."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    both = [model_fingerprint(one, [one.denoiser]) for one in (model, teacher)]
    digest.update(repr((type(job).__name__, job, both, samples.key, seed)).encode())
    return digest.hexdigest()


def made(
    job: Pass,
    model: Model,
    trained: Trained,
    *,
    network: Module | None = None,
    scheduler: Mapping[str, Any] | None = None,
    steps: int | None = None,
    guided: bool = False,
    prediction: str = "",
    process: Process | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Model:
    """The model with the student in it.

    network  what the part holds where that is not what was trained as it stands, a merged adapter for instance
    scheduler, steps  how it is to be drawn from now on; None leaves them
    prediction, process  how its output is read from now on, where that changed; the scheduler has to say the same
    guided     whether it still needs guidance; False: guidance is in it
    """
    part: Part = replace(model.parts[model.denoiser], module=trained.student if network is None else network)
    losses = {
        name: float(f"{value:.4g}") for name, value in trained.losses.items()
    }  # four digits mean something
    said = {"losses": losses, "log": trained.metrics.name, **(measured or {})}
    done = model.after(job, {part.name: part}, **said)
    if not guided and model.guidance.kind != "none":
        done = replace(done, guidance=replace(done.guidance, scale=1.0))
    if scheduler is not None:
        with quiet():
            kind = getattr(diffusers(), scheduler["_class_name"])
            grid = grid_of(kind.from_config(dict(scheduler)))
        done = replace(done, scheduler=scheduler, grid=grid)
    return replace(
        done,
        steps=done.steps if steps is None else steps,
        prediction=prediction or done.prediction,
        process=done.process if process is None else process,
    )


def few_step_scheduler(model: Model, name: str) -> dict[str, Any] | None:
    """The config of a diffusers scheduler that draws a few-step student of the model.

    name  LCMScheduler: leaps to clean data and back. DDIMScheduler: straight to the next time, trailing
    None for a process that needs no other one: a rectified flow's Euler steps are DDIM's.
    """
    if model.process.to_json()["kind"] != "discrete_vp":
        return None
    own = dict(model.scheduler or _described(model))
    more: dict[str, Any] = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": True}
    if name == "DDIMScheduler":
        more["timestep_spacing"] = "trailing"  # the first call at the very end: noise and nothing else
    with quiet():
        kind = getattr(diffusers(), name)
        config = kind.from_config({**own, **more}).config
    return {"_class_name": name, **{key: value for key, value in config.items() if not key.startswith("_")}}


def _described(model: Model) -> dict[str, Any]:
    """The process of a model that never had a scheduler, in the words of diffusers."""
    said = model.process.to_json()
    predicted = {"prediction_type": model.prediction}
    if "betas" in said:
        return {"trained_betas": said["betas"], "num_train_timesteps": len(said["betas"]), **predicted}
    names = {"beta_schedule": "beta_schedule", "beta_start": "beta_start", "beta_end": "beta_end"}
    return {
        "num_train_timesteps": said["levels"],
        **predicted,
        **{new: said[old] for new, old in names.items()},
    }

"""LCM-LoRA: latent consistency distillation that trains a low-rank adapter and nothing else.

Luo et al. 2023, "LCM-LoRA: A Universal Stable-Diffusion Acceleration Module" <arXiv:2311.05556>.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..model.fingerprint import model_fingerprint
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .adapters import adapted, check_adapter, merged, write_adapter
from .lcm import LCM, check_process, lcm_loss
from .student import Setting, few_step_scheduler, made, taught

__all__ = ["LCMLora"]

Module = Any


@dataclass(frozen=True)
class LCMLora:
    """A pass: what `lcm` does to all weights, done by an adapter, which is merged into them at the end.

    Memory is that of one network, its activations and the adapter: for large models. The adapter alone, for other
    models of the same family, is kept where `adapter` says.
    """

    steps: int = 4
    """That the model is then drawn with unless told otherwise."""
    rank: int = 64
    """Of the adapter: the published ones'. A small network needs no more than an eighth of its channels."""
    adapter: str = ""
    """A folder to write the adapter to, for diffusers' load_lora_weights; empty for none."""
    guidance: float = 0.0
    """Of the teacher, fixed into the student; 0 for the model's own."""
    intervals: int = 50
    """As in lcm."""
    huber_c: float = 1e-3
    """As in lcm."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=2000, rate=1e-4, average=0.0)  # noqa: RUF009 - frozen
    """Without an average: the target is the student itself, as in diffusers' training script."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BadInput(f"rank of lcm_lora: {self.rank}", expected="at least 1")
        self.as_lcm()

    def as_lcm(self) -> LCM:
        """The same distillation of all weights. Raises BadInput for fields that it would not take."""
        return LCM(self.steps, self.guidance, self.intervals, self.huber_c)

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for what lcm refuses, and a network without layers for adapters; OutputError for a folder
        that holds another adapter."""
        check_process("lcm_lora", model)
        part, folder = model.parts[model.denoiser], Path(self.adapter)
        job = replace(self, adapter="")  # where it is written changes nothing about what is trained
        made_of = _made_of(job, model)
        if self.adapter:
            check_adapter(folder, made_of)
        seed = self.training.seed + ctx.seed

        def lesson(setting: Setting) -> Lesson:
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: lcm_loss(turn, setting, self.as_lcm())},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(
            job,
            model,
            ctx,
            lesson,
            stage="lcm-lora",
            guidance=self.guidance,
            student=lambda network: adapted(network, part.module, self.rank, seed),
        )
        if self.adapter:
            write_adapter(trained.student, folder, part.name, made_of)
        named = replace(self, adapter=folder.name)  # a bundle says nothing about its maker's disk
        return made(
            named,
            model,
            trained,
            network=merged(trained.student),
            scheduler=few_step_scheduler(model, "LCMScheduler"),
            steps=self.steps,
        )


def _made_of(job: LCMLora, model: Model) -> str:
    said = repr((job, model_fingerprint(model, [model.denoiser]))).encode()
    return hashlib.blake2b(said, digest_size=12).hexdigest()

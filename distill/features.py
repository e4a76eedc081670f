"""Recovery of a cut network: the teacher's outputs and the features inside it, taught to what is left.

The sum of three losses is that of BK-SDM (Kim et al. 2023, arXiv:2305.15798): the task's own, the output's and the
stages' features. Without weights of their own the few features of large values would drown the others (LAPTOP-Diff,
Zhang et al. 2024, arXiv:2404.11098), so each is measured against the size of the teacher's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..model.libraries import torch
from ..model.model import Context, Model
from ..model.training import Latents, Lesson, Training, Turn
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .losses import squared
from .student import Setting, made, taught

__all__ = ["Recover", "feature_losses", "recovery_loss", "stages", "watched"]

Tensor = Any
Module = Any

NORMALIZED = ("relative", "balanced", "none")


@dataclass(frozen=True)
class Recover:
    """A pass: a denoiser that was cut learns outputs and features of the uncut one. It is drawn as before."""

    task: float = 1.0
    """Weight of the loss the model was trained with, on the latents."""
    output: float = 1.0
    """Weight of the squared difference of the outputs."""
    features: float = 1.0
    """Weight of the mean over all stages; 0 leaves them out."""
    normalized: str = "relative"
    """How stages are made comparable: relative, each error over the teacher's mean square there; balanced, each term
    as large as the output's and less where the teacher's features are larger (Dense2MoE); none, as BK-SDM."""
    drop: float = 0.1
    """Share of samples without their prompt or label: guidance needs an answer to nothing, too."""
    latents: Latents = Latents()  # noqa: RUF009 - frozen
    training: Training = Training(steps=4000, rate=3e-4, average=0.99)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("task", "output", "features"):
            if getattr(self, name) < 0:
                raise BadInput(f"{name} of recover: {getattr(self, name)}", expected="0 or more")
        if self.task + self.output + self.features == 0:
            raise BadInput("recover with all weights 0", expected="something to learn")
        if self.normalized not in NORMALIZED:
            raise BadInput(f"normalized of recover: {self.normalized!r}", expected=" or ".join(NORMALIZED))
        if not 0 <= self.drop < 1:
            raise BadInput(f"drop of recover: {self.drop}", expected="from 0 to below 1")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Raises BadInput for a teacher that does not fit or a loss turned NaN."""

        def lesson(setting: Setting) -> Lesson:
            pairs = pairs_of(setting.teacher, setting.student) if self.features else ()
            return Lesson(
                {"student": setting.student},
                {"student": lambda turn: recovery_loss(turn, setting, self, pairs)},
                setting.key,
                frozen=(setting.teacher,),
            )

        trained = yield from taught(self, model, ctx, lesson, stage="recover")
        return made(self, model, trained, guided=True)


def recovery_loss(
    turn: Turn, at: Setting, how: Recover, pairs: Sequence[tuple[str, str]]
) -> Mapping[str, Tensor]:
    """Task, output and feature losses at a time drawn evenly; pairs name stages of teacher and student."""
    th, batch, denoising = torch(), turn.batch, at.denoising
    t = (
        1 + turn.uniform(0, denoising.process.t_max - 1)
        if denoising.process.t_max > 1
        else turn.uniform(1e-3, 1)
    )
    noise = turn.normal(batch.x0)
    x = denoising.noised(batch.x0, noise, t)
    condition = batch.condition
    if batch.nothing is not None and how.drop:
        dropped = turn.uniform(0, 1) < how.drop
        condition = {
            name: th.where(dropped.view(-1, *[1] * (value.ndim - 1)), batch.nothing[name], value)
            for name, value in condition.items()
        }
    with th.no_grad(), watched(at.teacher, [pair[0] for pair in pairs]) as theirs:
        right = denoising.output(at.teacher, x, t, condition)
    with watched(turn.student, [pair[1] for pair in pairs]) as mine:
        got = denoising.output(turn.student, x, t, condition)
    losses = {
        "task": how.task * squared(got, denoising.target(batch.x0, noise, t)),
        "output": how.output * squared(got, right),
    }
    if pairs:
        features = [(theirs[a].float(), mine[b].float()) for a, b in pairs]
        losses["features"] = how.features * feature_losses(features, losses["output"], how.normalized)
    return losses


def feature_losses(pairs: Sequence[tuple[Tensor, Tensor]], output: Tensor, normalized: str) -> Tensor:
    """The mean over stages of |f_T - f_S|^2, made comparable; see `Recover.normalized`. [..] each, a scalar out."""
    th = torch()
    errors = [squared(right, got) for right, got in pairs]
    if normalized == "none":
        return sum(errors) / len(errors)
    if normalized == "relative":
        return sum(e / right.square().mean() for e, (right, _) in zip(errors, pairs)) / len(errors)
    # Dense2MoE's weights: w_l = |L_out| / |L_l| * (sum_k |f_k|) / (L |f_l|), constants to the gradient
    sizes = th.stack([right.square().mean().sqrt() for right, _ in pairs])
    weights = [
        output.detach() / error.detach().clamp(min=1e-12) * sizes.mean() / size
        for error, size in zip(errors, sizes)
    ]
    return sum(weight * error for weight, error in zip(weights, errors)) / len(errors)


def stages(network: Module) -> dict[str, Module]:
    """Where features are compared, by path: the stages of a U-Net, the blocks of a transformer; none of others."""
    for prefix, module in network.named_modules():
        dot = f"{prefix}." if prefix else ""
        if hasattr(module, "down_blocks") and hasattr(module, "up_blocks"):
            found = {f"{dot}down_blocks.{i}": block for i, block in enumerate(module.down_blocks)}
            if getattr(module, "mid_block", None) is not None:
                found[f"{dot}mid_block"] = module.mid_block
            return found | {f"{dot}up_blocks.{i}": block for i, block in enumerate(module.up_blocks)}
        if hasattr(module, "transformer_blocks"):
            return {
                f"{dot}transformer_blocks.{i}": block for i, block in enumerate(module.transformer_blocks)
            }
    return {}


def pairs_of(teacher: Module, student: Module) -> tuple[tuple[str, str], ...]:
    """Stages of equal place: those that lead up are counted from the end, where a student may have fewer."""
    theirs, mine = list(stages(teacher)), list(stages(student))
    missing = sum("up_blocks" in name for name in theirs) - sum("up_blocks" in name for name in mine)
    found = []
    for name in mine:
        place, _, number = name.rpartition(".")
        other = f"{place}.{int(number) + missing}" if place.endswith("up_blocks") else name
        # the innermost stage of a student with fewer has no twin: it does not halve the size
        shortened = missing and place.endswith("down_blocks") and int(number) == _last_of(mine, place)
        if other in theirs and not shortened:
            found.append((other, name))
    return tuple(found)


def _last_of(names: Sequence[str], place: str) -> int:
    return max(int(name.rpartition(".")[2]) for name in names if name.rpartition(".")[0] == place)


@contextmanager
def watched(network: Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the named modules put out during one forward; of a tuple the first."""
    seen: dict[str, Tensor] = {}
    modules = dict((network.module if _wrapped(network) else network).named_modules())
    hooks = []
    for name in names:

        def keep(module: Module, inputs: Any, output: Any, name: str = name) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        hooks.append(modules[name].register_forward_hook(keep))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _wrapped(network: Module) -> bool:
    """Whether accelerate put a module for several processes around it."""
    return type(network).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel")

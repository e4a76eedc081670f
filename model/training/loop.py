"""The one training loop: any lesson, one process or many, interrupted or not.

Hugging Face accelerate places networks and gradients, so that one machine, `accelerate launch` over several
processes and nodes, DDP and FSDP run the same code. What is drawn depends on seed, step and rank alone: a run that is
killed and started again gives the bits of one that was not.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.progress import Progress
from ..libraries import library, torch
from .checkpoint import Checkpoint
from .lesson import Lesson, Training, Turn, Wrong
from .samples import Samples

__all__ = ["Trained", "train"]

Module = Any

CHECKPOINT_S = 30.0
"""Seconds of training a kill costs at most; more where writing takes long, see CHECKPOINT_SHARE."""
CHECKPOINT_SHARE = 0.02
"""Of the time that may go into checkpoints."""
WRITTEN = 10
"""Steps between two lines of the metrics file."""
SMALL = 1024
"""Latent cells up to which attention on a processor is spelled out: at 256 cells its bfloat16 backward pass takes 0.8
of the fused kernel's time; at SD-1.5's 4096 its scores would fill the memory."""


@dataclass(frozen=True, eq=False)
class Trained:
    networks: Mapping[str, Module]
    """As they are after the last step, in eval mode, without gradients."""
    student: Module
    """What comes out: the moving average where there is one."""
    losses: Mapping[str, float]
    """Means of the last steps, by "network.term"."""
    metrics: Path
    """JSON lines: step, losses, gradient norms, rate, seconds."""


def train(
    lesson: Lesson, samples: Samples, how: Training, store: Path, stage: str
) -> Generator[Progress, None, Trained]:
    """Train the lesson's networks in place; goes on from the checkpoint in `store` where an earlier run left one.

    Raises Wrong, a BadInput, where a loss or a gradient is NaN or infinite: the checkpoint before stays. Raises
    BadInput for a checkpoint that cannot be read.
    """
    th = torch()
    accelerator = library("accelerate").Accelerator(
        cpu=not th.cuda.is_available(), mixed_precision="no", step_scheduler_with_optimizer=False
    )
    device, rank = accelerator.device, accelerator.process_index
    for module in lesson.frozen:
        module.requires_grad_(False).to(device)
    trainable = {
        name: [key for key, tensor in network.named_parameters() if tensor.requires_grad]
        for name, network in lesson.networks.items()
    }
    average = copy.deepcopy(lesson.networks["student"]).requires_grad_(False) if how.average else None
    bare = {name: network.eval().to(device) for name, network in lesson.networks.items()}
    if how.checkpointing:
        _recompute(bare["student"])
    wrapped = {name: accelerator.prepare_model(network) for name, network in bare.items()}
    average = accelerator.prepare_model(average, evaluation_mode=True) if average is not None else None
    optimizers = {
        name: accelerator.prepare_optimizer(
            th.optim.AdamW(
                [tensor for tensor in network.parameters() if tensor.requires_grad],
                lr=how.rate,
                betas=lesson.betas,
                weight_decay=how.weight_decay,
            )
        )
        for name, network in wrapped.items()
    }
    checkpoint = Checkpoint(store, f"{stage}-{lesson.key}", accelerator, trainable)
    step = checkpoint.load(wrapped, average, optimizers)
    began, first, saved, cost = time.perf_counter(), step, time.perf_counter(), 0.0
    recent = checkpoint.last_losses()
    attention = device.type == "cpu" and math.prod(samples.latents.shape[2:]) <= SMALL
    while step < how.steps:
        rate = how.rate * _share_of_rate(how, step)
        terms: dict[str, float] = {}
        for number, name in enumerate(lesson.turns(step)):
            for group in optimizers[name].param_groups:
                group["lr"] = rate * lesson.rates.get(name, 1.0)
            seen = {other: wrapped[other] if other == name else bare[other] for other in bare}
            _learns(bare, name, trainable)
            for part in range(how.accumulation):
                random = th.Generator().manual_seed(_seed(how.seed, step, rank, number, part))
                batch = samples.batch(random, how.batch, device)
                now = average if average is not None else bare["student"]
                turn = Turn(step, step / how.steps, batch, random, seen, now)
                with ExitStack() as around:
                    around.enter_context(_arithmetic(device, how.precision, attention))
                    if part + 1 < how.accumulation:
                        around.enter_context(accelerator.no_sync(wrapped[name]))
                    losses = lesson.losses[name](turn)
                    loss = sum(term for term in losses.values() if term.requires_grad)
                    for key, term in losses.items():
                        value = float(accelerator.reduce(term.detach().float(), "mean"))
                        _finite(value, f"{name}'s loss {key}", step, how, checkpoint)
                        terms[f"{name}.{key}"] = terms.get(f"{name}.{key}", 0.0) + value / how.accumulation
                    accelerator.backward(loss / how.accumulation)
            weights = [tensor for tensor in wrapped[name].parameters() if tensor.requires_grad]
            norm = float(accelerator.clip_grad_norm_(weights, how.clip))
            _finite(norm, f"{name}'s gradient", step, how, checkpoint)
            terms[f"{name}.norm"] = norm
            optimizers[name].step()
            optimizers[name].zero_grad()
            if lesson.after is not None:
                lesson.after(name, turn)
        if average is not None:
            _follow(average, wrapped["student"], min(how.average, (1 + step) / (10 + step)))
        step += 1
        for key, value in terms.items():
            recent[key] = recent.get(key, value) + (value - recent.get(key, value)) / min(step - first, 50)
        now_s = time.perf_counter()
        if accelerator.is_main_process and (step % WRITTEN == 0 or step == how.steps):
            checkpoint.write_line({"step": step, "rate": rate, "seconds": round(now_s - began, 2), **recent})
        due = accelerator.reduce(
            th.tensor(float(now_s - saved >= max(CHECKPOINT_S, cost / CHECKPOINT_SHARE)), device=device)
        )
        if float(due) > 0 or step == how.steps:
            checkpoint.save(step, wrapped, average, optimizers)
            saved, cost = time.perf_counter(), time.perf_counter() - now_s
        left = (now_s - began) / (step - first) * (how.steps - step)
        said = ", ".join(f"{key.removeprefix('student.')} {recent[key]:.3g}" for key in list(terms)[:2])
        yield Progress(stage, step / how.steps, f"step {step} of {how.steps}, {said}, {_minutes(left)} left")
    networks = {name: accelerator.unwrap_model(network) for name, network in wrapped.items()}
    student = networks["student"] if average is None else accelerator.unwrap_model(average)
    for module in (*networks.values(), student, *lesson.frozen):
        module.requires_grad_(False).eval().to("cpu")
    return Trained(networks, student, recent, checkpoint.metrics)


def _learns(bare: Mapping[str, Module], name: str, trainable: Mapping[str, list[str]]) -> None:
    """Only this turn's network collects gradients; they flow through the others."""
    for other, network in bare.items():
        learned = set(trainable[other]) if other == name else set()
        for key, tensor in network.named_parameters():
            tensor.requires_grad_(key in learned)


def _follow(average: Module, student: Module, decay: float) -> None:
    th = torch()
    pairs = zip(average.parameters(), student.parameters(), strict=True)
    with th.no_grad():
        moved = [(a, s) for a, s in pairs if a.is_floating_point()]
        th._foreach_lerp_([a.data for a, _ in moved], [s.data for _, s in moved], 1 - decay)


def _recompute(network: Module) -> None:
    for module in network.modules():
        if hasattr(module, "enable_gradient_checkpointing"):  # diffusers' networks, inside our wrappers
            module.enable_gradient_checkpointing()
            return


@contextmanager
def _arithmetic(device: Any, precision: str, spelled: bool) -> Iterator[None]:
    th = torch()
    attention = library("torch.nn.attention")
    with ExitStack() as around:
        if spelled:
            around.enter_context(attention.sdpa_kernel([attention.SDPBackend.MATH]))
        around.enter_context(th.autocast(device.type, th.bfloat16, enabled=precision == "bfloat16"))
        yield


def _share_of_rate(how: Training, step: int) -> float:
    risen = min(1.0, (step + 1) / max(1, how.warm))
    return risen if how.decay == "constant" else risen * 0.5 * (1 + math.cos(math.pi * step / how.steps))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _finite(value: float, what: str, step: int, how: Training, checkpoint: Checkpoint) -> None:
    if math.isfinite(value):
        return
    kept = (
        f"the last good weights are in {checkpoint.file}"
        if checkpoint.file.exists()
        else "nothing was kept yet"
    )
    raise Wrong(
        f"{what} turned {value} at step {step + 1} of {how.steps}",
        expected="a finite number",
        fix=f"a lower rate than {how.rate:g}, or precision float32; {kept}",
    )


def _minutes(seconds: float) -> str:
    return f"{math.ceil(seconds / 60)} min" if seconds >= 60 else f"{math.ceil(seconds)} s"

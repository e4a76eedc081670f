"""Training what rounding broke: a quantized part learns the outputs of its own float module, without data.

At 4 bits of weights and inputs no choice of grids is enough. Here the integers themselves are trained, with gradients
straight through the rounding, on calls the shipped plan makes: as QuEST does it (Wang et al. 2024, arXiv:2402.03666) in
stages, first the layers that carry the time, then the sensitive ones, or all of them at once, which is affordable where
the network is small. A job that was cut off goes on where it was and ends with the same bits.
"""

from __future__ import annotations

import io
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Array, Quantized
from ..model.trajectories import run_part
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, output_errors
from ..runtime.progress import Progress
from .pieces import check_calls, cut, drawn, key_of
from .simulate import quantizable
from .straight import KINDS, Trainable, listening

__all__ = ["QUEST", "Finetune", "finetune"]

Feeds = Mapping[str, Array]

QUEST = ("time_emb", "ff.net.2")
"""Its two stages by the names diffusers gives: all that projects the time, then the second linear layer of every
feed-forward, whose inputs have the widest outliers (section 4.2)."""

WARM = 0.03
"""Share of the steps over which the rate rises, so that Adam's second moments are there before it is full."""

BETAS = (0.9, 0.99)
"""Adam's: a hundred steps of memory, of a few thousand."""

HELD = 8
"""One in so many calls is not trained on, and says whether the result is better than the beginning."""

HELD_MOST = 32
"""Of those, at most: their two passes cost less than a hundredth of the training."""

REPORT = 10
"""Steps between two words of progress."""


@dataclass(frozen=True)
class Finetune:
    """How a quantized part is trained."""

    steps: int = 4000
    """Of the optimizer, in each stage."""
    batch: int = 16
    """Rows of network input in one step."""
    calls: int = 4
    """Recorded calls, mostly at different times, that they are put together from."""
    stages: tuple[str, ...] = ("",)
    """Each trains the modules whose name contains it, one stage after the other; "" is all of them. See QUEST."""
    rate: float = 0.01
    """Of the weights, in codes a step at the most (Adam moves each by about its rate)."""
    step_rate: float = 0.001
    """Of the logarithms of the steps of weights and of inputs."""
    zero_rate: float = 0.01
    """Of the inputs' zero points, in codes."""
    float_rate: float = 0.0003
    """Of biases and of what stays in floating point."""
    layer_loss: float = 0.0
    """Weight of the trained layers' outputs beside the part's own, each relative to its mean square."""
    guidance: float | None = None
    """The guidance scale s of calls with the unconditional half first: the error of s conditional + (1 - s)
    unconditional then counts as much as that of the halves."""
    seed: int = 0
    save_every: int = 250
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "calls", "save_every"):
            if getattr(self, name) < 1:
                raise BadInput(f"{getattr(self, name)} {name}", expected="at least 1")
        for name in ("rate", "step_rate", "zero_rate", "float_rate", "layer_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise BadInput(f"{name} {getattr(self, name)}", expected="a number, at least 0")
        if not self.stages:
            raise BadInput("no stages", expected='names of layers, or ("",) for all')

    def rates(self) -> dict[str, float]:
        """By kind of tensor."""
        return dict(zip(KINDS, (self.rate, self.step_rate, self.step_rate, self.zero_rate, self.float_rate)))


def finetune(
    part: Part,
    quantized: Quantized,
    calls: Sequence[Feeds],
    how: Finetune,
    store: Path,
    held_out: Sequence[Feeds] = (),
) -> Generator[Progress, None, Quantized]:
    """Train the integers of `part` until its outputs are those of its float module.

    calls     what the part really sees, by input name: at least 2, each of a few samples
    store     a folder for checkpoints; jobs of other parts, calls or settings do not meet there
    held_out  calls from other noise, which say whether the result is better; empty: every eighth of `calls`, of which
              no piece is trained on
    What comes back is no worse than `quantized` on the calls held out. It has no drift: that belonged to the old
    weights.
    Raises BadInput for calls that are not finite, for a stage without layers, and when the training diverges; the last
    good checkpoint then stays in the store.
    """
    check_calls([*calls, *held_out])
    key = key_of(part, quantized, [*calls, *held_out], asdict(how))
    store.mkdir(parents=True, exist_ok=True)
    asked = list(held_out) or list(calls[HELD - 1 :: HELD] or calls[-1:])
    told = calls if held_out else [call for i, call in enumerate(calls) if i % HELD != HELD - 1]
    rows, guided = max(1, how.batch // how.calls), how.guidance is not None
    lessons, exam = cut(told, rows, guided=guided), cut(asked, rows, guided=guided)
    for number, stage in enumerate(how.stages):
        names = [name for name, module in part.module.named_modules() if stage in name and _holds(module)]
        if not names:
            raise BadInput(
                f"no layer of {part.name} has {stage!r} in its name", fix="name others in `stages`"
            )
        student = Trainable(part, quantized, names)
        running = _Stage(part, student, lessons, exam, how, store / f"finetune-{key}-{number}").run()
        while True:
            try:
                at = next(running)
            except StopIteration as end:
                quantized = end.value
                break
            assert at.fraction is not None, "a stage knows its steps"
            whole = (number + at.fraction) / len(how.stages)
            yield Progress(f"finetune {part.name}", whole, f"{stage or 'all'}: {at.note}")
    return quantized


@dataclass
class _Stage:
    """Some layers being trained."""

    part: Part
    student: Trainable
    pieces: Sequence[Feeds]
    exam: Sequence[Feeds]
    how: Finetune
    path: Path
    targets: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """Outputs of the float module, by number of the piece."""

    def run(self) -> Generator[Progress, None, Quantized]:
        before = self.student.quantized()
        first = self.error()
        optimizer = self.optimizer()
        begin = self.load(optimizer)
        started, smooth = time.monotonic(), 0.0
        for step in range(begin, self.how.steps):
            self.set_rates(optimizer, step)
            optimizer.zero_grad()
            loss = self.loss(drawn(len(self.pieces), step, self.how.calls, self.how.seed))
            smooth = float(loss.detach()) if step == begin else 0.95 * smooth + 0.05 * float(loss.detach())
            if not isfinite(float(loss.detach())):
                kept = f"; the last good state is in {self.path}" if self.path.exists() else ""
                raise BadInput(
                    f"finetuning {self.part.name} diverged: the loss is {float(loss.detach())} at step {step}",
                    expected="a number",
                    fix=f"halve the rates{kept}",
                )
            if step % self.how.save_every == 0 and step > begin:
                self.save(optimizer, step)  # of what the loss has just been found finite for
            loss.backward()
            optimizer.step()
            self.student.clamp()
            if step % REPORT == 0:
                left = (time.monotonic() - started) / (step + 1 - begin) * (self.how.steps - step - 1)
                note = f"step {step + 1}, {10 * np.log10(1 / max(smooth, 1e-30)):.2f} dB, {left:.0f} s left"
                yield Progress("", step / self.how.steps, note)
        last = self.error()
        note = f"held out {_decibels(first):.2f} dB before, {_decibels(last):.2f} dB after"
        yield Progress("", 1.0, note)
        if isfinite(last):
            self.save(optimizer, self.how.steps)
        return self.student.quantized() if last < first else before

    def loss(self, numbers: Sequence[int]) -> Any:
        """The mean over batches of the squared error over the squared output of the float module."""
        feeds = {
            name: np.concatenate([self.pieces[i][name] for i in numbers]) for name in self.pieces[numbers[0]]
        }
        sizes = [len(next(iter(self.pieces[i].values()))) for i in numbers]
        total = 0.0
        if self.how.layer_loss > 0:
            total, wanted, got = self.layer_losses(feeds)
            total = self.how.layer_loss * total
            targets = [output.split(sizes) for output in wanted]
        else:
            got = self.student(feeds)
            targets = list(zip(*(self.target(i) for i in numbers)))
        for outputs, rights in zip(got, targets, strict=True):
            for output, right in zip(outputs.split(sizes), rights, strict=True):
                total = total + self.relative(output, right) / len(sizes)
        return total

    def relative(self, got: Any, right: Any) -> Any:
        """Of one call."""
        error = _relative(got, right)
        if self.how.guidance is not None:
            s = self.how.guidance
            guided = [(1 - s) * plain + s * told for plain, told in (got.chunk(2), right.chunk(2))]
            error = (error + _relative(*guided)) / 2
        return error

    def layer_losses(self, feeds: Mapping[str, Array]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """The error of the trained layers' outputs, and the part's outputs in float and in integers."""
        names = [name for name in quantizable(self.part) if name in self.student.names]
        right: dict[str, Any] = {}
        got: dict[str, Any] = {}
        th = torch()
        with th.no_grad(), listening(self.part, names, right):
            arguments = (th.from_numpy(np.ascontiguousarray(feeds[i.name])) for i in self.part.inputs)
            wanted = self.part.module(*arguments)
        with listening(self.part, names, got):
            outputs = self.student(feeds)
        total = sum(_relative(got[name], right[name]) for name in got) / max(len(got), 1)
        return total, wanted if isinstance(wanted, tuple) else (wanted,), outputs

    def target(self, number: int) -> tuple[Any, ...]:
        if number not in self.targets:
            outputs = run_part(self.part, self.pieces[number]).values()
            self.targets[number] = tuple(torch().from_numpy(output) for output in outputs)
        return self.targets[number]

    def error(self) -> float:
        """Of the part's outputs alone, on what is held out."""
        found = []
        with torch().no_grad():
            for piece in self.exam[:: -(-len(self.exam) // HELD_MOST)]:
                right = (torch().from_numpy(output) for output in run_part(self.part, piece).values())
                found += [
                    float(self.relative(*pair)) for pair in zip(self.student(piece), right, strict=True)
                ]
        return float(np.mean(found))

    def optimizer(self) -> Any:
        groups = [
            {"params": list(tensors.values()), "kind": kind}
            for kind, tensors in self.student.tensors.items()
            if tensors
        ]
        # a weight's gradient is in units of its step: far below Adam's usual epsilon of 1e-8
        return torch().optim.Adam(groups, lr=0.0, betas=BETAS, eps=1e-15)

    def set_rates(self, optimizer: Any, step: int) -> None:
        """A short rise, then half a cosine to nothing, so that weights come to rest on one code."""
        share = (step + 1) / self.how.steps
        factor = min(1.0, share / WARM) * (1 + cos(pi * share)) / 2
        rates = self.how.rates()
        for group in optimizer.param_groups:
            group["lr"] = factor * rates[group["kind"]]

    def save(self, optimizer: Any, step: int) -> None:
        buffer = io.BytesIO()
        state = {"step": step, "tensors": self.student.tensors, "optimizer": optimizer.state_dict()}
        torch().save(state, buffer)
        with output_errors(self.path, size=buffer.tell()):
            atomic_write(self.path, buffer.getvalue())

    def load(self, optimizer: Any) -> int:
        """The step to go on with: 0 where nothing is kept."""
        if not self.path.exists():
            return 0
        state = torch().load(self.path, weights_only=True)
        with torch().no_grad():
            for kind, tensors in state["tensors"].items():
                for name, tensor in tensors.items():
                    self.student.tensors[kind][name].copy_(tensor)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def _relative(got: Any, right: Any) -> Any:
    return (got - right).square().sum() / right.square().sum().clamp_min(1e-12)


def _decibels(error: float) -> float:
    return float(10 * np.log10(1 / max(error, 1e-30)))


def _holds(module: Any) -> bool:
    """Whether parameters are the module's own, not its children's."""
    return any(True for _ in module.parameters(recurse=False))

"""Training what rounding broke: a quantized part learns the outputs of its own float module, without data.

At 4 bits of weights and inputs no choice of grids is enough. Here the integers themselves are trained, with gradients
straight through the rounding, on calls the shipped plan makes: as QuEST does it (Wang et al. 2024, arXiv:2402.03666) in
stages, first the layers that carry the time, then the sensitive ones, or all of them at once, which is affordable where
the network is small. A job that was cut off goes on where it was and ends with the same bits.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
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
from .straight import KINDS, Trainable

__all__ = ["QUEST", "Finetune", "finetune"]

QUEST = ("time_emb", "ff.net.2")
"""Its two stages by the names diffusers gives: all that projects the time, then the second linear layer of every
feed-forward, whose inputs have the widest outliers (section 4.2)."""

WARM = 0.03
"""Share of the steps over which the rate rises, so that Adam's second moments are there before it is full."""

BETAS = (0.9, 0.99)
"""Adam's: a hundred steps of memory, of a few thousand."""

HELD = 8
"""One in so many batches is not trained on, and says whether the result is better than the beginning."""

HELD_MOST = 32
"""Of those, at most: a twentieth of a percent of the training's forwards."""

REPORT = 10
"""Steps between two words of progress."""


@dataclass(frozen=True)
class Finetune:
    """How a quantized part is trained."""

    steps: int = 4000
    """Of the optimizer, in each stage."""
    batch: int = 16
    """Rows of network input in one step, put together from recorded calls at different times."""
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
        for name in ("steps", "batch", "save_every"):
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
    part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], how: Finetune, store: Path
) -> Generator[Progress, None, Quantized]:
    """Train the integers of `part` until its outputs are those of its float module.

    batches  calls the part really sees, by input name: at least 2, each of a few samples
    store    a folder for checkpoints; jobs of other parts, batches or settings do not meet there
    What comes back is no worse than `quantized` on the batches held out. It has no drift: that belonged to the old
    weights.
    Raises BadInput for batches that are not finite, for a stage without layers, and when the training diverges; the
    last good checkpoint then stays in the store.
    """
    _check(batches)
    store.mkdir(parents=True, exist_ok=True)
    key = _key(part, quantized, batches, how)
    for number, stage in enumerate(how.stages):
        names = [name for name, module in part.module.named_modules() if stage in name and _holds(module)]
        if not names:
            raise BadInput(
                f"no layer of {part.name} has {stage!r} in its name", fix="name others in `stages`"
            )
        work = _Stage(
            part, Trainable(part, quantized, names), batches, how, store / f"finetune-{key}-{number}"
        )
        running = work.run()
        while True:
            try:
                at = next(running)
            except StopIteration as end:
                quantized = end.value
                break
            assert at.fraction is not None, "a stage knows its steps"
            yield Progress(
                f"finetune {part.name}",
                (number + at.fraction) / len(how.stages),
                f"{stage or 'all'}: {at.note}",
            )
    return quantized


@dataclass
class _Stage:
    """Some layers being trained."""

    part: Part
    student: Trainable
    batches: Sequence[Mapping[str, Array]]
    how: Finetune
    path: Path
    targets: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    """Outputs of the float module, by number of the batch."""

    def run(self) -> Generator[Progress, None, Quantized]:
        held = list(range(len(self.batches)))[HELD - 1 :: HELD] or [len(self.batches) - 1]
        seen = [i for i in range(len(self.batches)) if i not in set(held)]
        held = held[:HELD_MOST]
        before = self.student.quantized()
        first = self.error(held)
        optimizer = self.optimizer()
        begin = self.load(optimizer)
        started, smooth = time.monotonic(), 0.0
        for step in range(begin, self.how.steps):
            self.set_rates(optimizer, step)
            optimizer.zero_grad()
            loss = self.loss(self.drawn(seen, step))
            smooth = float(loss.detach()) if step == begin else 0.95 * smooth + 0.05 * float(loss.detach())
            if not isfinite(float(loss.detach())):
                raise BadInput(
                    f"finetuning {self.part.name} diverged: the loss is {float(loss.detach())} at step {step}",
                    expected="a number",
                    fix=f"halve the rates; the last good state is in {self.path}"
                    if self.path.exists()
                    else "halve the rates",
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
        last = self.error(held)
        note = f"held out {_decibels(first):.2f} dB before, {_decibels(last):.2f} dB after"
        yield Progress("", 1.0, note)
        self.save(optimizer, self.how.steps)
        return self.student.quantized() if last < first else before

    def drawn(self, seen: list[int], step: int) -> list[int]:
        """Which batches this step takes: every one once before any comes again, in an order of its own each time."""
        rows = len(next(iter(self.batches[0].values())))
        many = max(1, round(self.how.batch / rows))
        places = range(step * many, (step + 1) * many)
        orders = {at // len(seen): None for at in places}
        shuffled = {e: np.random.default_rng([self.how.seed, e]).permutation(seen) for e in orders}
        return [int(shuffled[at // len(seen)][at % len(seen)]) for at in places]

    def loss(self, numbers: Sequence[int]) -> Any:
        """The mean over batches of the squared error over the squared output of the float module."""
        feeds = {
            name: np.concatenate([self.batches[i][name] for i in numbers])
            for name in self.batches[numbers[0]]
        }
        sizes = [len(next(iter(self.batches[i].values()))) for i in numbers]
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
        names = list(self.student.tensors["codes"])
        right: dict[str, Any] = {}
        got: dict[str, Any] = {}
        th = torch()
        with th.no_grad(), _listening(self.part, names, right):
            arguments = (th.from_numpy(np.ascontiguousarray(feeds[i.name])) for i in self.part.inputs)
            wanted = self.part.module(*arguments)
        with _listening(self.part, names, got):
            outputs = self.student(feeds)
        total = sum(_relative(got[name], right[name]) for name in names) / len(names)
        return total, wanted if isinstance(wanted, tuple) else (wanted,), outputs

    def target(self, number: int) -> tuple[Any, ...]:
        if number not in self.targets:
            outputs = run_part(self.part, self.batches[number]).values()
            self.targets[number] = tuple(torch().from_numpy(output) for output in outputs)
        return self.targets[number]

    def error(self, numbers: Sequence[int]) -> float:
        """Of the part's outputs alone."""
        with torch().no_grad():
            pairs = ((self.student(self.batches[i]), self.target(i)) for i in numbers)
            return float(
                np.mean([float(self.relative(g, r)) for got, right in pairs for g, r in zip(got, right)])
            )

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


@contextmanager
def _listening(part: Part, names: Sequence[str], into: dict[str, Any]) -> Iterator[None]:
    """Outputs of the modules `names` are kept."""

    def keep(name: str, _: Any, __: Any, output: Any) -> None:
        into[name] = output

    modules = dict(part.module.named_modules())
    hooks = [modules[name].register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _relative(got: Any, right: Any) -> Any:
    return (got - right).square().sum() / right.square().sum().clamp_min(1e-12)


def _decibels(error: float) -> float:
    return float(10 * np.log10(1 / max(error, 1e-30)))


def _holds(module: Any) -> bool:
    """Whether parameters are the module's own, not its children's."""
    return any(True for _ in module.parameters(recurse=False))


def _check(batches: Sequence[Mapping[str, Array]]) -> None:
    if len(batches) < 2:
        raise BadInput(
            f"{len(batches)} batches to finetune on", expected="at least 2", fix="record more calls"
        )
    for number, batch in enumerate(batches):
        for name, array in batch.items():
            if not np.isfinite(array).all():
                raise BadInput(
                    f"batch {number}: {name} is not finite", expected="numbers", fix="record the calls again"
                )


def _key(part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], how: Finetune) -> str:
    """Of all that the result depends on."""
    digest = hashlib.sha256(json.dumps([part.name, asdict(how)], sort_keys=True).encode())
    for name, tensor in part.module.state_dict().items():
        digest.update(name.encode() + np.ascontiguousarray(tensor.detach().numpy()).tobytes())
    for name, layer in quantized.layers.items():
        digest.update(f"{name} {layer.input} {layer.weights.bits}".encode())
        arrays = (layer.weights.codes, layer.weights.scale, layer.weights.zero, layer.weights.multiplier)
        for array in (*arrays, layer.smooth, layer.bias):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    for named in (quantized.params, *batches):
        for name in sorted(named):
            digest.update(name.encode() + np.ascontiguousarray(named[name]).tobytes())
    return digest.hexdigest()[:16]

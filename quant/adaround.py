"""Rounding learned block by block, so that a block's output is what it was in floating point.

AdaRound (Nagel et al. 2020, arXiv:2004.10568) over the blocks of BRECQ (Li et al. 2021, arXiv:2102.05426), as
Q-Diffusion has it: a block is fed what the quantized blocks before it put out, and must put out what the float network
does there. Each weight is softly between two neighbouring codes, floor + h(V), and is driven to one of them while the
error falls.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Activations, Layer, Quantized
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .blocks import Block, Store, find_blocks, record
from .compensate import float_weight
from .simulate import simulated
from .soft import Soft

__all__ = ["AdaRound", "reconstruct"]

Array = NDArray[Any]

BETA = (20.0, 2.0)
"""Power of the regularizer at first and in the end (AdaRound's code)."""

WARM = 0.2
"""Share of the iterations without the regularizer (the same)."""

REPORT = 50
"""Iterations between two words of progress."""

TINY = 1e-20
"""Below any error there is, and far above the smallest float32: what is divided by is at least this."""


@dataclass(frozen=True)
class AdaRound:
    """How the rounding of a part is learned."""

    iterations: int = 1500
    """On each block. On a ResnetBlock2D of emoji-64 at 3 bits the error of its output falls from 19.0 dB below it, with
    the nearest codes, to 26.3 in 500 and 27.7 in 1500; gptq gives 27.1 in a hundredth of the time."""
    batch: int = 16
    """Rows of a block's input in each."""
    rate: float = 0.02
    """Adam's, of V."""
    weight: float = 100.0
    """Of the regularizer, a mean over weights, beside the error over that of the nearest codes. At 0.3 a third of
    the weights end between two codes, and rounding them loses what was learned; at 100, 1 in 4000."""
    input_iterations: int = 0
    """With the rounding done, on the steps of the inputs' codes (Q-Diffusion's second stage)."""
    input_rate: float = 0.001
    """Adam's, of the logarithm of a step."""
    memory_mib: int = 1024
    """Of a block's recorded inputs and outputs."""
    held: int = 8
    """One row in so many is not trained on and says whether the result is better than the beginning."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch", "memory_mib"):
            if getattr(self, name) < 1:
                raise BadInput(f"{getattr(self, name)} {name}", expected="at least 1")
        if self.held < 2:
            raise BadInput(f"held {self.held}", expected="at least 2: one row in 2 held out")


def reconstruct(
    part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], how: AdaRound, store: Path
) -> Generator[Progress, None, Quantized]:
    """The codes of every Linear and convolution of `quantized` learned, on the grids they have.

    quantized  the grids, and codes that stay where learning finds no better ones: those of compensate, best
    batches    named inputs the part really sees, one forward each
    store      a folder: finished blocks are kept there, so that a job that was cut off goes on with the next
    No block comes back worse than it was on the rows held out.
    Raises BadInput without batches and where a block's output is not finite; OutputError where the store cannot be
    written.
    """
    if not batches:
        raise BadInput("no batches to learn rounding from", expected="inputs recorded by calibration")
    modules = dict(part.module.named_modules())
    names = [name for name in quantized.layers if type(modules[name]).__name__ != "Embedding"]
    blocks = find_blocks(part, batches[0], names)
    kept = Store(store, part, quantized, batches, how)
    stage, started, worked = f"round {part.name}", time.monotonic(), 0
    for number, block in enumerate(blocks):
        old = {name: quantized.layers[name] for name in block.layers}
        new = kept.load(f"block-{number:03d}", old)
        if new is None:
            work = _Work(part, quantized, block, batches, how)
            for share, note in work.run():
                left = (time.monotonic() - started) / (worked + share) * (len(blocks) - number - share)
                note = f"block {number + 1} of {len(blocks)}, {block.name}: {note}, {left:.0f} s left"
                yield Progress(stage, (number + share) / len(blocks), note)
            new, worked = work.layers, worked + 1
            kept.save(f"block-{number:03d}", new)
        quantized = replace(quantized, layers={**quantized.layers, **new})
    yield Progress(stage, 1.0, f"{len(blocks)} blocks")
    return quantized


@dataclass
class _Work:
    """One block being learned; afterwards `layers` is the result."""

    part: Part
    quantized: Quantized
    block: Block
    batches: Sequence[Mapping[str, Array]]
    how: AdaRound
    layers: dict[str, Layer] = field(default_factory=dict)

    def run(self) -> Iterator[tuple[float, str]]:
        """Yields (share done, a note)."""
        self.modules = dict(self.part.module.named_modules())
        self.layers = {name: self.quantized.layers[name] for name in self.block.layers}
        room = self.how.memory_mib / 2
        self.right = record(self.part, self.batches, self.block.name, room).output
        with simulated(self.part, self.quantized):
            self.fed = record(self.part, self.batches, self.block.name, room)
        finite = torch().isfinite
        if not (finite(self.right).all() and finite(self.fed.output).all()):
            raise BadInput(
                f"{self.part.name}.{self.block.name} puts out what is not finite",
                fix="look for NaN in the calibration",
            )
        every = np.arange(len(self.right))
        self.held = every[self.how.held - 1 :: self.how.held]
        self.seen = np.setdiff1d(every, self.held) if len(self.held) else every
        self.held = self.held if len(self.held) else every
        with _frozen(self.modules[self.block.name]):
            before = self.error(self.layers)
            yield from self._codes()
            yield from self._inputs()
            after = self.error(self.layers)
        yield 1.0, f"error {_db(before):.1f} dB before, {_db(after):.1f} dB after"

    def _codes(self) -> Iterator[tuple[float, str]]:
        """The rounding, on steps that stay."""
        how, th = self.how, torch()
        soft = {n: Soft.at(float_weight(self.modules[n], layer), layer) for n, layer in self.layers.items()}
        count = sum(one.v.numel() for one in soft.values())
        scale = max(self.error({n: one.hard(self.layers[n]) for n, one in soft.items()}), TINY)
        # gradients of a mean over many weights are far below Adam's usual epsilon of 1e-8
        optimizer = th.optim.Adam([one.v for one in soft.values()], lr=how.rate, eps=TINY)
        rng = np.random.default_rng(how.seed)
        warm = round(WARM * how.iterations)
        with self._simulated(self.layers):
            for k in range(how.iterations):
                optimizer.zero_grad()
                weights = {n: one.weight() for n, one in soft.items()}
                loss = self._loss(rng.choice(self.seen, how.batch), weights) / scale
                if k >= warm:
                    share = (k - warm) / (how.iterations - warm)
                    beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - share)
                    between = sum((1 - (2 * one.h() - 1).abs().pow(beta)).sum() for one in soft.values())
                    loss = loss + how.weight * between / count
                loss.backward()
                optimizer.step()
                if k % REPORT == 0:
                    yield (
                        (k + 1) / (how.iterations + how.input_iterations),
                        f"loss {float(loss.detach()):.3f}",
                    )
        self._keep({n: one.hard(self.layers[n]) for n, one in soft.items()})

    def _inputs(self) -> Iterator[tuple[float, str]]:
        """Steps of the inputs' codes, by gradients through rounding (LSQ, Esser et al. 2020, arXiv:1902.08153)."""
        how, th = self.how, torch()
        factors = {
            n: th.zeros((), requires_grad=True) for n in self.layers if self.layers[n].input is not None
        }
        if not factors or not how.input_iterations:
            return
        optimizer = th.optim.Adam(list(factors.values()), lr=how.input_rate, eps=TINY)
        rng = np.random.default_rng([how.seed, 1])
        scale = max(self.error(self.layers), TINY)
        with ExitStack() as stack:
            stack.enter_context(
                self._simulated({n: replace(self.layers[n], input=None) for n in self.layers})
            )
            for name, factor in factors.items():
                hook = partial(_rounding, self.layers[name].input, factor)
                stack.callback(self.modules[name].register_forward_pre_hook(hook).remove)
            for k in range(how.input_iterations):
                optimizer.zero_grad()
                loss = self._loss(rng.choice(self.seen, how.batch), {}) / scale
                loss.backward()
                optimizer.step()
                if k % REPORT == 0:
                    done = (how.iterations + k + 1) / (how.iterations + how.input_iterations)
                    yield done, f"inputs, loss {float(loss.detach()):.3f}"
        self._keep({n: _stepped(layer, factors.get(n)) for n, layer in self.layers.items()})

    def _keep(self, layers: dict[str, Layer]) -> None:
        """These instead, if they are better on the rows held out."""
        if self.error(layers) < self.error(self.layers):
            self.layers = layers

    def error(self, layers: Mapping[str, Layer]) -> float:
        """Mean square of the output's error on the rows held out, over that of the output."""
        pieces = np.array_split(self.held, -(-len(self.held) // self.how.batch))
        with torch().no_grad(), self._simulated(layers):
            return float(sum(self._loss(rows, {}) * len(rows) for rows in pieces)) / len(self.held)

    def _loss(self, rows: Array, weights: Mapping[str, Any]) -> Any:
        """weights  in place of the module's, by layer"""
        rows = torch().from_numpy(rows)
        arguments, named = self.fed.rows(rows)
        inside = {_below(self.block.name, name): weight for name, weight in weights.items()}
        module = self.modules[self.block.name]
        output = torch().func.functional_call(module, inside, arguments, named)
        output = output[0] if isinstance(output, tuple) else output
        right = self.right[rows]
        return (output - right).square().mean() / right.square().mean().clamp_min(TINY)

    def _simulated(self, layers: Mapping[str, Layer]) -> AbstractContextManager[None]:
        """The block as it is with these layers; the others do not run."""
        return simulated(self.part, replace(self.quantized, layers=layers, drift=None))


@contextmanager
def _frozen(module: Any) -> Iterator[None]:
    """No parameter gathers gradients."""
    asked = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _below(block: str, layer: str) -> str:
    """Where a layer's weights are inside its block."""
    return "weight" if layer == block else f"{layer.removeprefix(f'{block}.')}.weight"


def _rounding(given: Activations | None, factor: Any, _: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook that rounds a layer's input in steps of `given`'s times e^factor, with gradients of both."""
    assert given is not None, "only layers with rounded inputs learn their step"
    scale = given.scale * factor.exp()
    unit = arguments[0] / scale
    whole = unit + (unit.round() - unit).detach()
    whole = whole.clamp(-given.zero, 2**given.bits - 1 - given.zero)
    return (whole * scale, *arguments[1:])


def _stepped(layer: Layer, factor: Any) -> Layer:
    if factor is None or layer.input is None:
        return layer
    scale = float(layer.input.scale * np.exp(float(factor.detach())))
    return replace(layer, input=replace(layer.input, scale=scale))


def _db(ratio: float) -> float:
    return -10 * float(np.log10(max(ratio, TINY)))

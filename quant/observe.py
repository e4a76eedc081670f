"""What the layers of a part are fed, in one pass of forwards; and the grid of codes their inputs are rounded to.

Nothing of the size of an activation is kept: a histogram for every layer and call of the plan, and a least and largest
value a channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Activations
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .grid import BINS, errors, search

__all__ = ["Seen", "input_codes", "observe", "predicted_db", "step_codes", "step_gain_db"]

Array = NDArray[Any]

SAMPLED = 1 << 18
"""Values of one input that are counted; of larger ones, every so many. Least and largest are of all."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One layer's inputs over all batches."""

    steps: tuple[int, ...]
    """Rows of the plan, ascending."""
    counts: NDArray[np.float64]
    """[steps, BINS] over -bound to bound; where channels weigh differently (see observe), their weights."""
    bound: float
    ranges: NDArray[np.float32]
    """[steps, 2]: least and largest of each step."""
    lows: NDArray[np.float32]
    """[channels]: least of each input channel, over all steps."""
    highs: NDArray[np.float32]
    """[channels]: largest of each."""
    rows: NDArray[np.float32]
    """[rows, inner] some inputs as the layer multiplies its weights with them, numbered as torch lays out a row of
    weights: a token, or the patch under a kernel. As many as were asked for, spread over all batches."""

    @property
    def low(self) -> float:
        return float(self.ranges[:, 0].min())

    @property
    def high(self) -> float:
        return float(self.ranges[:, 1].max())

    @property
    def peaks(self) -> NDArray[np.float32]:
        """[channels]: largest magnitude of each."""
        return np.maximum(np.abs(self.lows), np.abs(self.highs))

    def histogram(self, step: int | None = None) -> tuple[Array, Array]:
        """(values, counts) of the bins that are not empty; of one step, or of all together."""
        counts = self.counts.sum(axis=0) if step is None else self.counts[self.steps.index(step)]
        used = np.flatnonzero(counts)
        return (used + 0.5) * self.width - self.bound, counts[used]

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2 * self.bound / BINS


def observe(
    part: Part,
    batches: Sequence[Mapping[str, Array]],
    names: Collection[str],
    steps: Sequence[int],
    *,
    rows: int = 0,
    smooth: Mapping[str, Array] | None = None,
    weighted: bool = False,
) -> Generator[Progress, None, dict[str, Seen]]:
    """Run every batch once through part.module and count what its layers are fed.

    names   modules inside part.module, Linear or convolutions; one that no batch reaches is not in the result
    steps   row of the plan each batch belongs to
    rows    inputs kept of each layer, for smoothing and rounding
    smooth  layer -> [channels] its input is divided by first, as quantized.Layer.smooth. A rounding error of channel j
            is multiplied by smooth[j] again, so its values count smooth[j]^2 times: ranges then minimise, and
            predicted_db tells, the noise of the input as it was
    weighted  values count as often as the squares of their channel's weights besides, so that ranges minimise the noise
              of the layer's output
    Raises BadInput for NaN or infinity in a layer's input or the part's output, naming the first layer and the step.
    """
    th = torch()
    modules = dict(part.module.named_modules())
    each = -(-rows // max(len(batches), 1))
    counting = {
        name: _Counting(modules[name], each, None if smooth is None else smooth.get(name), weighted)
        for name in names
    }
    now = [0]

    def hook(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def look(_: Any, arguments: tuple[Any, ...]) -> None:
            if not counting[name].add(arguments[0].detach(), now[0]):
                raise _not_finite(f"the input of {name}", part, now[0])

        return look

    with ExitStack() as stack, th.no_grad():
        for name in counting:
            stack.callback(modules[name].register_forward_pre_hook(hook(name)).remove)
        for number, (batch, step) in enumerate(zip(batches, steps, strict=True)):
            yield Progress(
                "observe", number / len(batches), f"{part.name}, batch {number + 1} of {len(batches)}"
            )
            now[0] = step
            output = part.module(*(th.from_numpy(np.ascontiguousarray(batch[i.name])) for i in part.inputs))
            for one in output if isinstance(output, tuple) else (output,):
                if not bool(th.isfinite(one).all()):
                    raise _not_finite("the output", part, step)
    return {name: counted.seen() for name, counted in counting.items() if counted.counts}


def _not_finite(what: str, part: Part, step: int) -> BadInput:
    return BadInput(
        f"{part.name}: {what} holds NaN or infinity at call {step + 1} of the plan",
        expected="numbers",
        fix="the inputs or the weights are damaged: calibrate again, or take another checkpoint",
    )


@dataclass
class _Counting:
    """One layer's statistics in the making."""

    module: Any
    rows: int
    """Kept of each forward."""
    smooth: Array | None
    weighted: bool
    bound: float = 0.0
    counts: dict[int, Any] = field(default_factory=dict)
    ranges: dict[int, list[float]] = field(default_factory=dict)
    lows: Any = None
    highs: Any = None
    kept: list[Array] = field(default_factory=list)
    calls: int = 0

    def add(self, x: Any, step: int) -> bool:
        """Whether all of it is finite."""
        th = torch()
        axis = x.ndim - 1 if isinstance(self.module, th.nn.Linear) else 1
        if self.smooth is not None:
            shape = [1] * x.ndim
            shape[axis] = -1
            x = x / th.from_numpy(np.asarray(self.smooth, np.float32)).reshape(shape)
        others = [a for a in range(x.ndim) if a != axis]
        lows, highs = x.amin(others), x.amax(others)
        low, high = float(lows.min()), float(highs.max())
        if not math.isfinite(low + high):
            return False
        self.lows = lows if self.lows is None else th.minimum(self.lows, lows)
        self.highs = highs if self.highs is None else th.maximum(self.highs, highs)
        least, most = self.ranges.get(step, (low, high))
        self.ranges[step] = [min(least, low), max(most, high)]
        self._widen(max(abs(low), abs(high)))
        flat = x.reshape(-1)
        stride = -(-flat.numel() // SAMPLED)
        while math.gcd(stride, flat.numel()) > 1:  # so that no channel or column is passed over
            stride += 1
        picked = slice(self.calls % stride, None, stride)
        importance = self._importance(x.shape[axis])
        if importance is None:
            found = th.histc(flat[picked], BINS, -self.bound, self.bound)
        else:
            shape = [1] * x.ndim
            shape[axis] = -1
            each = importance.reshape(shape).expand(x.shape).reshape(-1)[picked]
            bins = ((flat[picked] + self.bound) * (BINS / 2 / self.bound)).long().clamp_(0, BINS - 1)
            found = th.bincount(bins, each, BINS)
        self.counts[step] = self.counts.get(step, 0) + found.numpy().astype(np.float64)
        self.calls += 1
        if self.rows:
            self.kept.append(_rows(self.module, x, self.rows, np.random.default_rng(self.calls)))
        return True

    def _importance(self, channels: int) -> Any:
        """[channels] how much a value of each counts; None: alike."""
        th = torch()
        weight = self.module.weight.detach()
        found = None
        if self.weighted and weight.shape[1] == channels:
            found = weight.square().sum([a for a in range(weight.ndim) if a != 1]).double()
            found = found / found.mean() if float(found.sum()) > 0 else None
        if self.smooth is not None:
            squares = th.from_numpy(np.asarray(self.smooth, np.float64)).square()
            found = squares if found is None else found * squares
        return found

    def _widen(self, peak: float) -> None:
        """Double the range until it holds `peak`; pairs of bins become one, so that nothing counted is lost."""
        if self.bound == 0.0:
            self.bound = peak
        if self.bound == 0.0:
            self.bound = 1.0  # nothing but zeros so far
        while peak > self.bound:
            self.bound *= 2
            for step, counts in self.counts.items():
                pairs = counts.reshape(-1, 2).sum(axis=1)
                self.counts[step] = np.pad(pairs, BINS // 4)

    def seen(self) -> Seen:
        steps = tuple(sorted(self.counts))
        return Seen(
            steps,
            np.stack([self.counts[step] for step in steps]),
            self.bound,
            np.array([self.ranges[step] for step in steps], np.float32),
            self.lows.numpy(),
            self.highs.numpy(),
            np.concatenate(self.kept) if self.kept else np.empty((0, 0), np.float32),
        )


def _rows(module: Any, x: Any, count: int, rng: np.random.Generator) -> Array:
    """[count, inner] inputs at random places: tokens, or the patches under the kernel (of the first group)."""
    th = torch()
    if isinstance(module, th.nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        return np.array(flat[th.from_numpy(rng.integers(len(flat), size=count))].numpy())
    if isinstance(module.padding, str):
        return np.empty((0, math.prod(module.weight.shape[1:])), np.float32)
    padding = [pad for size in reversed(module.padding) for pad in (size, size)]
    padded = th.nn.functional.pad(x[:, : module.weight.shape[1]], padding)
    reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size)]
    rows = []
    for _ in range(count):
        place: list[Any] = [int(rng.integers(len(x))), slice(None)]
        for size, span, stride, dilation in zip(padded.shape[2:], reach, module.stride, module.dilation):
            start = stride * int(rng.integers((size - span) // stride + 1))
            place.append(slice(start, start + span, dilation))
        rows.append(padded[tuple(place)].reshape(-1).numpy())
    return np.stack(rows)


def input_codes(seen: Seen, bits: int, step: int | None = None) -> Activations:
    """The grid of least sum |x - x^|^2.4 over what was seen, ends shrunk together first and then each alone.

    bits  2 to 8
    step  for this row of the plan alone
    """
    if not 2 <= bits <= 8:
        raise BadInput(f"inputs of {bits} bits", expected="2 to 8")
    values, counts = seen.histogram(step)
    low, high = seen.ranges[seen.steps.index(step)] if step is not None else (seen.low, seen.high)
    return search(values, counts, seen.width, float(low), float(high), bits)


def predicted_db(seen: Seen, how: Activations, step: int | None = None) -> float:
    """Signal to noise ratio of the rounded input, in decibels: of all steps, or of one."""
    values, counts = seen.histogram(step)
    signal = float((values**2 + seen.width**2 / 12) @ counts)
    return _decibels(signal, float(errors(values, counts, seen.width, [how], 2.0)[0]))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return math.inf
    return 10 * math.log10(max(signal, np.finfo(np.float64).tiny) / noise)


def step_codes(seen: Seen, bits: int) -> dict[int, Activations]:
    """A grid of its own for every row of the plan."""
    return {step: input_codes(seen, bits, step) for step in seen.steps}


def step_gain_db(seen: Seen, bits: int) -> dict[int, float]:
    """What a grid of its own would gain at every row of the plan over the one for all, in decibels of input noise."""
    shared = input_codes(seen, bits)
    own = step_codes(seen, bits)
    return {s: predicted_db(seen, own[s], s) - predicted_db(seen, shared, s) for s in seen.steps}

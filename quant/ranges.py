"""Ranges of what layers are fed and of what they give, for codes of 16 bits: too fine to search a grid for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Activations
from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from .grid import codes_of_range

__all__ = ["BITS", "HEADROOM", "Ranges", "output_ranges"]

Array = NDArray[Any]

BITS = 16

HEADROOM = 1.25
"""Of a range over what was seen: a fifth of the codes is 2 of 98 dB, and what lies beyond would be clipped."""


@dataclass(frozen=True)
class Ranges:
    """Least and largest, over every batch."""

    input: tuple[float, float]
    output: tuple[float, float]

    def codes(self) -> tuple[Activations, Activations]:
        """Of the input and of the output."""
        return _codes(*self.input), _codes(*self.output)


def _codes(low: float, high: float) -> Activations:
    return codes_of_range(HEADROOM * low, HEADROOM * high, BITS)


def output_ranges(
    part: Part, batches: Sequence[Mapping[str, Array]], names: Collection[str]
) -> Generator[Progress, None, dict[str, Ranges]]:
    """Run every batch once through part.module and keep the ends of what its layers take and give.

    names  modules inside part.module; one that no batch reaches is not in the result
    Raises BadInput for NaN or infinity, naming the layer.
    """
    th = torch()
    modules, found = dict(part.module.named_modules()), dict[str, Ranges]()

    def hook(name: str) -> Callable[[Any, tuple[Any, ...], Any], None]:
        def look(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
            x = arguments[0].detach()
            ends = [float(end) for values in (x, output) for end in (values.min(), values.max())]
            if not all(map(math.isfinite, ends)):
                raise BadInput(
                    f"{part.name}: {name} takes or gives NaN or infinity",
                    expected="numbers",
                    fix="the inputs or the weights are damaged: calibrate again, or take another checkpoint",
                )
            if name in found:
                ends = [
                    pick(old, new)
                    for pick, old, new in zip(
                        (min, max, min, max), (*found[name].input, *found[name].output), ends
                    )
                ]
            found[name] = Ranges((ends[0], ends[1]), (ends[2], ends[3]))

        return look

    with ExitStack() as stack, th.no_grad():
        for name in names:
            stack.callback(modules[name].register_forward_hook(hook(name)).remove)
        for number, batch in enumerate(batches):
            yield Progress(
                "observe", number / len(batches), f"{part.name}, batch {number + 1} of {len(batches)}"
            )
            part.module(*(th.from_numpy(np.ascontiguousarray(batch[i.name])) for i in part.inputs))
    return found

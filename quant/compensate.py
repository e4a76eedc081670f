"""A part's codes once more, with error compensation: gptq layer by layer, from what each is really fed."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Part
from ..model.quantized import Layer, Quantized
from ..runtime.progress import Progress
from .blocks import Store, run_order
from .rounding import DAMPING, ROWS, WIDEST, gptq, moments, moments_shape
from .simulate import simulated
from .weights import smoothed

__all__ = ["Compensation", "compensate", "float_weight"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Compensation:
    """How the codes of a part are rounded with error compensation."""

    passes: int = 1
    """Of forwards over all batches, at least: the layers of a later one see the final codes of those before, the
    rounded ones nearest codes of the others."""
    memory_mib: int = 3072
    """Of the moments of one pass: a part with more takes more passes."""
    widest: int = WIDEST
    """Columns of a row that are compensated together."""
    rows: int = ROWS
    """Input rows drawn for each of them."""
    damping: float = DAMPING
    """Of the mean diagonal of the moments."""


def compensate(
    part: Part, quantized: Quantized, batches: Sequence[Mapping[str, Array]], how: Compensation, store: Path
) -> Generator[Progress, None, Quantized]:
    """Every Linear and convolution of `quantized` gets the codes of gptq on the grid it has.

    batches  named inputs the part really sees, one forward each
    store    a folder: finished passes are kept there, so that a job that was cut off goes on with the next
    Raises what moments does, and OutputError where the store cannot be written.
    """
    modules = dict(part.module.named_modules())
    names = [name for name in quantized.layers if type(modules[name]).__name__ != "Embedding"]
    names = run_order(part, batches[0], names) if batches else names
    kept = Store(store, part, quantized, batches, how)
    stage, done = f"compensate {part.name}", 0
    for number, some in enumerate(_passes(modules, names, how)):
        old = {name: quantized.layers[name] for name in some}
        new = kept.load(f"pass-{number:03d}", old)
        if new is None:
            yield Progress(stage, done / len(names), f"inputs of layers {done + 1} to {done + len(some)}")
            with simulated(part, quantized):
                sums = moments(part, batches, some, widest=how.widest, rows=how.rows)
            new = {}
            for name, layer in old.items():
                at = done + len(new)
                yield Progress(stage, at / len(names), f"layer {at + 1} of {len(names)}, {name}")
                weight = float_weight(modules[name], layer)
                weights = gptq(weight, layer.weights, sums.pop(name), damping=how.damping)
                new[name] = replace(layer, weights=weights)
            kept.save(f"pass-{number:03d}", new)
        quantized = replace(quantized, layers={**quantized.layers, **new})
        done += len(some)
    yield Progress(stage, 1.0, f"{len(names)} layers")
    return quantized


def float_weight(module: Any, layer: Layer) -> NDArray[np.float32]:
    """What the codes of a layer stand for: the module's weights, times `smooth` where it has one."""
    return smoothed(module.weight.detach().float().numpy(), layer.smooth)


def _passes(modules: Mapping[str, Any], names: Sequence[str], how: Compensation) -> Iterator[list[str]]:
    """Layers whose moments are taken together."""
    most, room = -(-len(names) // how.passes), how.memory_mib * 2**20
    some: list[str] = []
    used = 0
    for name in names:
        size = 4 * int(np.prod(moments_shape(modules[name], how.widest)))
        if some and (len(some) == most or used + size > room):
            yield some
            some, used = [], 0
        some.append(name)
        used += size
    if some:
        yield some

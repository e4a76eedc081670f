"""From recorded inputs to the integers of one part: its layers' inputs, then bits, then weights."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Context, Part
from ..model.quantized import Activations, Layer, Quantized
from ..runtime.progress import Progress
from .blocks import run_order
from .budget import PROTECTED, Pin, average_bits, choose
from .calibrate import Recorded
from .observe import Seen, input_codes, observe, predicted_db
from .ranges import BITS, output_ranges
from .scheme import Scheme
from .sensitivity import Sensitivity, sensitivity
from .simulate import quantizable
from .smooth import shared_inputs, smoothing, splits
from .table import bits_of
from .weights import nearest, smoothed

__all__ = ["Inputs", "even_bits", "mixed_bits", "protected", "round_inputs", "round_weights", "weight_pins"]

Array = NDArray[Any]
Feeds = Mapping[str, Array]

ROWS = 256
"""Of a layer's input kept to try smoothing on."""

LEAST_GAIN_DB = {True: 3.0, False: 1.0}
"""Of a layer's output, for which its input is smoothed, at inputs of 8 bits and of fewer. At 8 bits only convolutions
are: linear layers that gain on the inputs recorded lose on others (results/calibration.json)."""

OPTIONS = ("w8", "w5", "w4", "w3")
"""That mixed precision chooses from. Each costs a forward a layer, or a search for its grid."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """How the inputs of layers are rounded; empty where they are not."""

    codes: Mapping[str, Activations] = field(default_factory=dict)
    outputs: Mapping[str, Activations] = field(default_factory=dict)
    """How their results are rounded, where they are."""
    smooth: Mapping[str, Array] = field(default_factory=dict)
    weakest: tuple[str, ...] = ()
    """Layers by the noise of their rounded inputs, the worst first."""


def of_time(name: str) -> bool:
    """Layers that see nothing but the time: few numbers, all of them decisive (QuEST, section 4.2)."""
    return "time_emb" in name or "class_emb" in name


def protected(part: Part, batch: Feeds) -> set[str]:
    """The first and the last layer keep 8 bits (Q-Diffusion, section 4.1), as do tables and what sees the time."""
    modules = quantizable(part)
    found = {name for name in modules if of_time(name) or type(modules[name]).__name__ == "Embedding"}
    rest = [name for name in run_order(part, batch, list(modules)) if name not in found]
    return found | set(rest[:1]) | set(rest[-1:])


def even_bits(names: Sequence[str], scheme: Scheme, high: Collection[str]) -> dict[str, int]:
    """The scheme's bits for all layers but those that keep 8."""
    return {name: 8 if name in high else int(scheme.weights) for name in names}


def round_inputs(
    part: Part,
    names: Sequence[str],
    batches: Sequence[Feeds],
    steps: Sequence[int],
    scheme: Scheme,
    high: Collection[str],
    *,
    smooth: bool,
) -> Generator[Progress, None, Inputs]:
    """Codes for the inputs of every layer but those in `high`.

    These stay in floating point: the first and the last convolution cost next to nothing, and the rounding of their
    inputs is a third of all the noise (benchmarks/results/calibration.json: 2.1 dB).
    """
    assert scheme.inputs is not None
    if scheme.inputs == BITS:
        return (yield from _of_16_bits(part, names, batches))
    fed = [name for name in names if name not in high]
    seen = yield from observe(part, batches, fed, steps, rows=ROWS if smooth else 0)
    found: dict[str, Array] = {}
    if smooth:
        found = yield from _smoothed(part, seen, batches[0], scheme)
        if found:
            again = yield from observe(part, batches, list(found), steps, smooth=found)
            seen = {**seen, **again}
    codes = {name: input_codes(one, scheme.inputs) for name, one in seen.items()}
    noise = sorted(codes, key=lambda name: predicted_db(seen[name], codes[name]))
    return Inputs(codes, smooth=found, weakest=tuple(noise))


def _of_16_bits(
    part: Part, names: Sequence[str], batches: Sequence[Feeds]
) -> Generator[Progress, None, Inputs]:
    """Inputs and outputs of every layer but tables, whose rows need no rounding. Nothing of it harms: no layer is left
    out, and there is no order of harm.
    """
    modules = quantizable(part)
    fed = [name for name in names if type(modules[name]).__name__ != "Embedding"]
    seen = yield from output_ranges(part, batches, fed)
    codes = {name: one.codes() for name, one in seen.items()}
    return Inputs({n: both[0] for n, both in codes.items()}, {n: both[1] for n, both in codes.items()})


def _smoothed(
    part: Part, seen: Mapping[str, Seen], batch: Feeds, scheme: Scheme
) -> Generator[Progress, None, dict[str, Array]]:
    """Layer -> what its input is divided by, where that earns its multiplication; the same for all that share one."""
    assert scheme.inputs is not None
    modules, halves = quantizable(part), splits(part, batch)
    together = {names[0]: names for names in shared_inputs(part, batch)}
    later = {name for names in together.values() for name in names[1:]}
    found: dict[str, Array] = {}
    for number, name in enumerate(seen):
        if name in later or (scheme.inputs >= 8 and type(modules[name]).__name__ == "Linear"):
            continue
        yield Progress("smooth", number / len(seen), f"{part.name}, layer {number + 1} of {len(seen)}")
        names = [each for each in together.get(name, (name,)) if each in seen]
        weight = np.concatenate([modules[each].weight.detach().numpy() for each in names])
        divisor = smoothing(
            seen[name],
            weight,
            bits=int(scheme.weights),
            input_bits=scheme.inputs,
            halves=halves.get(name, ()),
            least_gain_db=LEAST_GAIN_DB[scheme.inputs >= 8],
        )
        if divisor is not None:
            found |= dict.fromkeys(names, divisor)
    return found


def mixed_bits(
    part: Part,
    names: Sequence[str],
    scheme: Scheme,
    recorded: Recorded,
    inputs: Inputs,
    ctx: Context,
    *,
    group: int,
    guidance: float,
) -> Generator[Progress, None, tuple[dict[str, int], tuple[str, ...]]]:
    """Bits for every layer so that they are scheme.weights on average, scales included, and the error is least; and the
    layers that make most of what error is left, the worst first.

    Raises BadInput where the layers that are protected or kept leave too little, saying how much there must be.
    """
    table = yield from sensitivity(
        part,
        recorded.batches(part.name),
        recorded.steps(part.name),
        {},
        Sensitivity(options=OPTIONS, group=group, symmetric=False, multiplier=True),
        ctx.store,
        plan=ctx.plan if "timestep" in recorded.batches(part.name)[0] else None,
        guidance=guidance,
        smooth=inputs.smooth,
    )
    fixed = {name: "float" for name in table.layers if name not in names}
    chosen = choose(table, average_bits(table, scheme.weights), OPTIONS, pins=weight_pins(), fixed=fixed)
    mine = {name: option for name, option in chosen.items() if name in names}
    worst = sorted(mine, key=lambda name: -table.error(name, mine[name]))
    return {name: bits_of(option)[0] or 8 for name, option in mine.items()}, tuple(worst)


def weight_pins() -> list[Pin]:
    """What is protected where weights alone are chosen."""
    return [replace(pin, inputs=0) for pin in PROTECTED if pin.weights]


def round_weights(
    part: Part, bits: Mapping[str, int], inputs: Inputs, *, group: int
) -> Generator[Progress, None, Quantized]:
    """Every layer of `bits` as the nearest integers.

    Below 8 bits a group has a zero point and a whole multiplier of the row's scale: nearer than groups with scales of
    their own, in fewer bits (benchmarks/results/rounding.json), and 8-bit kernels can take it.
    """
    modules = quantizable(part)
    layers: dict[str, Layer] = {}
    for number, (name, count) in enumerate(bits.items()):
        yield Progress("round", number / len(bits), f"{part.name}, layer {number + 1} of {len(bits)}")
        smooth = inputs.smooth.get(name)
        weights = nearest(
            smoothed(modules[name].weight.detach().numpy(), smooth),
            count,
            group=0 if count == 8 else group,
            symmetric=count == 8,
            multiplier=True,
            name=f"{part.name}.{name}",
        )
        layers[name] = Layer(weights, inputs.codes.get(name), smooth, output=inputs.outputs.get(name))
    return Quantized(layers)

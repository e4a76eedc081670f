"""What a bundle will be on its device, before any of it is made: size, memory and time of every part and of a picture.

From the work of each network (work.py) and the rates of the target's profile (targets/profile.py). No weight is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..model.model import Model, Part
from ..quant.compose import of_time
from ..quant.quantize import Quantize
from ..quant.scheme import Scheme, parse_scheme
from ..runtime.plan import Plan
from ..targets import Target
from ..targets.profile import Demand
from .passes import configured
from .work import Layer, Work

__all__ = ["Forecast", "PartForecast", "demand_of", "forecast", "scheme_of"]

SIDE_BYTES = 256 << 10
"""Manifest, tokenizer and licences of a bundle: emoji-64's take 195 KiB."""

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


@dataclass(frozen=True)
class PartForecast:
    """One part in a bundle."""

    size_bytes: int
    """On disk: its graph with its weights."""
    memory_bytes: int
    """Once it has run, without the process it runs in."""
    call_s: float
    """One call as the default plan makes it, with what the runtime does for it."""
    calls: int
    """Of them in a picture."""
    precision: str
    """What its layers compute in; int8 where their inputs are integers."""
    shares: Mapping[str, float]
    """Class of work -> its share of the time."""
    demand: Demand
    """Of one sample."""


@dataclass(frozen=True)
class Forecast:
    """A bundle on its device."""

    parts: Mapping[str, PartForecast]
    size_bytes: int
    memory_bytes: int
    """Peak of a process that has drawn a picture, every part loaded."""
    low_memory_bytes: int
    """The same with every part closed after its stage."""
    picture_s: float
    steps: int
    timed: bool
    """Whether the target's profile has rates: otherwise the times mean nothing."""
    not_counted: tuple[str, ...] = ()
    """Passes of the recipe that change the networks and are not counted."""

    def to_json(self) -> dict[str, Any]:
        """Bytes, and seconds where they mean something."""
        data = dataclasses.asdict(self)
        for name, part in data["parts"].items():
            part["demand"] = self.parts[name].demand.to_json()
            part["shares"] = {k: round(v, 3) for k, v in part["shares"].items()}
            if not self.timed:
                del part["call_s"], part["shares"]
        if not self.timed:
            del data["picture_s"]
        return data


COUNTED = ("split_upsampling", "quantize")
"""Passes whose effect on size and work is part of a forecast."""


def scheme_of(name: str, model: Model, target: Target) -> tuple[Scheme | None, tuple[str, ...]]:
    """How the recipe quantizes a part, and the layers it keeps in floating point."""
    found = [each for kind, each in configured(target) if kind == "quantize"]
    if not found:
        return None, ()
    how = found[-1]
    assert isinstance(how, Quantize)
    denoisers = (model.denoiser, "small")
    text = how.scheme if name in denoisers else how.decoder if name.startswith("vae_") else how.text
    return (parse_scheme(text) if text else None), how.keep


def forecast(model: Model, works: Mapping[str, Work], target: Target, plan: Plan) -> Forecast:
    """What the model becomes by the target's recipe.

    works  part -> its work (work.count)
    plan   what a picture is drawn by
    """
    profile = target.profile
    calls = _calls(model, plan, fixed=not target.limits.dynamic_shapes)
    parts: dict[str, PartForecast] = {}
    for part in model:
        scheme, keep = scheme_of(part.name, model, target)
        demand, size = demand_of(part, works[part.name], target, scheme, keep)
        precision = "int8" if scheme is not None and scheme.inputs is not None else target.recipe.precision
        batch, count = calls[part.name]
        mine = demand.at(batch)
        parts[part.name] = PartForecast(
            size,
            round(profile.memory(mine, precision)),
            profile.seconds(mine, precision) + profile.between_us * 1e-6 * bool(profile.rates),
            count,
            precision,
            profile.shares(mine, precision),
            demand,
        )
    base = profile.base_mib * 2**20
    used = [part.memory_bytes for part in parts.values() if part.calls]
    loading = max((part.demand.parsed for part in parts.values() if part.calls), default=0.0)
    unseen = tuple(name for name, _ in configured(target) if name not in COUNTED)
    return Forecast(
        parts,
        sum(part.size_bytes for part in parts.values()) + SIDE_BYTES,
        round(base + loading + sum(used)),  # what loading a part frees, the next ones use again
        round(base + loading + max(used, default=0)),
        sum(part.calls * part.call_s for part in parts.values()),
        plan.steps,
        bool(profile.rates),
        unseen,
    )


def _calls(model: Model, plan: Plan, *, fixed: bool) -> dict[str, tuple[int, int]]:
    """Part -> samples in a call, and calls for one picture."""
    guided = model.guidance.kind != "none" and model.guidance.scale != 1.0
    found = {part.name: (1, 1) for part in model}
    found[model.denoiser] = (1, 0)
    if "small" in found:
        found["small"] = (1, 0)
    if "vae_encoder" in found:  # only for pictures that start from one
        found["vae_encoder"] = (1, 0)
    if guided and "text_encoder" in found:  # the prompt, and the empty one
        found["text_encoder"] = (1, 2)
    for call in plan.calls:
        name = model.denoiser if call.graph == "denoiser" else call.graph
        both = 2 if guided and call.guided else 1
        batch, count = found[name]
        # a graph of one sample a call runs twice
        found[name] = (1, count + both) if fixed else (max(batch, both), count + 1)
    return found


def demand_of(
    part: Part, work: Work, target: Target, scheme: Scheme | None, keep: tuple[str, ...] = ()
) -> tuple[Demand, int]:
    """What a call of one sample asks for, and the bytes of the part on disk.

    scheme  None: nothing is quantized
    keep    patterns of layers left in floating point, as the pass has them
    """
    profile = target.profile
    computed, stored = WIDTH[target.recipe.precision], float(WIDTH[target.recipe.weights])
    if scheme is None and profile.stored_bits:
        stored = profile.stored_bits / 8
    integers = scheme is not None and scheme.inputs is not None
    high = _protected(work)
    amounts = dict.fromkeys(("convolution", "linear", "gathered", "spilled", "weights"), 0.0)
    copied = 0.0
    disk, held = float(stored * work.other_weights), float(stored * work.other_weights)
    for layer in work.layers:
        if layer.kind != "table":
            amounts[layer.kind] += layer.operations
        if scheme is None or any(fnmatchcase(f"{part.name}.{layer.name}", pattern) for pattern in keep):
            disk, held = disk + stored * layer.weights, held + stored * layer.weights
            amounts["weights"] += computed * layer.weights * (layer.kind != "table")
            continue
        bits = 8.0 if layer.name in high else scheme.weights
        disk += _stored(layer, bits)
        unpacked = computed if profile.unpacks else max(bits, 4) / 8
        inside = integers and layer.name not in high
        each = 1.0 if inside or layer.kind == "table" else unpacked
        held += each * layer.weights
        amounts["weights"] += each * layer.weights * (layer.kind != "table")
        if inside and profile.gathers and layer.taps > 1:
            each = layer.outputs / layer.calls / layer.rows * layer.weights / layer.rows
            amounts["spilled" if each > profile.cache_mib * 2**20 else "gathered"] += each * layer.calls
            copied = max(copied, each)
    if amounts["weights"] <= profile.cache_mib * 2**20:
        amounts["cached"] = amounts.pop("weights")
    size = round(disk + profile.node_bytes * work.operators)
    demand = Demand(
        **amounts,
        attention=work.attention,
        moved=float(computed * work.moved),
        operators=float(work.operators),
        alive=work.peak * computed / 4 + copied,
        held=held,
        parsed=size if 4 * work.weights <= profile.inline_mib * 2**20 else 0,
    )
    return demand, size


def _protected(work: Work) -> set[str]:
    """Layers that keep 8 bits and floating inputs, as quant.compose.protected finds them in a network that runs."""
    found = {layer.name for layer in work.layers if layer.kind == "table" or of_time(layer.name)}
    rest = [layer.name for layer in work.layers if layer.name not in found]
    return found | set(rest[:1]) | set(rest[-1:])


def _stored(layer: Layer, bits: float) -> float:
    """Bytes of a layer's codes with what belongs to them: a scale a row, and below 8 bits a zero and a multiplier for
    each group of 64.
    """
    if bits >= 8:
        return layer.weights + 4.0 * layer.rows
    return layer.weights * (bits + (bits + 8) / 64) / 8 + 4.0 * layer.rows

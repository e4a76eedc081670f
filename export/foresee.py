"""Before any heavy work: what the bundle will be on its device, whether it fits, and which recipe would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..model.families import with_image_encoder
from ..model.libraries import torch
from ..model.load import sketch
from ..model.model import Model
from ..model.pairs import with_small
from ..prune.upsampling import SplitUpsampling
from ..runtime.errors import BadInput
from ..runtime.plan import Plan
from ..targets import Target
from . import parts
from .passes import configured, steps_of
from .plans import plans_of, traced_sampler
from .predict import Forecast, forecast
from .preflight import gib
from .work import count

__all__ = ["Foreseen", "check_fits", "foresee", "misfits", "planned", "sketched"]


@dataclass(frozen=True)
class Foreseen:
    """What a run would leave, beside what it would do; it can be drawn like a Progress."""

    forecast: Forecast
    others: Mapping[str, Forecast]
    """Quantization scheme -> the same with it, for schemes the recipe does not have already."""
    target: Target
    stage: str = "bundle"
    fraction: float | None = None

    @property
    def note(self) -> str:
        found = self.forecast
        took = f", a picture in {duration(found.picture_s)}" if found.timed else ""
        return f"{gib(found.size_bytes)} on disk, {gib(found.memory_bytes)} in memory{took} ({found.steps} steps)"

    @property
    def wrong(self) -> list[str]:
        """What does not fit, and what would; empty where all does."""
        return misfits(self.forecast, self.target)

    @property
    def remedy(self) -> str:
        """The schemes that fit, or how far the smallest is from fitting."""
        fitting = [name for name, other in self.others.items() if not misfits(other, self.target)]
        if fitting:
            return "; ".join(
                f"--quantize {name} fits: {_room(self.others[name], self.target)}" for name in fitting
            )
        if not self.others:
            return "take a smaller model"
        name = min(self.others, key=lambda each: self.others[each].memory_bytes)
        return f"take a smaller model: --quantize {name} does not fit either, {_room(self.others[name], self.target)}"


def sketched(
    source: str | Path | Model,
    small: str | Path | Model | None = None,
    share: float | None = None,
    *,
    allow_download: bool = False,
    config: Path | None = None,
    image_input: bool = False,
) -> Model:
    """What `export_bundle` exports for these arguments, before any weight is read. Raises what loading it raises."""

    def drawn(one: str | Path | Model) -> Model:
        return one if isinstance(one, Model) else sketch(one, allow_download=allow_download, config=config)

    model = drawn(source)
    if image_input:
        model = with_image_encoder(model)
    return model if small is None else with_small(model, drawn(small), share)


def planned(
    model: Model, target: Target, sampler: str = "model", steps: int | None = None, times: str | None = None
) -> tuple[Model, Plan]:
    """The model after the passes of the recipe that change its work and need no weights, and its default plan."""
    if times is not None:
        model = replace(model, grid=replace(model.grid, spacing=times))
        sampler = traced_sampler(model) if sampler == "model" else sampler
    if any(name == "split_upsampling" for name, _ in configured(target)):
        model = _split(model)
    if not target.limits.dynamic_shapes:
        model = parts.fixed(model)
    return model, plans_of(model, sampler, steps_of(model, target, steps))["default"]


def _split(model: Model) -> Model:
    device = next(
        model.parts[model.denoiser].module.parameters()
    ).device  # a sketch has no memory to copy from
    work = SplitUpsampling()(model, None)  # type: ignore[arg-type]  # it asks nothing of its context
    with torch().device(device):
        while True:
            try:
                next(work)
            except StopIteration as stop:
                split: Model = stop.value
                return split


def foresee(model: Model, plan: Plan, target: Target) -> Foreseen | None:
    """What the model becomes on the target, by its recipe and by the other schemes the target's profile names.

    None for a network that looks at the values of its tensors, whose work cannot be counted without computing it.
    """
    try:
        works = {part.name: count(part) for part in model}
    except Exception:  # whatever a network raises that is given tensors without values
        return None
    asked = target.recipe.options.get("quantize", {}).get("scheme", "w8a8")
    has = "quantize" in target.recipe.passes
    others = {
        scheme: forecast(model, works, target.with_pass("quantize", scheme=scheme), plan)
        for scheme in target.profile.schemes
        if not (has and scheme == asked)
    }
    return Foreseen(forecast(model, works, target, plan), others, target)


def misfits(found: Forecast, target: Target) -> list[str]:
    """What of a bundle the device cannot hold, a sentence each."""
    limits = target.limits
    wrong = [
        f"{name} does not fit: {gib(part.size_bytes)} of {gib(limits.part_mib << 20)} a part"
        for name, part in found.parts.items()
        if part.size_bytes > limits.part_mib << 20
    ]
    if found.low_memory_bytes > limits.peak_memory_mib << 20:
        room = _room(found, target)
        wrong.append(f"the memory does not fit: {room}, with parts loaded one at a time")
    return wrong


def check_fits(foreseen: Foreseen) -> None:
    """Raises BadInput where a part, or what a picture takes, cannot be held by the device."""
    wrong, target = foreseen.wrong, foreseen.target
    if wrong:
        limits = f"{gib(target.limits.part_mib << 20)} a part, {gib(target.limits.peak_memory_mib << 20)} in memory"
        raise BadInput(
            "; ".join(wrong), expected=f"at most {limits}, the limits of {target.id}", fix=foreseen.remedy
        )


def _room(found: Forecast, target: Target) -> str:
    return f"{gib(found.low_memory_bytes)} of {gib(target.limits.peak_memory_mib << 20)}"


def duration(seconds: float) -> str:
    """Two digits and a unit."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s")):
        if seconds < limit:
            return f"{float(f'{seconds * factor:.2g}'):g} {unit}"
    raise AssertionError(seconds)

"""Lower and check one part, in this process or, where memory matters, in processes of its own."""

from __future__ import annotations

import pickle
import platform
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..model.libraries import torch
from ..model.model import Model, Part
from ..model.quantized import Quantized
from ..model.trajectories import run_part
from ..quant.simulate import weights_of
from ..runtime.backends import Opener, runs_in
from ..runtime.manifest import Manifest, PartSpec
from ..targets import Target
from . import child, gate, onnx
from .formats import Here, format_of
from .plans import plans_of
from .preflight import LARGE_BYTES

__all__ = ["Lowered", "check", "check_pipeline", "fixed", "floors", "here", "lower"]

GATE_STEPS = 2
"""Steps the gate draws with where one forward takes seconds: two, so that a step feeds another."""


@dataclass(frozen=True)
class Lowered:
    spec: PartSpec
    seconds: float
    peak_rss_bytes: int
    """Of the process that lowered it."""
    separate: bool
    """Whether that was a process of its own."""


def fixed(model: Model) -> Model:
    """The model at its default size and one sample a call, for devices that take no free sizes."""
    sample = model.sample
    parts = {}
    for part in model:
        sizes = part.example.default_sizes() | {
            "batch": 1,  # a guided call runs twice: it is the one batch that serves every call
            "out_height": sample.height,
            "out_width": sample.width,
        }
        ends = (
            tuple(
                replace(
                    spec, shape=tuple(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape)
                )
                for spec in specs
            )
            for specs in (part.inputs, part.outputs)
        )
        inputs, outputs = ends
        example = replace(part.example, sizes={axis: (size,) for axis, size in sizes.items()})
        parts[part.name] = replace(
            part, inputs=inputs, outputs=outputs, example=example, quantized=_one_sample(part)
        )
    return replace(model, parts=parts, sample=replace(sample, fixed=True))


def _one_sample(part: Part) -> Quantized | None:
    """What is quantized of the part, compared on the first sample of each of its cases."""
    if part.quantized is None:
        return None
    batched = {spec.name for spec in part.inputs if spec.shape[:1] == ("batch",)}
    cases = {
        label: {name: array[:1] if name in batched else array for name, array in feeds.items()}
        for label, feeds in part.quantized.cases.items()
    }
    return replace(part.quantized, cases=cases)


def here(spec: PartSpec, target: Target) -> Here:
    """How this host runs a lowered part: on such a device as the target, or by the stand-in of its format."""
    precision = runs_in(spec)
    if precision is None:
        return format_of(spec.engine).stand_in(spec, target)
    same = target.device.machine in ("any", platform.machine())
    return Here(spec, precision, "device" if same else "converted")


def floors(part: Part, spec: PartSpec, computed: str) -> str:
    """Which of the target's [quality] tables judges a part: of its integers, or of the precision computed in."""
    if part.quantized is not None:
        return part.quantized.floors
    bits = spec.quantization.get("bits_per_weight")
    return computed if bits is None else "int8" if bits >= 8 else "int4"


def lower(
    part: Part, folder: Path, target: Target, work: Path, baseline: Path | None, *, optimize: bool = True
) -> Lowered:
    """Write the part's graph into `folder`, and the un-optimized one into `baseline` where that is wanted.

    A large part is stored in `work`, mapped by a child that lowers it, and from then on mapped here as well, so that
    the machine holds its weights once.
    """
    began = time.perf_counter()
    if part.weight_bytes() > LARGE_BYTES and part.portable:
        stored = _store(part, work / f"{part.name}.pt")
        done = child.call(
            _lower_stored, stored, replace(part, module=None), folder, baseline, target, optimize, work=work
        )
        return Lowered(done.value, time.perf_counter() - began, done.peak_rss_bytes, True)
    spec = _lower_here(part, folder, baseline, target, optimize)
    return Lowered(spec, time.perf_counter() - began, child.peak_rss_bytes(), False)


def _lower_stored(
    stored: Path, part: Part, folder: Path, baseline: Path | None, target: Target, optimize: bool
) -> PartSpec:
    return _lower_here(replace(part, module=_load(stored)), folder, baseline, target, optimize)


def _lower_here(part: Part, folder: Path, baseline: Path | None, target: Target, optimize: bool) -> PartSpec:
    spec = replace(_write(part, folder, baseline, target, optimize), margin=part.margin)
    if part.quantized is None or not optimize:
        return spec
    size = sum(file.stat().st_size for file in folder.iterdir())
    said = part.quantized.summary(weights_of(part))
    return replace(spec, quantization=said | {"size_of_float32": round(size / part.weight_bytes(), 4)})


def _write(part: Part, folder: Path, baseline: Path | None, target: Target, optimize: bool) -> PartSpec:
    traced = onnx.trace(part)
    if baseline is not None:
        onnx.write_plain(traced, baseline)
    if not optimize:
        return onnx.write_plain(traced, folder)
    return format_of(target.backend.engine).lower(traced, folder, target)


def check(part: Part, here: Here, graph: Path, work: Path) -> tuple[gate.PartQuality, int | None]:
    """Torch here against the engine: in this process for a small part, in one of its own for a large or dear one.

    The second value is the peak resident memory of that process, in bytes.
    """
    dear = part.work() > gate.DEAR
    tried = gate.cases(part, few=dear)
    feeds = list(tried.values())
    if dear or part.weight_bytes() > LARGE_BYTES:  # its activations can be larger than its weights
        done = child.call(gate.run_graph, graph, here.spec, feeds, here.opener, work=work)
        got, peak = done.value, done.peak_rss_bytes
    else:
        got, peak = gate.run_graph(graph, here.spec, feeds, here.opener), None
    wanted = [run_part(part, case) for case in feeds]
    return gate.compare(part.name, list(tried), wanted, got), peak


def check_pipeline(
    model: Model,
    manifest: Manifest,
    folder: Path,
    sampler: str,
    steps: int,
    target: Target,
    precisions: Collection[str],
    work: Path,
    openers: Mapping[str, Opener] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole pipeline against the original with equal seeds: what was measured, and the golden latent.

    Against diffusers where the plan is that of the model's own scheduler and no pass put other networks in, otherwise
    against the torch modules run by the same plan. A dear model draws one image in few steps: GATE_STEPS.
    Raises GateFailed.

    manifest    with its parts as this host runs them
    precisions  what it computes them in
    openers     part -> what opens its graph here, where that is not the engine itself
    """
    large = any(part.weight_bytes() > LARGE_BYTES for part in model)
    dear = any(part.work() > gate.DEAR for part in model)
    count = 1 if dear else 2
    shown = manifest
    if dear and steps > GATE_STEPS:
        short = plans_of(model, sampler, GATE_STEPS)["default"]
        shown, steps = replace(manifest, plans={"default": short.to_json()}), GATE_STEPS
    if large:
        images, golden = child.call(gate.draw, folder, shown, count, openers, work=work).value
    else:
        images, golden = gate.draw(folder, shown, count, openers)
    by_diffusers = sampler == "model" and model.original is not None and _as_loaded(model)
    wanted = (
        gate.draw_by_diffusers(model, shown, steps, count)
        if by_diffusers
        else gate.draw_by_torch(model, folder, shown, count)
    )
    psnr = gate.psnr_db(wanted, images)
    name = shown.plans["default"]["sampler"]
    gate.judge_pipeline(psnr, target, f"{name}, {steps} steps", precisions)
    measured = {
        "psnr_db": round(psnr, 1),
        "sampler": name,
        "steps": steps,
        "images": len(images),
        "size": list(images.shape[1:3]),
        "seeds": [gate.SEED + i for i in range(len(images))],
        "guidance_scale": manifest.guidance.scale,
        "against": f"diffusers {type(model.original).__name__}"
        if by_diffusers
        else "the torch modules, same plan",
    }
    return measured, golden


def _as_loaded(model: Model) -> bool:
    """Whether the model's networks are those of the pipeline it came from."""
    components = [each for each in model.original.components.values() if hasattr(each, "parameters")]
    theirs = {id(weight) for component in components for weight in component.parameters()}
    return all(id(weight) in theirs for part in model for weight in part.module.parameters())


def _store(part: Part, file: Path) -> Path:
    """Save the module and put its tensors onto the saved file, which frees the memory they had."""
    th = torch()
    file.parent.mkdir(parents=True, exist_ok=True)
    th.save(part.module, file, pickle_module=pickle)
    mapped = dict(_load(file).named_parameters())
    for name, tensor in part.module.named_parameters():
        tensor.data = mapped[name].data
    return file


def _load(file: Path) -> Any:
    # our own file of a moment ago: a module is pickled code by reference, which weights_only rightly refuses
    return torch().load(file, mmap=True, weights_only=False)

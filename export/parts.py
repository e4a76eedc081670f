"""Lower and check one part, in this process or, where memory matters, in processes of its own."""

from __future__ import annotations

import pickle
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..model.libraries import torch
from ..model.model import Model, Part
from ..runtime.manifest import Manifest, PartSpec
from ..targets import Target
from . import child, gate, onnx
from .plans import plan_of
from .preflight import LARGE_BYTES

__all__ = ["Lowered", "check", "check_pipeline", "lower"]

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


@dataclass(frozen=True)
class _Options:
    opset: int
    fuse_attention: bool
    optimize: bool


def lower(
    part: Part, folder: Path, target: Target, work: Path, baseline: Path | None, *, optimize: bool = True
) -> Lowered:
    """Write the part's graph into `folder`, and the un-optimized one into `baseline` where that is wanted.

    A large part is stored in `work`, mapped by a child that lowers it, and from then on mapped here as well, so that
    the machine holds its weights once.
    """
    began = time.perf_counter()
    options = _Options(target.backend.opset, target.recipe.fuse_attention, optimize)
    if part.weight_bytes() > LARGE_BYTES and part.portable:
        stored = _store(part, work / f"{part.name}.pt")
        done = child.call(
            _lower_stored, stored, replace(part, module=None), folder, baseline, options, work=work
        )
        return Lowered(done.value, time.perf_counter() - began, done.peak_rss_bytes, True)
    spec = _lower_here(part, folder, baseline, options)
    return Lowered(spec, time.perf_counter() - began, child.peak_rss_bytes(), False)


def _lower_stored(
    stored: Path, part: Part, folder: Path, baseline: Path | None, options: _Options
) -> PartSpec:
    return _lower_here(replace(part, module=_load(stored)), folder, baseline, options)


def _lower_here(part: Part, folder: Path, baseline: Path | None, options: _Options) -> PartSpec:
    traced = onnx.trace(part)
    if baseline is not None:
        onnx.write_plain(traced, baseline)
    if not options.optimize:
        return onnx.write_plain(traced, folder)
    return onnx.write(traced, folder, opset=options.opset, fuse_attention=options.fuse_attention)


def check(part: Part, spec: PartSpec, graph: Path, work: Path) -> tuple[gate.PartQuality, int | None]:
    """Torch here against the engine: in this process for a small part, in one of its own for a large or dear one.

    The second value is the peak resident memory of that process, in bytes.
    """
    dear = part.work() > gate.DEAR
    tried = gate.cases(part, few=dear)
    feeds = list(tried.values())
    if dear or part.weight_bytes() > LARGE_BYTES:  # its activations can be larger than its weights
        done = child.call(gate.run_graph, graph, spec, feeds, work=work)
        got, peak = done.value, done.peak_rss_bytes
    else:
        got, peak = gate.run_graph(graph, spec, feeds), None
    wanted = [gate.reference(part, case) for case in feeds]
    return gate.compare(part.name, list(tried), wanted, got), peak


def check_pipeline(
    model: Model, manifest: Manifest, folder: Path, sampler: str, steps: int, target: Target, work: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole pipeline against the original with equal seeds: what was measured, and the golden latent.

    Against diffusers where the plan is that of the model's own scheduler, otherwise against the torch modules run
    by the same plan. A dear model draws one image in few steps: GATE_STEPS. Raises GateFailed.
    """
    large = any(part.weight_bytes() > LARGE_BYTES for part in model)
    dear = any(part.work() > gate.DEAR for part in model)
    count = 1 if dear else 2
    shown = manifest
    if dear and steps > GATE_STEPS:
        short = plan_of(model, sampler, GATE_STEPS)
        shown, steps = replace(manifest, plans={"default": short.to_json()}), GATE_STEPS
    if large:
        images, golden = child.call(gate.draw, folder, shown, count, work=work).value
    else:
        images, golden = gate.draw(folder, shown, count)
    by_diffusers = sampler == "model" and model.original is not None
    wanted = (
        gate.draw_by_diffusers(model, shown, steps, count)
        if by_diffusers
        else gate.draw_by_torch(model, folder, shown, count)
    )
    psnr = gate.psnr_db(wanted, images)
    name = shown.plans["default"]["sampler"]
    gate.judge_pipeline(psnr, target, f"{name}, {steps} steps")
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

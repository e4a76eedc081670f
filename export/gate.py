"""The gate: what was exported must do what was trained, or nothing is published.

Every part is run on the engine and compared with the torch original at two batch sizes, two shapes and several times;
then whole images are compared with the original pipeline, equal seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import quiet, torch
from ..model.model import Model, Part
from ..runtime.bundle import Bundle
from ..runtime.errors import GateFailed
from ..runtime.golden import PROMPT
from ..runtime.manifest import PartSpec
from ..runtime.pipeline import Pipeline
from ..targets import Quality
from .engine import run_apart, run_here

__all__ = ["TorchSession", "check_part", "check_pipeline", "psnr_db", "relative_error"]

APART_BYTES = 1 << 30
"""Parts with more weights than this are run in a process of their own: torch's copy stays in this one."""

SEED = 20
"""Of the images the pipeline is compared on; any will do."""


@dataclass(frozen=True)
class Case:
    """One input tried: the sizes of the free axes, and the times where the part takes them."""

    sizes: Mapping[str, int]
    times: tuple[float, ...] = ()

    def __str__(self) -> str:
        text = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        return text + (f", timestep {', '.join(f'{t:g}' for t in self.times)}" if self.times else "")


def cases(part: Part) -> list[Case]:
    """Few and telling: one small, one of two batches at another shape; times at both ends and between."""
    small = {**part.example.default_sizes(), "batch": 1}
    other = {**part.example.other_sizes(), "batch": 2}
    if "timestep" not in part.example.ranges:
        return [Case(small), Case(other)]
    low, high = part.example.ranges["timestep"]
    return [Case(small, (high,)), Case(other, (low, 0.5 * (low + high))), Case(small, (0.2 * high,))]


def check_part(part: Part, spec: PartSpec, folder: Path, floor: Quality) -> dict[str, Any]:
    """Compare a graph in a bundle's folder with its part; returns what was measured, for the manifest.

    Raises GateFailed naming the part, the worst output, the case, the figure and the floor.
    """
    tried = cases(part)
    feeds = []
    for i, case in enumerate(tried):
        feed = part.example.feeds(part.inputs, case.sizes, seed=i)
        if case.times:
            feed["timestep"] = np.resize(
                np.asarray(case.times, feed["timestep"].dtype), feed["timestep"].shape
            )
        feeds.append(feed)
    session = TorchSession(part)
    expected = [session.run(feed) for feed in feeds]
    run = run_apart if part.weight_bytes() > APART_BYTES else run_here
    ran = run(folder / spec.graph, spec, feeds)
    worst, where, largest = 0.0, "", 0.0
    for case, want, got in zip(tried, expected, ran.outputs, strict=True):
        for name in want:
            if not np.isfinite(want[name]).all():
                raise GateFailed(
                    f"{part.name}: the original's {name} holds NaN or infinity at {case}",
                    fix="the model itself is broken there; check its weights",
                )
            if want[name].shape != got[name].shape:
                raise GateFailed(
                    f"{part.name}: {name} has shape {got[name].shape} at {case}",
                    expected=str(want[name].shape),
                )
            error = relative_error(got[name], want[name])
            largest = max(largest, float(np.abs(got[name] - want[name]).max()))
            if not error <= worst:  # also when it is NaN
                worst, where = error, f"{name} at {case}"
    snr = -20 * np.log10(max(worst, 1e-12)) if np.isfinite(worst) else -np.inf
    if not (worst <= floor.part_relative_error and snr >= floor.part_snr_db):
        raise GateFailed(
            f"{part.name}: {where} differs from the original by {worst:.2e} of its size ({snr:.1f} dB)",
            expected=f"at most {floor.part_relative_error:g} ({floor.part_snr_db:g} dB)",
            fix="try another opset or fuse_attention = false in a recipe, or relax [quality] in a target of your own",
        )
    return {
        "relative_error": float(f"{worst:.3g}"),
        "snr_db": round(float(snr), 1),
        "max_abs_error": float(f"{largest:.3g}"),
        "worst": where,
        "cases": [str(case) for case in tried],
    }


def check_pipeline(model: Model, bundle: Bundle, floor: Quality, *, own_scheduler: bool) -> dict[str, Any]:
    """Draw one image through the bundle and through the original with equal seeds; PSNR in dB of the pictures.

    own_scheduler  whether the bundle's default plan is the original's own scheduler: then diffusers' pipeline draws
                   the reference; otherwise the torch parts do, by the same plan
    Raises GateFailed below the floor.
    """
    heavy = sum(part.weight_bytes() for part in model) > APART_BYTES
    ours = Pipeline(bundle, low_memory=heavy)
    steps = 2 if heavy else ours.plan().steps
    subject: dict[str, Any] = {"prompt": PROMPT} if model.tokenizer else {}
    if model.classes:
        subject = {"class_labels": 0}
    common: dict[str, Any] = {**subject, "seed": SEED, "output_type": "np"}
    if own_scheduler and model.original is not None and model.task != "class-conditional":
        reference = "diffusers"
        # the plan of exactly these steps, should the default have more
        table = type(ours.plan()).from_diffusers(model.original.scheduler, steps)
        plans = {**bundle.manifest.plans, "default": table.to_json()}
        with Pipeline(_with_plans(bundle, plans), low_memory=heavy) as pipeline:
            got = pipeline(**common).images
        want = _by_diffusers(model, steps, bundle.manifest.guidance.scale)
    else:
        reference = "the torch parts, same plan"
        got = ours(num_inference_steps=steps, **common).images
        parts = {name: TorchSession(part) for name, part in model.parts.items()}
        with Pipeline(bundle, _sessions=dict(parts)) as pipeline:
            want = pipeline(num_inference_steps=steps, **common).images
    ours.close()
    psnr = psnr_db(got, want)
    if not psnr >= floor.pipeline_psnr_db:
        raise GateFailed(
            f"the image differs from the original's: PSNR {psnr:.1f} dB after {steps} steps",
            expected=f"at least {floor.pipeline_psnr_db:g} dB",
            fix="every part passed, so the plan or the scheduler configuration is at fault: try --sampler",
        )
    return {"psnr_db": round(psnr, 1), "steps": steps, "seed": SEED, "reference": reference}


def _with_plans(bundle: Bundle, plans: Mapping[str, Any]) -> Bundle:
    from dataclasses import replace

    return replace(bundle, manifest=replace(bundle.manifest, plans=plans))


def _by_diffusers(model: Model, steps: int, guidance: float) -> NDArray[Any]:
    pipe, size = model.original, model.sample
    generator = torch().Generator().manual_seed(SEED)
    common = {"num_inference_steps": steps, "generator": generator, "output_type": "np"}
    with quiet():
        pipe.set_progress_bar_config(disable=True)
        if model.task == "text-to-image":
            common |= {"height": size.height, "width": size.width, "guidance_scale": guidance}
            return np.asarray(pipe(PROMPT, **common).images)
        return np.asarray(pipe(batch_size=1, **common).images)


@dataclass(frozen=True)
class TorchSession:
    """A part that never left torch, behind the runtime's Session."""

    part: Part

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        th = torch()
        with th.no_grad():
            out = self.part.module(
                *(th.from_numpy(np.ascontiguousarray(feeds[s.name])) for s in self.part.inputs)
            )
        tensors: Iterator[Any] = iter(out if isinstance(out, tuple) else (out,))
        return {s.name: t.numpy() for s, t in zip(self.part.outputs, tensors, strict=True)}

    def close(self) -> None:
        pass


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    """RMS of the difference over RMS of what was wanted; NaN where either holds NaN."""
    want = want.astype(np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2)) / max(np.sqrt(np.mean(want**2)), 1e-30))


def psnr_db(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio of images in 0..1, capped at 200 dB for equal ones."""
    error = float(np.mean((got.astype(np.float64) - want) ** 2))
    return 200.0 if error < 1e-20 else float(-10 * np.log10(error))

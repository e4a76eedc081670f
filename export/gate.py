"""The gate: what was exported must do what was trained, or nothing is published.

Every part is run on the engine and compared with the torch original at two shapes, two batches and several times; then
whole images are compared with the original pipeline's, equal seeds. The numbers go into the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import quiet, torch
from ..model.model import Model, Part
from ..model.quantized import Quantized
from ..model.trajectories import run_part
from ..runtime.backends import Opener, Session, open_session
from ..runtime.bundle import Bundle
from ..runtime.errors import GateFailed
from ..runtime.given import example_observation
from ..runtime.golden import golden_latent
from ..runtime.manifest import FileSpec, Manifest, PartSpec
from ..runtime.pipeline import Pipeline
from ..targets import Target
from . import quality as metrics
from .quality import MAX_DB

__all__ = [
    *("MAX_DB", "SEED", "PartQuality", "cases", "compare", "draw", "draw_by_diffusers", "draw_by_torch"),
    *("judge_part", "judge_pipeline", "psnr_db", "run_graph"),
]

Array = NDArray[Any]

DEAR = 10**10
"""Part.work above which fewer cases are tried: SD-1.5's U-Net has 3.5e12 and takes 7 core-seconds a forward, its
decoder 2e11 and 16; the U-Net of emoji-64 1.2e9 and 6 milliseconds."""

PROMPTS = ("a cat", "a red apple")
"""Short: a small tokenizer may spend a token on every letter."""

SEED = 20
"""Of the first image the pipelines are compared on; any will do."""


@dataclass(frozen=True)
class PartQuality:
    """How far a graph is from its torch module, over every case tried."""

    relative_error: float
    """RMS of the error over RMS of the original's output, for the worst output of the worst case."""
    snr_db: float
    """The same in decibels."""
    max_abs_error: float
    worst: str
    """Output and case where the relative error was largest."""
    cases: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "relative_error": float(f"{self.relative_error:.3g}"),
            "snr_db": round(self.snr_db, 1),
            "max_abs_error": float(f"{self.max_abs_error:.3g}"),
            "worst": self.worst,
            "cases": list(self.cases),
        }


def cases(part: Part, *, few: bool) -> dict[str, dict[str, Array]]:
    """Named inputs to compare on: two shapes, batches of 1 and 2, every sample at a time of its own.

    Times include both ends of their range. `few` leaves out what only combines those in other ways. A quantized part
    is fed what it really sees, recorded beforehand: its ranges fit that and no noise of an arbitrary size.
    """
    if part.quantized is not None and part.quantized.cases:
        every = {name: dict(feeds) for name, feeds in part.quantized.cases.items()}
        return dict(list(every.items())[:2]) if few else every
    default, other = part.example.default_sizes(), part.example.other_sizes()
    low, high = part.example.ranges.get("timestep", (0.0, 0.0))
    tried = [(default | {"batch": 1}, (high,)), (other | {"batch": 2}, (low, 0.3 * low + 0.7 * high))]
    if not few:
        tried += [
            (default | {"batch": 3}, (0.9 * high, low, 0.5 * high)),
            (other | {"batch": 1}, (0.1 * high,)),
        ]
    found = {}
    for number, (sizes, times) in enumerate(tried):
        feeds = part.example.feeds(part.inputs, sizes, seed=number)
        name = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        if "timestep" in feeds:
            shape = feeds["timestep"].shape  # a graph of fixed sizes takes one time, whatever the batch here
            times = times[: math.prod(shape)]
            feeds["timestep"] = np.asarray(np.round(times), feeds["timestep"].dtype).reshape(shape)
            name += f", timestep {', '.join(f'{t:.0f}' for t in times)}"
        found[name] = feeds
    return found


def run_graph(
    graph: Path, spec: PartSpec, feeds: Sequence[Mapping[str, Array]], opener: Opener = open_session
) -> list[dict[str, Array]]:
    """The engine's outputs, case by case. Plain data in and out: it can run in a process of its own."""
    session = opener(graph, spec)
    try:
        return [session.run(case) for case in feeds]
    finally:
        session.close()


def compare(
    part: str,
    names: Sequence[str],
    wanted: Sequence[Mapping[str, Array]],
    got: Sequence[Mapping[str, Array]],
) -> PartQuality:
    """The worst of all outputs and cases.

    Raises GateFailed for what has no number: NaN or infinity in the original or in the export, another shape.
    """
    relative, absolute, worst = -1.0, 0.0, ""
    for case, originals, exports in zip(names, wanted, got, strict=True):
        for output, right in originals.items():
            if not np.isfinite(right).all():
                raise GateFailed(
                    f"{part}: the original's {output} holds NaN or infinity at {case}",
                    fix="the model itself is broken there; look at its weights",
                )
            bad = int(np.count_nonzero(~np.isfinite(exports[output])))
            if bad or exports[output].shape != right.shape:
                raise GateFailed(
                    f"{part}: {output} of shape {exports[output].shape} with {bad} NaN or infinite values at {case}",
                    expected=f"finite values of shape {right.shape}",
                    fix="export without passes to find the one that broke it, or report it with the configuration",
                )
            error, peak = relative_error(right, exports[output])
            absolute = max(absolute, peak)
            if error > relative:
                relative, worst = error, f"{output} at {case}"
    return PartQuality(relative, decibels(relative), absolute, worst, tuple(names))


def relative_error(right: Array, got: Array) -> tuple[float, float]:
    """RMS of the error over RMS of what is right, and the largest absolute error."""
    right = right.astype(np.float64)
    error = got.astype(np.float64) - right
    size, rms = math.sqrt(float(np.mean(right**2))), math.sqrt(float(np.mean(error**2)))
    return (rms / size if size > 0 else math.inf if rms > 0 else 0.0), float(np.abs(error).max())


def decibels(relative: float) -> float:
    """Signal to noise of a relative RMS error."""
    return MAX_DB if relative == 0 else max(-MAX_DB, min(MAX_DB, -20 * math.log10(relative)))


def judge_part(
    name: str,
    quality: PartQuality,
    target: Target,
    precision: str = "float32",
    quantized: Quantized | None = None,
) -> None:
    """Raises GateFailed naming the part, its worst output and case, what was measured, the floor and what to relax.

    precision  which floors: what the engine computed in here, or int8 or int4
    quantized  names the layers to relax
    """
    floor = target.quality[precision]
    if quality.relative_error > floor.part_relative_error or quality.snr_db < floor.part_snr_db:
        raise GateFailed(
            f"{name}: {quality.worst} differs from the original by {quality.relative_error:.2e} of its size "
            f"({quality.snr_db:.1f} dB, {precision})",
            expected=f"at most {floor.part_relative_error:g}, at least {floor.part_snr_db:g} dB",
            fix=(
                _relax(name, quantized)
                if quantized is not None and quantized.weakest
                else "fuse_attention = false, another precision or fewer passes in a --recipe"
            )
            + f", or relax [quality.{precision}] there or in targets/{target.id}.toml",
        )


def _relax(name: str, quantized: Quantized) -> str:
    worst = ", ".join(f'"{name}.{layer}"' for layer in quantized.weakest[:5])
    return f"leave the layers that are harmed most in floating point: keep = [{worst}] under [quantize] of a --recipe"


def psnr_db(right: Array, got: Array) -> float:
    """Peak signal to noise ratio of images in 0..1, over all of them."""
    if right.shape != got.shape or not np.isfinite(got).all():
        return -MAX_DB
    return metrics.psnr_db(right, got, peak=1.0)


def judge_pipeline(psnr: float, target: Target, plan: str, precisions: Iterable[str] = ("float32",)) -> None:
    """Raises GateFailed with the measured value and the floor, the lowest of those of the parts' `precisions`."""
    floor = min(target.quality[precision].pipeline_psnr_db for precision in precisions)
    if not psnr >= floor:
        raise GateFailed(
            f"images differ from the original's with equal seeds: {psnr:.1f} dB ({plan})",
            expected=f"at least {floor:g} dB",
            fix="every part passed, so the plan or the scheduler's configuration is at fault: try --sampler, or lower "
            f"[quality] of targets/{target.id}.toml",
        )


def draw(
    folder: Path, manifest: Manifest, count: int, openers: Mapping[str, Opener] | None = None
) -> tuple[Array, dict[str, Any]]:
    """Images of the unpublished bundle in `folder`, [n, height, width, channels] in 0..1, and its golden latent.

    openers  part -> what opens its graph here, where that is not the engine itself
    """
    bundle = _unpublished(folder, manifest)
    with Pipeline(bundle, low_memory=True, _openers=openers or {}) as pipeline:
        images = pipeline(**_arguments(manifest, count), seed=SEED, output_type="np").images
        return images, golden_latent(pipeline)


def draw_by_torch(model: Model, folder: Path, manifest: Manifest, count: int) -> Array:
    """The same images by the same plan, with the torch modules in the place of the graphs."""
    sessions: dict[str, Session] = {part.name: _TorchSession(part) for part in model}
    with Pipeline(_unpublished(folder, manifest), _sessions=sessions) as pipeline:
        return np.asarray(pipeline(**_arguments(manifest, count), seed=SEED, output_type="np").images)


def draw_by_diffusers(model: Model, manifest: Manifest, steps: int, count: int) -> Array:
    """The same images by diffusers itself: its pipeline, its scheduler, torch's generators with equal seeds."""
    th, pipeline = torch(), model.original
    arguments = _arguments(manifest, count)
    if "num_images_per_prompt" in arguments:
        arguments = {"batch_size": arguments["num_images_per_prompt"]}
    generators = [th.Generator("cpu").manual_seed(SEED + i) for i in range(count)]
    with quiet(), th.no_grad(), _no_class(pipeline, manifest.classes):
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            **arguments, generator=generators, num_inference_steps=steps, output_type="np"
        ).images
    return np.asarray(images)


@contextmanager
def _no_class(pipeline: Any, classes: int | None) -> Iterator[None]:
    """Inside, a DiTPipeline draws models of any number of classes: diffusers 0.42 always asks for label 1000 where it
    means "no class", which is right for ImageNet's alone.
    """
    if classes is None:
        yield
        return

    def mend(
        network: Any, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, named | {"class_labels": named["class_labels"].clamp(max=classes)}

    hook = pipeline.transformer.register_forward_pre_hook(mend, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _arguments(manifest: Manifest, count: int) -> dict[str, Any]:
    """What both pipelines are asked for: one image or two, at the model's own guidance."""
    guidance = {} if manifest.guidance.kind == "none" else {"guidance_scale": manifest.guidance.scale}
    if manifest.tokenizer is not None:
        return {"prompt": list(PROMPTS[:count]), **guidance}
    if manifest.classes is not None:
        return {"class_labels": [0, manifest.classes - 1][:count], **guidance}
    seen = example_observation(manifest, count)
    return {"num_images_per_prompt": count} | ({} if seen is None else {"observation": seen})


def _unpublished(folder: Path, manifest: Manifest) -> Bundle:
    """The bundle as it will be, before it has hashes."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    listed = {name: FileSpec("", file.stat().st_size) for name, file in files.items()}
    return Bundle(folder, replace(manifest, files=listed))


@dataclass(frozen=True)
class _TorchSession:
    """A part that never left torch, behind the runtime's Session."""

    part: Part

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        every = run_part(self.part, feeds)
        return {name: every[name] for name in outputs or every}

    def close(self) -> None:
        """The module belongs to the model."""

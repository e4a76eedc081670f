"""What a call asks for, checked against what its bundle can do before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .errors import BadInput, PlanError
from .grids import Grid, at_resolution
from .manifest import Manifest
from .plan import Plan, plan
from .process import process_from_json

__all__ = ["check", "check_graphs", "choose_plan", "guidance_of", "shape_of", "subjects_of"]

MAX_SIDE = 4096
"""Pixels. Past this a latent model needs tens of gigabytes; a larger number is a typing error."""

MAX_IMAGES = 64
"""Images of one call; they are denoised as one batch."""


def choose_plan(
    manifest: Manifest,
    steps: int | None,
    sampler: str | None,
    times: str | Grid | ArrayLike | None,
    name: str | None,
    *,
    height: int | None,
    width: int | None,
    strength: float | None,
) -> Plan:
    """See Pipeline.plan."""
    plans = manifest.plans
    if name is not None:
        if name not in plans:
            raise PlanError.unknown("plan", name, plans)
        if not (steps is None and sampler is None and times is None and strength is None):
            raise PlanError(
                f"plan {name!r} and steps, sampler or times beside it", expected="one or the other"
            )
        return Plan.from_json(plans[name])
    default = Plan.from_json(plans["default"]) if "default" in plans else None
    sample, grid = manifest.sample, manifest.grid
    own_size = height in (None, sample.height) and width in (None, sample.width)
    if (
        default
        and times is None
        and strength is None
        and sampler in (None, default.sampler)
        and steps in (None, default.steps)
        and (own_size or grid.dynamic is None)
    ):
        return default
    if grid.dynamic is not None:
        patch = sample.multiple // sample.factor
        grid = at_resolution(grid, math.prod(shape_of(manifest, height, width)[1:]) // patch**2)
    if steps is None:
        named = times is None or isinstance(times, str) or callable(times)
        steps = (default.steps if default else 20) if named else len(np.asarray(times)) - 1
    traced: Any = plan
    if strength is not None:
        from .editing import from_image

        traced = partial(from_image, strength=strength)
    made: Plan = traced(
        sampler or manifest.sampler,
        steps,
        process_from_json(manifest.process),
        "auto" if times is None else times,
        prediction=manifest.prediction,
        grid=grid,
    )
    if default is None or len({call.graph for call in default.calls}) == 1:
        return made
    # each of the default plan's calls speaks for the times down to the next one's
    rows = []
    for call in made.calls:
        above = [d for d in default.calls if d.t >= call.t] or default.calls[:1]
        rows.append(replace(call, graph=min(above, key=lambda d: d.t).graph))
    return replace(made, calls=tuple(rows))


def check_graphs(manifest: Manifest, table: Plan) -> None:
    """Raises PlanError for a plan that calls a denoiser the bundle has not."""
    known = manifest.graphs
    for call in table.calls:
        if call.graph not in known:
            raise PlanError(
                f"a plan that calls the graph {call.graph!r}",
                expected=" or ".join(known),
                fix="export the bundle with that denoiser too (fewstep export --stitch SMALL_MODEL)",
            )


def subjects_of(
    manifest: Manifest,
    prompt: str | Sequence[str] | None,
    labels: int | Sequence[int] | None,
    per_prompt: int,
) -> tuple[list[str] | None, list[int] | None]:
    """Prompts and class labels, one for each image. Raises BadInput for what the model does not take."""
    task, classes = manifest.task, manifest.classes
    check(type(per_prompt) is int and per_prompt >= 1, f"{per_prompt!r} images per prompt", "1 or more")
    prompts = [prompt] if isinstance(prompt, str) else None if prompt is None else list(prompt)
    if manifest.tokenizer is None:
        check(prompts is None, f"a prompt for a model of task {task}", "no prompt")
    else:
        check(bool(prompts), "no prompt", "a text, or a list of texts", "pass --prompt TEXT")
    if classes is None:
        check(labels is None, f"class labels for a model of task {task}", "no class labels")
        chosen = None
    else:
        chosen = [labels] if isinstance(labels, int) else list(labels or [])
        good = bool(chosen) and all(type(label) is int and 0 <= label < classes for label in chosen)
        check(
            good,
            f"class labels {labels!r}",
            f"whole numbers from 0 to {classes - 1}",
            "pass --class-label 0",
        )
    total = len(prompts or chosen or [0]) * per_prompt
    check(total <= MAX_IMAGES, f"{total} images in one call", f"at most {MAX_IMAGES}", "call once per batch")
    return (
        [p for p in prompts for _ in range(per_prompt)] if prompts else None,
        [c for c in chosen for _ in range(per_prompt)] if chosen else None,
    )


def guidance_of(manifest: Manifest, scale: float | None) -> float:
    """The guidance scale of a call. Raises BadInput for one that is not a number, or a model without guidance."""
    if manifest.guidance.kind == "none":
        check(scale in (None, 1, 1.0), f"guidance {scale!r} for a model without guidance", "1 or nothing")
        return 1.0
    scale = manifest.guidance.scale if scale is None else scale
    check(
        isinstance(scale, int | float) and bool(np.isfinite(scale)),
        f"guidance {scale!r}",
        "a finite number",
    )
    return float(scale)


def shape_of(manifest: Manifest, height: int | None, width: int | None) -> tuple[int, ...]:
    """[channels, h, w] of a sample for a picture of this size. Raises BadInput for a size the bundle cannot draw."""
    sample = manifest.sample
    height, width = height or sample.height, width or sample.width
    size = f"{width}x{height} pixels"
    if sample.fixed:
        only = f"{sample.width}x{sample.height}, the only size of this bundle"
        check((height, width) == (sample.height, sample.width), size, only)
    good = all(
        type(s) is int and s > 0 and s % sample.multiple == 0 and s <= MAX_SIDE for s in (height, width)
    )
    check(
        good,
        size,
        f"multiples of {sample.multiple} up to {MAX_SIDE}",
        f"try {sample.width}x{sample.height}",
    )
    return (sample.channels, height // sample.factor, width // sample.factor)


def check(good: bool, found: str, expected: str, fix: str = "") -> None:
    if not good:
        raise BadInput(found, expected=expected, fix=fix)

"""Two models of one latent space: whether they are, and a model with another's smaller denoiser beside its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..runtime.errors import BadInput
from ..runtime.two_graphs import SHARE, SMALL
from .model import Model, Small

__all__ = ["check_alike", "with_small"]


def check_alike(
    one: Model, other: Model, names: tuple[str, str] = ("student", "teacher"), fix: str = ""
) -> None:
    """Raises BadInput where the two do not turn the same noise, by the same times and conditions, into the same
    latents. Which sizes of pictures they can draw may differ.

    names  what the two are called in the error; fix: what to do
    """
    mine, theirs = _interface(one), _interface(other)
    for what, found in mine.items():
        if found != theirs[what]:
            raise BadInput(
                f"{names[0]} {one.name} and {names[1]} {other.name} differ in {what}: {found} and {theirs[what]}",
                expected=f"a {names[0]} of the same latents, noise and conditions",
                fix=fix or f"take the model that the {names[0]} was made from",
            )


def _interface(model: Model) -> dict[str, Any]:
    part = model.parts[model.denoiser]
    return {
        "task": model.task,
        "inputs": [(spec.name, spec.shape) for spec in part.inputs],
        "sample": replace(model.sample, multiple=1),
        "prediction": model.prediction,
        "process": model.process.to_json(),
        "classes": model.classes,
    }


def with_small(model: Model, small: Model, share: float | None = SHARE) -> Model:
    """The model with the denoiser of `small` as the part that plans call "small", and that in its history.

    share  of the default plan's calls that go to it; None: it draws alone, in its own few steps
    Raises BadInput for models that are not alike, or a share outside 0 to 1.
    """
    if share is not None and not 0 <= share <= 1:
        raise BadInput(
            f"a share of {share!r} for the small model", expected="0 to 1", fix="--stitch MODEL:0.4"
        )
    check_alike(small, model, ("small model", "large model"))
    part = small.parts[small.denoiser]
    record = {
        "pass": "stitch" if share is not None else "student",
        "small": small.name,
        "share": share,
        "parameters": part.parameters(),
        "license": small.license,
        "history": [dict(entry) for entry in small.history],
    }
    multiple = math.lcm(model.sample.multiple, small.sample.multiple)
    return replace(
        model,
        parts={**model.parts, SMALL: replace(part, name=SMALL)},
        small=Small(small, share),
        sample=replace(model.sample, multiple=multiple),
        history=(*model.history, record),
    )

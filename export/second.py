"""A second, smaller denoiser in a bundle: what it weighs, and which passes it goes through."""

from __future__ import annotations

from dataclasses import replace

from ..model.load import Summary
from ..runtime.errors import BadInput
from ..runtime.two_graphs import SMALL
from ..targets import Target

__all__ = ["only_lowering", "with_both"]

LOWERING = ("split_upsampling", "quantize")
"""The passes that say how a network is computed: of a recipe those alone concern a network that is finished."""
DENOISERS = ("unet", "transformer", "denoiser")


def with_both(large: Summary, small: Summary, share: float | None) -> Summary:
    """What is exported, from what is known of the two before they are loaded. Raises BadInput."""
    if share is not None and not 0 <= share <= 1:
        raise BadInput(
            f"a share of {share!r} for the small model", expected="0 to 1", fix="--stitch MODEL:0.4"
        )
    if large.task != small.task:
        raise BadInput(
            f"{small.name} is {small.task}, {large.name} is {large.task}", expected="models of one task"
        )
    name = next((name for name in DENOISERS if name in small.weights), "")
    return replace(large, weights={**large.weights, SMALL: small.weights.get(name, 0)})


def only_lowering(target: Target) -> Target:
    """The target with those passes of its recipe that a finished denoiser goes through; other parts are let be."""
    passes = tuple(name for name in target.recipe.passes if name in LOWERING)
    target = replace(target, recipe=replace(target.recipe, passes=passes))
    return target.with_pass("quantize", decoder="", text="") if "quantize" in passes else target

"""A golden latent: what this bundle drew when it was made, small enough to live in the manifest.

Export stores it under `quality["golden"]`; `fewstep verify` draws the same latent again, on whatever device
the bundle has reached, and compares. Hashes prove that the files arrived; this proves the engine there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .given import example_observation
from .manifest import Manifest

__all__ = ["TOLERANCES", "compare_golden", "golden_latent"]

PROMPT = "a red apple"
"""Short: a small tokenizer may spend a token on every letter."""
STEPS = 2
"""Two calls: the first alone would not notice a wrong time or a wrong update."""
VALUES = 64
"""Evenly spread values kept of the latent; the statistics per channel cover the rest."""
TOLERANCES = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 5e-2}
"""Relative to the latent's peak, by the precision asked for: room for another order of summation and, in half
precision, for a host that computes in float32 instead (emoji-64: 7e-3), not for a wrong kernel."""
PLAN = f"steps_{STEPS}"
"""Drawn where the bundle has it: runtimes in other languages have its plans, and no samplers to trace others."""
DIGITS = 7
"""Significant digits stored: what float32 holds."""


class Draws(Protocol):
    """The part of Pipeline used here; Protocol so that a pipeline need not import this module."""

    @property
    def manifest(self) -> Manifest: ...
    def __call__(
        self,
        prompt: str | None = None,
        *,
        class_labels: int | None = None,
        num_inference_steps: int | None = None,
        seed: int = 0,
        output_type: str = "pil",
        sampler: str | None = None,
        plan: str | None = None,
        observation: Any = None,
    ) -> Any: ...


def golden_latent(pipeline: Draws) -> dict[str, Any]:
    """Draw the latent and summarise it as JSON: how it was drawn, 64 values, mean and spread per channel."""
    manifest = pipeline.manifest
    how: dict[str, Any] = {
        "prompt": PROMPT if manifest.tokenizer else None,
        "class_label": 0 if manifest.classes else None,
        "seed": 0,
    }
    if PLAN in manifest.plans:
        how |= {"plan": PLAN, "steps": None, "sampler": None}
    else:
        how |= {"plan": None, "steps": STEPS, "sampler": manifest.sampler}
    tolerance = max(TOLERANCES[part.precision] for part in manifest.parts.values())
    return {**how, "tolerance": tolerance, **_summary(_draw(pipeline, how))}


def compare_golden(pipeline: Draws, golden: Mapping[str, Any]) -> float:
    """Draw `golden` again and return the largest difference, relative to the latent's largest value.

    Raises BundleError where `golden` is not what `golden_latent` writes, or the latent has another shape.
    """
    try:
        latent = _draw(pipeline, golden)
        if list(latent.shape) != list(golden["shape"]):
            raise BundleError(f"golden latent of shape {list(latent.shape)}", expected=f"{golden['shape']}")
        got = _summary(latent)
        peak = float(golden["peak"])
        worst = max(
            abs(a - b)
            for key in ("values", "mean", "std")
            for a, b in zip(got[key], golden[key], strict=True)
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(
            f"manifest.json: quality.golden cannot be replayed ({type(error).__name__}: {error})",
            fix="export the bundle again",
        ) from error
    return worst / peak if np.isfinite(latent).all() and peak > 0 else float("inf")


def _draw(pipeline: Draws, how: Mapping[str, Any]) -> NDArray[np.float64]:
    output = pipeline(
        how["prompt"],
        class_labels=how["class_label"],
        num_inference_steps=how["steps"],
        seed=how["seed"],
        sampler=how["sampler"],
        plan=how.get("plan"),  # bundles made before there were such plans do not say
        output_type="latent",
        observation=example_observation(pipeline.manifest, 1),
    )
    return np.asarray(output.images, dtype=np.float64)


def _summary(latent: NDArray[np.float64]) -> dict[str, Any]:
    """latent  [1, channels, ...]"""
    flat = latent.reshape(-1)
    channels = latent[0].reshape(len(latent[0]), -1)
    picked = flat[np.linspace(0, flat.size - 1, min(VALUES, flat.size)).astype(int)]
    return {
        "shape": list(latent.shape),
        "peak": _rounded(np.abs(flat).max()),
        "values": [_rounded(v) for v in picked],
        "mean": [_rounded(v) for v in channels.mean(axis=1)],
        "std": [_rounded(v) for v in channels.std(axis=1)],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS - 1}e}")

"""Calibration inputs as they lie on disk and as the passes take them: by part, a network call at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Model, Part
from ..model.trajectories import text_inputs

__all__ = ["BATCH", "Recorded", "by_part", "rows_at_once", "unscaled"]

Array = NDArray[Any]
Feeds = Mapping[str, Array]

ROWS = 2e10
"""Part.work of one forward: what a batch is cut to, so that one is a second at most and its memory small."""

BATCH = 8
"""Samples of a batch of a small model."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Inputs of every part, by name. What is held out comes from other noise and, where there is more than one, other
    prompts or labels: for the gate and for choosing between settings."""

    key: str
    """Of everything these came from, weights included: equal keys, equal inputs."""
    used: Mapping[str, Sequence[Feeds]]
    used_steps: Mapping[str, Sequence[int]]
    held: Mapping[str, Sequence[Feeds]]
    held_steps: Mapping[str, Sequence[int]]

    def batches(self, part: str) -> Sequence[Feeds]:
        """To calibrate on: named inputs of one network call of a few samples, all at one time; under guidance the
        unconditional half first, as the pipeline calls it."""
        return self.used[part]

    def steps(self, part: str) -> list[int]:
        """Row of the plan that each of `batches` belongs to; 0 for parts that run once an image."""
        return list(self.used_steps[part])

    def held_out(self, part: str) -> Sequence[Feeds]:
        """The same in form, none of it in `batches`; every call of the plan, or 8 of them evenly spread."""
        return self.held[part]

    def steps_held_out(self, part: str) -> list[int]:
        return list(self.held_steps[part])


def rows_at_once(part: Part) -> int:
    """Samples of a forward that takes a second at most: 1 of SD-1.5's U-Net, 8 of emoji-64's."""
    return max(1, min(BATCH, int(ROWS / part.work())))


def unscaled(model: Model, latent: Array) -> Array:
    """What the decoder is fed for a latent of the denoiser's scale."""
    return (latent / model.sample.scaling_factor + model.sample.shift_factor).astype(np.float32)


def by_part(
    model: Model, shards: Sequence[Mapping[str, Array]], prompts: Sequence[str]
) -> tuple[dict[str, list[Feeds]], dict[str, list[int]]]:
    """Inputs of every part from the shards of trajectories, and the plan's row of each.

    prompts  what the text encoder is fed; it is cheap, so there can be more than trajectories
    """
    inputs: dict[str, list[Feeds]] = {part.name: [] for part in model}
    steps: list[int] = []
    order = [spec.name for spec in model.parts[model.denoiser].inputs]
    for shard in shards:
        kept = sorted({int(key.split(".", 2)[1]) for key in shard if key.startswith("call.")})
        inputs[model.denoiser] += [{name: shard[f"call.{k}.{name}"] for name in order} for k in kept]
        steps += kept
        for name, key in (("vae_decoder", "latent"), ("vae_encoder", "picture")):
            if name in model.parts:
                part, arrays = model.parts[name], shard[key]
                arrays = unscaled(model, arrays) if key == "latent" else arrays
                rows = rows_at_once(part)
                inputs[name] += [
                    {part.inputs[0].name: arrays[i : i + rows]} for i in range(0, len(arrays), rows)
                ]
    if "text_encoder" in model.parts:
        fed = text_inputs(model, prompts)
        for i in range(0, len(fed), BATCH):
            some = fed[i : i + BATCH]
            inputs["text_encoder"].append({name: np.concatenate([f[name] for f in some]) for name in some[0]})
    return inputs, {name: steps if name == model.denoiser else [0] * len(fed) for name, fed in inputs.items()}

"""How wide a tiny decoder is, and how much work it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..model.libraries import torch
from ..model.model import Model
from ..runtime.errors import BadInput

__all__ = ["choose_shape", "multiplications"]

WIDTH = 64
"""TAESD's, of every stage."""
SAVING = 1 / 4
"""Of the teacher's work, at most: below that a decoder is clearly faster, whatever the engine."""
CELLS = 16
"""Latent cells a side on which work is counted; it grows with their number, for both decoders alike."""


def choose_shape(model: Model, widths: Sequence[int], blocks: Sequence[int]) -> tuple[Any, float]:
    """The TinyShape for this model, and its work over that of the decoder it replaces.

    widths, blocks  as in TinyDecoder; empty for TAESD's, or the widest of the narrower ones that saves enough
    Raises BadInput for widths that do not fit the model, or save nothing.
    """
    from .tiny_network import TinyNetwork, TinyShape

    sample, old = model.sample, model.parts["vae_decoder"]
    doublings = int(math.log2(sample.factor))
    channels, colors = old.inputs[0].shape[1], old.outputs[0].shape[1]
    assert isinstance(channels, int), "only the batch and the sides of a latent are free"
    assert isinstance(colors, int)
    if len(widths) != len(blocks):
        raise BadInput(f"{len(widths)} widths and {len(blocks)} blocks of a tiny decoder", expected="as many")
    if widths and (len(widths) > doublings + 1 or min(widths) < 1 or min(blocks) < 0):
        raise BadInput(
            f"widths {tuple(widths)} and blocks {tuple(blocks)} of a tiny decoder",
            expected=f"1 to {doublings + 1} stages of at least 1 channel, for {sample.factor} pixels a cell",
        )
    if widths:
        tried = [(tuple(widths), tuple(blocks))]
    else:
        tried = [((WIDTH,) * (doublings + 1), (3,) * doublings + (1,))]  # TAESD's
        # half as wide at each doubling, the last one by rearrangement: less than a third of TAESD's work
        tried += [
            (tuple(max(4, w >> i) for i in range(max(1, doublings))), (2,) + (1,) * max(0, doublings - 1))
            for w in (64, 48, 32, 24, 16, 8)
        ]
    least = math.inf
    limit = 1 if widths else SAVING
    before = multiplications(old.module, channels)
    for each in tried:
        shape = TinyShape(*each, sample.factor, channels, colors)
        with torch().device("meta"):
            work = multiplications(TinyNetwork(shape), channels) / before
        least = min(least, work)
        if work <= limit:
            return shape, work
    raise BadInput(
        f"a tiny decoder of widths {tried[-1][0]} takes {least:.2f} of the work of {model.name}'s own",
        expected=f"at most {limit:g}",
        fix="smaller widths, or no tiny_decoder for a VAE this small",
    )


def multiplications(module: Any, channels: int) -> float:
    """Of one forward on CELLS x CELLS latent cells, in convolutions and linear layers."""
    th, total = torch(), 0.0

    def count(layer: Any, inputs: Any, output: Any) -> None:
        nonlocal total
        per_value = layer.weight[0].numel()
        total += per_value * output.numel()

    layers = [m for m in module.modules() if isinstance(m, th.nn.Conv2d | th.nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    weight = next(module.parameters())
    try:
        with th.no_grad():
            module(th.zeros(1, channels, CELLS, CELLS, device=weight.device, dtype=weight.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return total

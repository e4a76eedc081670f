"""A denoiser that is told the guidance scale beside the time, and the plain network it is at one scale.

Meng et al. 2022, "On Distillation of Guided Diffusion Models" <arXiv:2210.03142>, in the form of LCM (Luo et al. 2023,
arXiv:2310.04378): what diffusers calls time_cond_proj_dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..runtime.errors import BadInput

__all__ = ["FEATURES", "ScaledNetwork", "baked", "scale_features"]

Tensor = Any
Module = Any

FEATURES = 256
"""Numbers that a scale is told in: the published LCMs'."""
EMBEDDINGS = ("time_embedding", "timestep_embedder")
"""What diffusers calls the two-layer network behind the time's sines, in U-Nets and in transformers."""


class ScaledNetwork(torch.nn.Module):  # type: ignore[misc]
    """The network with one more input, the last: guidance scales, [batch]. As it begins it pays no heed to them.

    Raises BadInput for a network without diffusers' time embedding.
    """

    def __init__(self, network: Module) -> None:
        super().__init__()
        found = list(_embeddings(network))
        if not found:
            raise BadInput(
                f"a {type(network).__name__} without {' or '.join(EMBEDDINGS)}",
                expected="diffusers' time embedding, through which a network is told the scale",
                fix="distill one scale: leave `scales` empty",
            )
        for parent, name in found:
            setattr(parent, name, _ScaledEmbedding(getattr(parent, name)))
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        *inner, scale = inputs
        features = scale_features(scale)
        for module in self.network.modules():
            if isinstance(module, _ScaledEmbedding):
                module.features = features
        return self.network(*inner)


def baked(told: ScaledNetwork, scale: float) -> Module:
    """The plain network that answers as `told` does at this scale.

    The scale's features c enter the time embedding before its first layer, W1 (e + P c) + b1: at a fixed scale W1 P c
    is a part of the bias.
    """
    network = copy.deepcopy(told.network)
    for parent, name in list(_embeddings(network)):
        embedding = getattr(parent, name)
        inner, first = embedding.inner, embedding.inner.linear_1
        with torch.no_grad():
            features = scale_features(torch.tensor([scale])).double()[0]
            moved = first.weight.double() @ (embedding.projection.weight.double() @ features)
            if first.bias is not None:
                moved = moved + first.bias.double()
            first.bias = torch.nn.Parameter(moved.to(first.weight.dtype), first.weight.requires_grad)
        setattr(parent, name, inner)
    return network


def scale_features(scale: Tensor) -> Tensor:
    """[batch] guidance scales as [batch, 256] sines and cosines of 1000 (scale - 1).

    Frequencies fall from 1 to 1 / 10,000, as for timesteps; the published LCMs and their pipeline in diffusers count
    scales from 0 for none.
    """
    half = FEATURES // 2
    frequency = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000.0) / (half - 1)))
    angle = 1000.0 * (scale.float() - 1).unsqueeze(1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class _ScaledEmbedding(torch.nn.Module):  # type: ignore[misc]
    """diffusers' TimestepEmbedding, with the features of the scales put on its input."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner = inner
        self.projection = torch.nn.Linear(FEATURES, inner.linear_1.in_features, bias=False)
        torch.nn.init.zeros_(self.projection.weight)
        self.features: Tensor = None

    def forward(self, sample: Tensor, condition: Tensor = None) -> Tensor:
        return self.inner(sample + self.projection(self.features), condition)


def _embeddings(network: Module) -> Iterator[tuple[Module, str]]:
    """(module, attribute) of every time embedding."""
    for parent in network.modules():
        for name in EMBEDDINGS:
            embedding = getattr(parent, name, None)
            if isinstance(embedding, _ScaledEmbedding) or hasattr(embedding, "linear_1"):
                yield parent, name

"""What of a part is quantized: one description, read by the simulation in torch and by every lowering.

A part keeps its float module, which is what the gate compares with; beside it lies a Quantized, which says for every
layer what its integers are. Nothing here computes an integer: quant/ does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Activations", "Layer", "Quantized", "Weights"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Weights:
    """Integer weights of one layer, a row for each output channel.

    w[o, i] = scale[o, g] multiplier[o, g] (codes[o, i] - zero[o, g]) with g = i // group: the entries of a row are
    numbered as torch lays them out (input channel, then kernel), and each `group` of them shares a scale.
    """

    bits: int
    """Of a code: 2 to 8."""
    codes: NDArray[np.int8]
    """[out, inner], -2^(bits - 1) to 2^(bits - 1) - 1; symmetric codes of 8 bits leave out -128."""
    scale: NDArray[np.float32]
    """[out, groups], above 0; [out, 1] where there is a multiplier."""
    shape: tuple[int, ...]
    """Of the weights in torch: Linear [out, in], Conv2d [out, in, height, width], Embedding [rows, width]."""
    zero: NDArray[np.int8] | None = None
    """[out, groups] codes that mean 0; None: 0, the symmetric grid, which is what int8 kernels take."""
    multiplier: NDArray[np.uint8] | None = None
    """[out, groups] whole numbers, at least 1: groups inside a row at one float scale a row, so that a kernel of 8 bits
    can take multiplier (codes - zero), which stays within -127 to 127."""

    @property
    def groups(self) -> int:
        """Of a row."""
        return int((self.scale if self.multiplier is None else self.multiplier).shape[1])

    @property
    def group(self) -> int:
        """Entries of a row that share a scale."""
        return int(self.codes.shape[1]) // self.groups

    def integers(self) -> NDArray[np.int16]:
        """[out, inner]: multiplier (codes - zero)."""
        whole = self.codes.astype(np.int16).reshape(len(self.codes), self.groups, -1)
        if self.zero is not None:
            whole = whole - self.zero[:, :, None]
        if self.multiplier is not None:
            whole = whole * self.multiplier[:, :, None]
        return whole.reshape(self.codes.shape)

    def floats(self) -> NDArray[np.float32]:
        """The weights that these integers mean, in torch's shape."""
        whole = self.integers().reshape(len(self.codes), self.scale.shape[1], -1)
        return (whole * self.scale[:, :, None]).astype(np.float32).reshape(self.shape)

    def stored_bits(self) -> int:
        """Of codes, scales (float32), zeros (as wide as a code) and multipliers (8) together."""
        side = 32 * self.scale.size
        side += 0 if self.zero is None else self.bits * self.zero.size
        side += 0 if self.multiplier is None else 8 * self.multiplier.size
        return self.bits * self.codes.size + side


@dataclass(frozen=True)
class Activations:
    """How a layer's input is rounded, the whole tensor at one scale: x ~ scale (clip(round(x / scale) + zero) - zero).

    Codes are 0 to 2^bits - 1 and round half to even, as QuantizeLinear does. Every lowering of up to 8 bits stores
    them in bytes: unsigned, or signed with 128 taken off.
    """

    scale: float
    zero: int
    bits: int = 8


@dataclass(frozen=True, eq=False)
class Layer:
    """One Linear, Conv or Embedding of a part, by the name of its module."""

    weights: Weights
    input: Activations | None = None
    """None: only the weights are quantized, and the layer computes in floating point."""
    smooth: NDArray[np.float32] | None = None
    """[in channels], above 0: the layer is fed x / smooth, and `weights` are those of w * smooth. None: ones.

    Two constants over the halves of a skip concatenation are the split of Q-Diffusion (Li et al. 2023,
    arXiv:2302.04304) at the price of one multiplication; a value a channel is SmoothQuant's (Xiao et al. 2022,
    arXiv:2211.10438).
    """
    bias: NDArray[np.float32] | None = None
    """[out] in place of the module's own bias, also where that has none; None: as it is."""
    output: Activations | None = None
    """How its result is rounded, for engines whose kernels give integers as well (Hexagon); None: it is not."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """All of a part. Layers that are not named stay as they are."""

    layers: Mapping[str, Layer]
    """Name of the module inside Part.module -> how it is quantized."""
    params: Mapping[str, Array] = field(default_factory=dict)
    """Name of a float parameter inside Part.module -> what replaces it, where a pass trained it."""
    drift: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    """(timesteps [k], ascending; means [k, channels]) of the output's error, which a lowering subtracts: linear
    between the timesteps, constant beyond. Only for a part with an input `timestep`."""
    cases: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    """Label -> named inputs the part really sees, none of them used for calibration: what the gate compares on."""
    weakest: tuple[str, ...] = ()
    """Layers whose rounding harms the output most, the worst first: what to relax where a floor is missed."""

    @property
    def floors(self) -> str:
        """Which floors of a target are for it: int8, or int4 where some weights or inputs have fewer than 8 bits."""
        bits = [layer.weights.bits for layer in self.layers.values()]
        bits += [layer.input.bits for layer in self.layers.values() if layer.input is not None]
        return "int8" if min(bits, default=8) >= 8 else "int4"

    def summary(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """What the manifest says of it.

        shapes  name of every weight-carrying module -> its weights' shape
        """
        left = {name: prod(shape) for name, shape in shapes.items() if name not in self.layers}
        stored = sum(layer.weights.stored_bits() for layer in self.layers.values())
        count = sum(layer.weights.codes.size for layer in self.layers.values())
        of_bits: dict[str, int] = {}
        inputs: dict[str, int] = {}
        for layer in self.layers.values():
            bits = str(layer.weights.bits)
            of_bits[bits] = of_bits.get(bits, 0) + layer.weights.codes.size
            bits = "float" if layer.input is None else str(layer.input.bits)
            inputs[bits] = inputs.get(bits, 0) + 1
        total = count + sum(left.values())
        return {
            "weights_by_bits": dict(sorted(of_bits.items())),
            "layers_by_input_bits": dict(sorted(inputs.items())),
            "bits_per_weight": round((stored + 32 * sum(left.values())) / max(total, 1), 3),
            "left_alone": dict(sorted(left.items())),
        }

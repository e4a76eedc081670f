"""The operators of mil_ops.py that take more than a line: convolution, norms, attention, slices, padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..model.libraries import torch

__all__ = [
    "Function",
    "Static",
    "attention",
    "batch_norm",
    "conv",
    "instance_norm",
    "ints",
    "layer_norm",
    "pad",
    "slice_by_index",
]

Tensor = Any
Static = Mapping[str, Any]
"""Parameter -> its constant value, as coremltools gives it; parameters that are absent are not in it."""
Function = Callable[..., Any]


def ints(value: Any) -> list[int]:
    """A static list of whole numbers."""
    return [int(item) for item in value.reshape(-1)] if hasattr(value, "reshape") else [int(i) for i in value]


def conv(static: Static) -> Function:
    functional = torch().nn.functional
    dims = len(ints(static["strides"])) if "strides" in static else None
    groups, kind = int(static.get("groups", 1)), str(static.get("pad_type", "valid"))

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        n = x.dim() - 2
        assert dims in (None, n)
        strides = ints(static["strides"]) if "strides" in static else [1] * n
        dilations = ints(static["dilations"]) if "dilations" in static else [1] * n
        pads = [(0, 0)] * n
        if kind == "custom":
            flat = ints(static["pad"])
            pads = list(zip(flat[::2], flat[1::2], strict=True))
        elif kind in ("same", "same_lower"):
            for axis in range(n):
                size, kernel = x.shape[2 + axis], (weight.shape[2 + axis] - 1) * dilations[axis] + 1
                missing = max((math.ceil(size / strides[axis]) - 1) * strides[axis] + kernel - size, 0)
                small = missing // 2
                pads[axis] = (small, missing - small) if kind == "same" else (missing - small, small)
        if all(low == high for low, high in pads):
            padding = [low for low, _ in pads]
        else:
            x = functional.pad(x, [side for pair in reversed(pads) for side in pair])
            padding = [0] * n
        conv = (functional.conv1d, functional.conv2d, functional.conv3d)[n - 1]
        return conv(x, weight, bias, strides, padding, dilations, groups)

    return run


def attention(static: Static) -> Function:
    functional = torch().nn.functional

    def run(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if attn_mask is not None and not attn_mask.is_floating_point():
            attn_mask = attn_mask.bool()
        return functional.scaled_dot_product_attention(query, key, value, attn_mask)

    return run


def layer_norm(static: Static) -> Function:
    epsilon = float(static.get("epsilon", 1e-5))
    axes = ints(static["axes"]) if "axes" in static else None

    def run(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        dims = sorted(axis % x.dim() for axis in axes) if axes is not None else list(range(x.dim()))
        if dims == list(range(x.dim() - len(dims), x.dim())):
            shape = x.shape[dims[0] :]
            return torch().nn.functional.layer_norm(x, shape, gamma, beta, epsilon)
        mean = x.mean(dims, keepdim=True)
        centred = x - mean
        normed = centred * torch().rsqrt((centred * centred).mean(dims, keepdim=True) + epsilon)
        shape = [size if axis in dims else 1 for axis, size in enumerate(x.shape)]
        if gamma is not None:
            normed = normed * gamma.reshape(shape)
        return normed if beta is None else normed + beta.reshape(shape)

    return run


def instance_norm(static: Static) -> Function:
    epsilon = float(static.get("epsilon", 1e-5))

    def run(x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        return torch().nn.functional.instance_norm(x, weight=gamma, bias=beta, eps=epsilon)

    return run


def batch_norm(static: Static) -> Function:
    epsilon = float(static.get("epsilon", 1e-5))

    def run(
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        return torch().nn.functional.batch_norm(x, mean, variance, gamma, beta, False, 0.0, epsilon)

    return run


def slice_by_index(static: Static) -> Function:
    begin, end = ints(static["begin"]), ints(static["end"])
    rank = len(begin)
    stride = ints(static["stride"]) if "stride" in static else [1] * rank

    def mask(name: str) -> list[bool]:
        return [bool(item) for item in static[name]] if name in static else [False] * rank

    from_start, to_end, single = mask("begin_mask"), mask("end_mask"), mask("squeeze_mask")

    def run(x: Tensor) -> Tensor:
        for axis in reversed(range(rank)):
            size = x.shape[axis]
            if single[axis]:
                x = x.select(axis, begin[axis])
                continue
            first = None if from_start[axis] else begin[axis]
            last = None if to_end[axis] else end[axis]
            if stride[axis] > 0:
                low, high, step = slice(first, last, stride[axis]).indices(size)
                x = x[(slice(None),) * axis + (slice(low, high, step),)]
            else:
                wanted = list(range(*slice(first, last, stride[axis]).indices(size)))
                x = x.index_select(axis, torch().tensor(wanted))
        return x

    return run


def pad(static: Static) -> Function:
    pads, mode = ints(static["pad"]), str(static.get("mode", "constant"))
    value = float(static.get("constant_val", 0.0))
    pairs = list(zip(pads[::2], pads[1::2], strict=True))
    flat = [side for pair in reversed(pairs) for side in pair]
    if mode == "constant":
        return lambda x: torch().nn.functional.pad(x, flat, value=value)
    return lambda x: torch().nn.functional.pad(x, flat, mode={"reflect": "reflect"}.get(mode, "replicate"))

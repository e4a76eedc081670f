"""The operators of Core ML's MIL in torch, as far as exported networks use them; see mil_reference.py.

Every entry of OPS says which parameters of an operator are tensors and builds, from the other ones, a function of those
tensors. Meanings are those of coremltools' operator definitions (coremltools.converters.mil.mil.ops.defs, 9.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..model.libraries import torch
from .mil_layers import (
    Function,
    Static,
    attention,
    batch_norm,
    conv,
    instance_norm,
    ints,
    layer_norm,
    pad,
    slice_by_index,
)

__all__ = ["MOVES", "OPS"]

Tensor = Any

MOVES = frozenset(
    (
        *(
            "concat",
            "const",
            "depth_to_space",
            "expand_dims",
            "gather",
            "gather_along_axis",
            "identity",
            "pad",
        ),
        *("pixel_shuffle", "reshape", "select", "slice_by_index", "slice_by_size", "space_to_depth", "split"),
        *("squeeze", "stack", "tile", "transpose", "upsample_nearest_neighbor", "relu", "abs", "maximum"),
        *("minimum", "clip", "reduce_max", "reduce_min"),
    )
)
"""Operators whose results are among their inputs: nothing to round."""


def _same(function: Function) -> Callable[[Static], Function]:
    """An operator that tensors alone decide."""
    return lambda static: function


def _linear(static: Static) -> Function:
    functional = torch().nn.functional
    return lambda x, weight, bias=None: functional.linear(x, weight, bias)


def _matmul(static: Static) -> Function:
    left, right = bool(static.get("transpose_x", False)), bool(static.get("transpose_y", False))

    def run(x: Tensor, y: Tensor) -> Tensor:
        return torch().matmul(x.transpose(-1, -2) if left else x, y.transpose(-1, -2) if right else y)

    return run


def _reduce(name: str) -> Callable[[Static], Function]:
    def build(static: Static) -> Function:
        th = torch()
        axes, keep = static.get("axes"), bool(static.get("keep_dims", False))
        dims = None if axes is None else ints(axes)
        run: Function = getattr(th, name)
        return lambda x: run(x, dim=dims if dims is not None else list(range(x.dim())), keepdim=keep)

    return build


def _argmax(static: Static) -> Function:
    axis, keep = int(static.get("axis", -1)), bool(static.get("keep_dims", False))
    return lambda x: torch().argmax(x, dim=axis, keepdim=keep)


def _gelu(static: Static) -> Function:
    exact = str(static.get("mode", "EXACT")) == "EXACT"
    return lambda x: torch().nn.functional.gelu(x, approximate="none" if exact else "tanh")


def _split(static: Static) -> Function:
    axis = int(static["axis"])

    def run(x: Tensor) -> tuple[Tensor, ...]:
        if "split_sizes" in static:
            return tuple(x.split(ints(static["split_sizes"]), dim=axis))
        return tuple(x.chunk(int(static["num_splits"]), dim=axis))

    return run


def _gather(static: Static) -> Function:
    axis = int(static.get("axis", 0))
    assert int(static.get("batch_dims", 0)) == 0, "no exported network gathers by batch"

    def run(x: Tensor, indices: Tensor) -> Tensor:
        dim = axis % x.dim()
        flat = indices.reshape(-1).long()
        shape = (*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :])
        return x.index_select(dim, flat % x.shape[dim]).reshape(shape)

    return run


def _gather_nd(static: Static) -> Function:
    assert int(static.get("batch_dims", 0)) == 0, "no exported network gathers by batch"
    return lambda x, indices: x[tuple(indices.long().unbind(-1))]


def _einsum(static: Static) -> Function:
    equation = str(static["equation"])
    return lambda values: torch().einsum(equation, *values)


def _upsample(static: Static) -> Function:
    scale = tuple(float(static.get(f"scale_factor_{side}", 1.0)) for side in ("height", "width"))
    return lambda x: torch().nn.functional.interpolate(x, scale_factor=scale, mode="nearest")


def _cast(static: Static) -> Function:
    th, wanted = torch(), str(static["dtype"])
    kinds = {"fp16": th.float32, "fp32": th.float32, "bool": th.bool}
    return lambda x: x.to(kinds.get(wanted, th.int64))  # half precision is rounded by whoever calls


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() or y.is_floating_point() else x // y


def _clip(static: Static) -> Function:
    low, high = float(static["alpha"]), float(static["beta"])
    return lambda x: x.clamp(low, high)


def _with_epsilon(run: Callable[[Tensor, float], Tensor], default: float) -> Callable[[Static], Function]:
    def build(static: Static) -> Function:
        epsilon = float(static.get("epsilon", default))
        return lambda x: run(x, epsilon)

    return build


def _unary(name: str) -> tuple[tuple[str, ...], Callable[[Static], Function]]:
    return ("x",), lambda static: getattr(torch(), name)


def _binary(name: str) -> tuple[tuple[str, ...], Callable[[Static], Function]]:
    return ("x", "y"), lambda static: getattr(torch(), name)


OPS: Mapping[str, tuple[tuple[str, ...], Callable[[Static], Function]]] = {
    **{
        name: _unary(name)
        for name in ("abs", "ceil", "cos", "erf", "exp", "floor", "relu", "round", "sigmoid")
    },
    **{name: _unary(name) for name in ("sign", "sin", "sqrt", "square", "tanh", "logical_not")},
    **{name: _binary(name) for name in ("add", "sub", "mul", "maximum", "minimum", "pow")},
    **{name: _binary(name) for name in ("greater", "greater_equal", "less", "less_equal", "logical_and")},
    "logical_or": _binary("logical_or"),
    "equal": _binary("eq"),
    "not_equal": _binary("ne"),
    "mod": _binary("remainder"),
    "floor_div": _binary("floor_divide"),
    "real_div": (("x", "y"), _same(_divide)),
    "silu": (("x",), lambda static: torch().nn.functional.silu),
    "gelu": (("x",), _gelu),
    "rsqrt": (("x",), _with_epsilon(lambda x, epsilon: (x + epsilon).rsqrt(), 1e-12)),
    "inverse": (("x",), _with_epsilon(lambda x, epsilon: (x + epsilon).reciprocal(), 1e-4)),
    "log": (("x",), _with_epsilon(lambda x, epsilon: (x + epsilon).log(), 1e-45)),
    "clip": (("x",), _clip),
    "cast": (("x",), _cast),
    "select": (("cond", "a", "b"), _same(lambda cond, a, b: torch().where(cond.bool(), a, b))),
    "softmax": (("x",), lambda static: lambda x: x.softmax(int(static.get("axis", -1)))),
    "reduce_mean": (("x",), _reduce("mean")),
    "reduce_sum": (("x",), _reduce("sum")),
    "reduce_max": (("x",), _reduce("amax")),
    "reduce_min": (("x",), _reduce("amin")),
    "reduce_argmax": (("x",), _argmax),
    "layer_norm": (("x", "gamma", "beta"), layer_norm),
    "instance_norm": (("x", "gamma", "beta"), instance_norm),
    "batch_norm": (("x", "mean", "variance", "gamma", "beta"), batch_norm),
    "conv": (("x", "weight", "bias"), conv),
    "linear": (("x", "weight", "bias"), _linear),
    "matmul": (("x", "y"), _matmul),
    "einsum": (("values",), _einsum),
    "scaled_dot_product_attention": (("query", "key", "value", "attn_mask"), attention),
    "reshape": (("x",), lambda static: lambda x: x.reshape(_shape(x, ints(static["shape"])))),
    "transpose": (("x",), lambda static: lambda x: x.permute(ints(static["perm"]))),
    "expand_dims": (("x",), lambda static: lambda x: _expand(x, ints(static["axes"]))),
    "squeeze": (
        ("x",),
        lambda static: lambda x: x.squeeze(ints(static["axes"])) if "axes" in static else x.squeeze(),
    ),
    "concat": (("values",), lambda static: lambda values: torch().cat(list(values), int(static["axis"]))),
    "stack": (("values",), lambda static: lambda values: torch().stack(list(values), int(static["axis"]))),
    "split": (("x",), _split),
    "slice_by_index": (("x",), slice_by_index),
    "gather": (("x", "indices"), _gather),
    "gather_nd": (("x", "indices"), _gather_nd),
    "gather_along_axis": (
        ("x", "indices"),
        lambda static: lambda x, indices: x.gather(int(static.get("axis", 0)), indices.long()),
    ),
    "tile": (("x",), lambda static: lambda x: x.repeat(ints(static["reps"]))),
    "upsample_nearest_neighbor": (("x",), _upsample),
    "pixel_shuffle": (
        ("x",),
        lambda static: lambda x: torch().nn.functional.pixel_shuffle(x, int(static["upscale_factor"])),
    ),
    "pad": (("x",), pad),
    "identity": (("x",), _same(lambda x: x)),
}
"""Operator -> its tensors, and what builds a function of them; those at the end may be absent."""


def _shape(x: Tensor, shape: list[int]) -> list[int]:
    """A 0 keeps the size that is there."""
    return [x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)]


def _expand(x: Tensor, axes: list[int]) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x

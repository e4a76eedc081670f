"""Run a part in torch as its quantized graph will run: the same integers, the same rounding, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Activations, Layer, Quantized

__all__ = ["KINDS", "fake_quantize", "quantizable", "simulated", "weights_of"]

KINDS = ("Linear", "Conv1d", "Conv2d", "Embedding")
"""Classes of torch.nn whose weights are quantized; all others (norms, mostly) hold next to nothing."""


def quantizable(part: Part) -> dict[str, Any]:
    """Name inside part.module -> every module with weights worth quantizing, in the module's own order."""
    nn = torch().nn
    kinds = tuple(getattr(nn, kind) for kind in KINDS)
    return {name: module for name, module in part.module.named_modules() if isinstance(module, kinds)}


def fake_quantize(x: Any, how: Activations) -> Any:
    """What is left of a tensor after rounding to `how`'s codes; gradients pass where it was not clipped."""
    top = 2**how.bits - 1
    return torch().fake_quantize_per_tensor_affine(x, how.scale, how.zero, 0, top)


@contextmanager
def simulated(part: Part, quantized: Quantized | None = None, *, inputs: bool = True) -> Iterator[None]:
    """Inside the block part.module computes with integer weights and rounded inputs; then it is as it was.

    quantized  instead of part.quantized
    inputs     False: round the weights alone, neither what layers are fed nor what they give
    """
    quantized = quantized or part.quantized
    if quantized is None:
        yield
        return
    th = torch()
    modules = dict(part.module.named_modules())
    parameters = dict(part.module.named_parameters())
    with ExitStack() as stack:
        for name, array in quantized.params.items():
            stack.enter_context(_swapped(parameters[name], th.from_numpy(np.asarray(array))))
        for name, layer in quantized.layers.items():
            module = modules[name]
            stack.enter_context(_swapped(module.weight, th.from_numpy(layer.weights.floats())))
            if layer.bias is not None:
                stack.enter_context(_biased(module, th.from_numpy(layer.bias)))
            if layer.smooth is not None or (inputs and layer.input is not None):
                stack.callback(module.register_forward_pre_hook(_rounding(layer, module, inputs)).remove)
            if inputs and layer.output is not None:
                stack.callback(module.register_forward_hook(_rounded(layer.output)).remove)
        if quantized.drift is not None:
            stack.callback(part.module.register_forward_hook(_undrifted(part, quantized.drift)).remove)
        yield


@contextmanager
def _swapped(parameter: Any, data: Any) -> Iterator[None]:
    before = parameter.data
    parameter.data = data.to(before.dtype)
    try:
        yield
    finally:
        parameter.data = before


@contextmanager
def _biased(module: Any, bias: Any) -> Iterator[None]:
    before = module.bias
    module.bias = torch().nn.Parameter(bias, requires_grad=False)
    try:
        yield
    finally:
        module.bias = before


def _rounding(layer: Layer, module: Any, inputs: bool) -> Any:
    smooth = None
    if layer.smooth is not None:
        column = torch().from_numpy(layer.smooth)
        # channels come last in a Linear's input, second in a convolution's
        smooth = column if _is_linear(module) else column[(..., *[None] * _space(module))]

    def hook(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0] if smooth is None else arguments[0] / smooth
        if inputs and layer.input is not None:
            x = fake_quantize(x, layer.input)
        return (x, *arguments[1:])

    return hook


def _rounded(how: Activations) -> Any:
    return lambda _, arguments, output: fake_quantize(output, how)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch().nn.Linear)


def _space(module: Any) -> int:
    """Axes behind the channels of a convolution."""
    return len(module.kernel_size)


def _undrifted(part: Part, drift: tuple[Any, Any]) -> Any:
    place = [spec.name for spec in part.inputs].index("timestep")
    times, means = (np.asarray(array, np.float64) for array in drift)

    def hook(_: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        t = arguments[place].detach().numpy().astype(np.float64).reshape(-1)
        mean = np.stack([np.interp(t, times, column) for column in means.T], axis=1)
        shape = (*mean.shape, *[1] * (output.ndim - 2))
        return output - torch().from_numpy(mean.astype(np.float32).reshape(shape))

    return hook


def weights_of(part: Part) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape of every quantizable layer's weights."""
    return {name: tuple(module.weight.shape) for name, module in quantizable(part).items()}

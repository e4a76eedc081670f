"""A quantized part that can be trained: integers that stay integers forward, with gradients straight through rounding.

Forward is to the last bit what simulate.py computes from the Quantized made of it. Backward, rounding counts as the
identity (Bengio et al. 2013, arXiv:1308.3432), clipping stops gradients, and an input's step is learned from the
rounding error it causes (Esser et al. 2020, arXiv:1902.08153, eq. 3; its zero point as Bhalgat et al. 2020,
arXiv:2004.09576, eq. 3 and 4).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..model.model import Part
from ..model.quantized import Activations, Array, Layer, Quantized
from .simulate import fake_quantize
from .weights import lowest_code, smoothed

__all__ = ["KINDS", "Trainable", "listening"]

KINDS = ("codes", "steps", "inputs", "zeros", "floats")
"""What is trained: weights in units of their step; logarithms of factors of the weights' steps and of the inputs';
the inputs' zero points; biases and parameters that stay in floating point."""

HALF = 0.49
"""How far from its code a weight may be: beyond a half it would round to another one."""


class Trainable:
    """The tensors of a Quantized that are trained, and the part's forward with them.

    names  modules inside part.module: layers of the Quantized, and others with parameters of their own, norms say
    """

    def __init__(self, part: Part, quantized: Quantized, names: Collection[str]) -> None:
        self.part, self.start, self.names = part, quantized, frozenset(names)
        self.tensors: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        self._modules = dict(part.module.named_modules())
        self._constant: dict[str, Any] = {}
        self._layers = {name: self._layer(name, layer) for name, layer in quantized.layers.items()}
        taken = {f"{name}.{end}" for name in quantized.layers for end in ("weight", "bias")}
        for name, parameter in part.module.named_parameters():
            given = quantized.params.get(name)
            value = parameter.detach() if given is None else torch().from_numpy(np.asarray(given))
            if name not in taken and name.rpartition(".")[0] in self.names:
                self.tensors["floats"][name] = _leaf(value)
            elif given is not None:
                self._constant[name] = value

    def __call__(self, feeds: Mapping[str, Array]) -> tuple[Any, ...]:
        """The part's outputs for named inputs, as tensors with gradients."""
        th = torch()
        arguments = tuple(th.from_numpy(np.ascontiguousarray(feeds[spec.name])) for spec in self.part.inputs)
        instead = {**self._constant, **self.tensors["floats"]}
        with self._hooked():
            for name, layer in self._layers.items():
                if name in self.tensors["codes"]:
                    codes, steps = self.tensors["codes"][name], self.tensors["steps"][name]
                    instead[f"{name}.weight"] = layer.weight(codes, steps)
            outputs = th.func.functional_call(self.part.module, instead, arguments)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def clamp(self) -> None:
        """Bring weights and zero points back to where a code is, after a step of an optimizer."""
        with torch().no_grad():
            for name, codes in self.tensors["codes"].items():
                low, high = self._layers[name].range
                codes.clamp_(low - HALF, high + HALF)
            for name, zero in self.tensors["zeros"].items():
                zero.clamp_(0, 2 ** self._layers[name].bits - 1)

    def quantized(self) -> Quantized:
        """What the tensors mean now. Without the drift that there was: it belonged to other weights."""
        layers = {name: self._written(name, layer) for name, layer in self.start.layers.items()}
        floats = self.tensors["floats"]
        biases = {f"{name}.bias" for name in layers}
        params = {
            name: tensor.detach().numpy().copy() for name, tensor in floats.items() if name not in biases
        }
        return replace(self.start, layers=layers, params={**self.start.params, **params}, drift=None)

    def _layer(self, name: str, layer: Layer) -> _Integers:
        """Constants of one layer; its tensors go where they belong."""
        th, module, tensors = torch(), self._modules[name], self.tensors
        weights, trained = layer.weights, name in self.names
        bias = module.bias if hasattr(module, "bias") else None
        bias = th.from_numpy(layer.bias) if layer.bias is not None else bias
        if bias is not None:
            if trained:
                tensors["floats"][f"{name}.bias"] = _leaf(bias.detach())
            else:
                self._constant[f"{name}.bias"] = bias.detach()
        zero = None if weights.zero is None else th.from_numpy(weights.zero.astype(np.float32))[:, :, None]
        whole = weights.multiplier
        times = None if whole is None else th.from_numpy(whole.astype(np.float32))[:, :, None]
        low, high = lowest_code(weights.bits, weights.zero is None), 2 ** (weights.bits - 1) - 1
        smooth = None
        if layer.smooth is not None:
            behind = 0 if isinstance(module, th.nn.Linear) else len(module.kernel_size)
            smooth = th.from_numpy(layer.smooth)[(..., *[None] * behind)]
        bits = 0 if layer.input is None else layer.input.bits
        scale = th.from_numpy(weights.scale)
        constants = _Integers(weights.shape, weights.groups, (low, high), scale, zero, times, smooth, bits)
        if not trained:
            self._constant[f"{name}.weight"] = th.from_numpy(weights.floats())
            return constants
        tensors["codes"][name] = _leaf(th.from_numpy(self._beside(module, layer)))
        tensors["steps"][name] = _leaf(th.zeros_like(scale))
        if layer.input is not None:
            tensors["inputs"][name] = _leaf(th.tensor(0.0))
            tensors["zeros"][name] = _leaf(th.tensor(float(layer.input.zero)))
        return constants

    def _beside(self, module: Any, layer: Layer) -> Array:
        """[out, inner] in codes: the float weights, as near as they are without rounding to another code."""
        weights, codes = layer.weights, layer.weights.codes.astype(np.float32)
        w = smoothed(module.weight.detach().numpy().astype(np.float32), layer.smooth)
        step = weights.scale if weights.multiplier is None else weights.scale * weights.multiplier
        units = w.reshape(len(codes), weights.groups, -1) / step[:, :, None]
        if weights.zero is not None:
            units = units + weights.zero[:, :, None]
        return np.asarray(codes + np.clip(units.reshape(codes.shape) - codes, -HALF, HALF))

    def _written(self, name: str, layer: Layer) -> Layer:
        if name not in self.names:
            return layer
        tensors = self.tensors
        with torch().no_grad():
            codes = tensors["codes"][name].round().clamp(*self._layers[name].range).to(torch().int8)
            scale = self._layers[name].steps(tensors["steps"][name])
        weights = replace(layer.weights, codes=codes.numpy().copy(), scale=scale.numpy().copy())
        given = layer.input
        if given is not None:
            given = _activations(tensors["inputs"][name], tensors["zeros"][name], given)
        bias = tensors["floats"].get(f"{name}.bias")
        return replace(
            layer, weights=weights, input=given, bias=None if bias is None else bias.detach().numpy().copy()
        )

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Inputs are rounded, no parameter of the module gathers gradients, every bias has a place."""
        with ExitStack() as stack:
            for parameter in self.part.module.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    stack.callback(parameter.requires_grad_, True)
            for name, layer in self.start.layers.items():
                module = self._modules[name]
                if layer.bias is not None and module.bias is None:
                    module.bias = torch().nn.Parameter(torch().from_numpy(layer.bias), requires_grad=False)
                    stack.callback(setattr, module, "bias", None)
                if layer.smooth is not None or layer.input is not None:
                    stack.callback(module.register_forward_pre_hook(self._rounding(name, layer)).remove)
            yield

    def _rounding(self, name: str, layer: Layer) -> Any:
        smooth, tensors = self._layers[name].smooth, self.tensors

        def hook(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = arguments[0] if smooth is None else arguments[0] / smooth
            if name in tensors["inputs"]:
                x = _rounded()(x, tensors["inputs"][name], tensors["zeros"][name], layer.input)
            elif layer.input is not None:
                x = fake_quantize(x, layer.input)
            return (x, *arguments[1:])

        return hook


@contextmanager
def listening(part: Part, names: Sequence[str], into: dict[str, Any]) -> Iterator[None]:
    """Inside, outputs of the modules `names` go into a dictionary."""

    def keep(name: str, _: Any, __: Any, output: Any) -> None:
        into[name] = output

    modules = dict(part.module.named_modules())
    hooks = [modules[name].register_forward_hook(partial(keep, name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, eq=False)
class _Integers:
    """What of a layer is not trained."""

    shape: tuple[int, ...]
    groups: int
    range: tuple[int, int]
    """Of codes."""
    scale: Any
    """[out, groups or 1] to begin with."""
    zero: Any
    """[out, groups, 1] or None."""
    multiplier: Any
    """[out, groups, 1] or None."""
    smooth: Any
    """As it divides the input, or None."""
    bits: int
    """Of the input; 0 for floating point."""

    def steps(self, factor: Any) -> Any:
        return self.scale * factor.exp()

    def weight(self, codes: Any, factor: Any) -> Any:
        """Weights.floats, with gradients."""
        steps = self.steps(factor)
        whole = _straight()(codes).reshape(len(codes), self.groups, -1)
        if self.zero is not None:
            whole = whole - self.zero
        if self.multiplier is not None:
            whole = whole * self.multiplier
        whole = whole.reshape(len(codes), steps.shape[1], -1)
        return (whole * steps[:, :, None]).reshape(self.shape)


def _leaf(value: Any) -> Any:
    return value.detach().clone().contiguous().requires_grad_(True)


def _activations(factor: Any, zero: Any, given: Activations) -> Activations:
    """What two trained numbers mean; the code that means 0 is a whole one."""
    scale = float(np.float32(given.scale) * np.exp(np.float32(factor.detach())))
    return Activations(scale, round(float(zero.detach().clamp(0, 2**given.bits - 1))), given.bits)


@cache
def _straight() -> Any:
    """Rounding whose gradient is that of the identity."""

    class Straight(torch().autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(_: Any, x: Any) -> Any:
            return x.round()

        @staticmethod
        def backward(_: Any, gradient: Any) -> Any:
            return gradient

    return Straight.apply


@cache
def _rounded() -> Any:
    """simulate.fake_quantize of learned scale and zero point."""

    class Rounded(torch().autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any, factor: Any, zero: Any, given: Activations) -> Any:
            how = _activations(factor, zero, given)
            y = fake_quantize(x, how)
            ctx.save_for_backward(x, y)
            ctx.scale = how.scale
            return y

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            x, y = ctx.saved_tensors
            # what was clipped is farther than half a step away; 1e-4 is far above float32's rounding of a code
            inside = (x - y).abs_() <= (0.5 + 1e-4) * ctx.scale
            through = gradient * inside
            clipped = gradient - through
            # d y / d log factor: y - x where it was rounded, y where it was clipped; d y / d zero: -scale where clipped
            by_scale = (gradient * y).sum() - (through * x).sum()
            return through, by_scale, -ctx.scale * clipped.sum(), None

    return Rounded.apply

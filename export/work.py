"""What one call of a network does, counted without computing it: products, numbers moved, weights read, memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..model.libraries import quiet, torch
from ..model.model import Part

__all__ = ["Layer", "Work", "count"]

CONVOLUTIONS = (
    *("conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
)
PRODUCTS = ("matmul", "bmm", "mm", "addmm", "baddbmm", "__matmul__", "__rmatmul__")


@dataclass(frozen=True)
class Layer:
    """One layer with weights: a Conv, a Linear or an Embedding."""

    name: str
    """Of the module inside Part.module."""
    kind: str
    """convolution, linear or table"""
    weights: int
    """Elements."""
    rows: int
    """Output channels, or rows of a table."""
    operations: float
    """Of one sample in a call: two for each product and sum."""
    inputs: int
    """Values of its input, of one sample."""
    outputs: int
    taps: int = 1
    """Pixels one output pixel sees."""
    calls: int = 1
    """Times it is used in one call of the part."""


@dataclass(frozen=True)
class Work:
    """Of one part, for one sample of its default size."""

    layers: tuple[Layer, ...]
    attention: float
    """Operations in the two products of attention, and in other products of two activations."""
    moved: int
    """Values read and written by everything else: norms, activation functions, sums, copies."""
    operators: int
    """Calls of kernels, whatever the batch."""
    peak: int
    """Bytes of float32 activations alive at the worst moment."""
    other_weights: int
    """Elements of norms, biases and buffers."""

    @property
    def weights(self) -> int:
        return self.other_weights + sum(layer.weights for layer in self.layers)

    def operations(self, kind: str) -> float:
        return sum(layer.operations for layer in self.layers if layer.kind == kind)


def count(part: Part) -> Work:
    """Run the part on tensors without memory, at its default size and one sample, and note what it does.

    The weights may be without memory as well (model.load.sketch). Raises whatever a network raises that branches on
    the values of its tensors.
    """
    th = torch()
    sizes = {**part.example.default_sizes(), "batch": 1}
    feeds = part.example.feeds(part.inputs, sizes, seed=0)
    tensors = {**dict(part.module.named_parameters()), **dict(part.module.named_buffers())}
    meta = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    counter = _Counter(th, meta)
    values = tuple(th.from_numpy(feeds[spec.name]).to("meta") for spec in part.inputs)
    with th.no_grad(), quiet(), _watched(th, counter):
        th.func.functional_call(part.module, meta, values)
    layers = tuple(counter.layers.values())
    total = sum(int(tensor.numel()) for tensor in tensors.values())
    return Work(
        layers,
        counter.attention,
        counter.moved,
        counter.operators,
        counter.peak,
        total - sum(layer.weights for layer in layers),
    )


@contextmanager
def _watched(th: Any, counter: _Counter) -> Iterator[None]:
    """Inside, every function of torch is told to the counter; those that it calls itself are not."""

    class Watch(th.overrides.TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(
            self, function: Any, types: Any, arguments: Any = (), named: Mapping[str, Any] | None = None
        ) -> Any:
            output = function(*arguments, **(named or {}))
            counter.saw(getattr(function, "__name__", ""), arguments, named or {}, output)
            return output

    with Watch():
        yield


class _Counter:
    """The tally of one run."""

    def __init__(self, th: Any, weights: Mapping[str, Any]) -> None:
        self._tensor = th.Tensor
        self._weights = {id(tensor): name for name, tensor in weights.items()}
        self._kept = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        self._alive: dict[int, int] = {}
        self._live = 0
        self.layers: dict[str, Layer] = {}
        self.attention = 0.0
        self.moved = self.operators = self.peak = 0

    def saw(self, name: str, arguments: Any, named: Mapping[str, Any], output: Any) -> None:
        inputs = [x for x in (*_flat(arguments), *_flat(named.values())) if isinstance(x, self._tensor)]
        outputs = [x for x in _flat((output,)) if isinstance(x, self._tensor)]
        if not outputs or not inputs:
            return
        before = {x.untyped_storage()._cdata for x in inputs}
        made = [x for x in outputs if x.untyped_storage()._cdata not in before]
        for x in made:
            self._hold(x)
        if not made and not name.endswith("_"):  # a view
            return
        self.operators += 1
        weight = next((x for x in inputs if id(x) in self._weights and x.ndim >= 2), None)
        values = sum(int(x.numel()) for x in (*inputs, *outputs) if id(x) not in self._weights)
        if name == "scaled_dot_product_attention":
            query, key, value = inputs[:3]
            products = query.numel() * key.shape[-2] + query.numel() // query.shape[
                -1
            ] * value.numel() // max(1, value[..., 0, 0].numel())
            self.attention += 2.0 * products
        elif weight is not None and (name in (*CONVOLUTIONS, "linear", "embedding", *PRODUCTS)):
            self._layer(name, weight, inputs, outputs[0])
        elif name in PRODUCTS:
            self.attention += 2.0 * outputs[0].numel() * inputs[-1].shape[-2]
        else:
            self.moved += values

    def _layer(self, name: str, weight: Any, inputs: list[Any], output: Any) -> None:
        path = self._weights[id(weight)].removesuffix(".weight")
        kind = "convolution" if name in CONVOLUTIONS else "table" if name == "embedding" else "linear"
        x = next(each for each in inputs if id(each) not in self._weights)
        rows = int(weight.shape[0])
        taps = int(weight[0, 0].numel()) if kind == "convolution" else 1
        inner = int(weight[0].numel())
        operations = 0.0 if kind == "table" else 2.0 * int(output.numel()) * inner
        if name.startswith("conv_transpose"):
            operations = 2.0 * int(x.numel()) * inner
        before = self.layers.get(path)
        sizes = int(x.numel()), int(output.numel())
        if before is not None:
            operations += before.operations
            sizes = sizes[0] + before.inputs, sizes[1] + before.outputs
        calls = 1 if before is None else before.calls + 1
        self.layers[path] = Layer(path, kind, int(weight.numel()), rows, operations, *sizes, taps, calls)

    def _hold(self, tensor: Any) -> None:
        """Count a new tensor's memory until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._kept or key in self._alive:
            return
        self._alive[key] = size = int(storage.nbytes())
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self._live -= self._alive.pop(key, 0)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value

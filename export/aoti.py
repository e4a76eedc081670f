"""Lower one Part to a list of PyTorch's operators in JSON beside its weights: what AOTInductor compiles on the device.

Half precision is written into the list, so that every host computes the same: weights in it, and everything but what
is made of the timestep alone, up to the first product. As an angle 999 keeps no digit behind the point in float16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..model.libraries import torch
from ..runtime.atenfile import GRAPH, SAFETENSORS, VERSION, VERSION_KEY, WEIGHTS, check_aten
from ..runtime.atenops import ITEM, OPERATORS
from ..runtime.errors import BadInput, CheckpointError
from ..runtime.manifest import PartSpec
from ..targets import Target
from .formats import Here
from .onnx import Traced

__all__ = ["Options", "lower", "options", "stand_in", "write"]

PRODUCTS = {
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "einsum",
    "conv1d",
    "conv2d",
    "conv3d",
    "convolution",
}


@dataclass(frozen=True)
class Options:
    """[backend.options] of a target."""

    float32: tuple[str, ...] = ()
    """Parts that are computed in float32 whatever the recipe's precision."""


def options(target: Target) -> Options:
    """Raises BadInput for keys that are none."""
    found: Options = target.options_as(Options)
    return found


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """Write folder/aten.json and folder/aten.safetensors; see `write`."""
    part = traced.part
    if target.limits.dynamic_shapes:
        raise BadInput(
            f"targets/{target.id}.toml: free sizes", expected="dynamic_shapes = false under [limits]"
        )
    if part.quantized is not None:
        raise BadInput(
            f"{part.name} is quantized, and AOTInductor has no integer kernels to gain by it",
            fix="leave out --quantize, or take a target of TensorRT",
        )
    precision = "float32" if part.name in options(target).float32 else target.recipe.precision
    return replace(write(traced, folder, precision=precision), device=target.device.kind)


def stand_in(spec: PartSpec, target: Target) -> Here:
    """AOTInductor itself, compiling the very graph for this host's CPU."""
    return Here(replace(spec, device="cpu"), spec.precision)


def write(traced: Traced, folder: Path, *, precision: str = "float32") -> PartSpec:
    """Write the graph of a part of fixed sizes; the same part gives the same bytes.

    precision  what it computes in and stores weights as: float32, float16 or bfloat16
    Raises CheckpointError for an operator that no network of the runtimes may hold, BadInput for weights that
    float16 cannot hold.
    """
    part, th = traced.part, torch()
    lowering = _Lowering(traced, getattr(th, precision))
    nodes = lowering.nodes()
    graph = {
        VERSION_KEY: VERSION,
        "inputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in part.inputs],
        "nodes": nodes,
        "outputs": lowering.outputs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # a node a line: as small as it gets while a person can still read it
    text = json.dumps(graph, ensure_ascii=False, allow_nan=False).replace('], ["', '],\n["')
    (folder / GRAPH).write_text(text + "\n", encoding="utf-8")
    _write_weights(folder / WEIGHTS, lowering.weights)
    check_aten(folder / GRAPH, folder / WEIGHTS)
    return PartSpec("aoti", f"{part.name}/{GRAPH}", part.inputs, part.outputs, precision=precision)


class _Lowering:
    """One pass over a traced program, which stays as it is."""

    def __init__(self, traced: Traced, half: Any) -> None:
        self._program, self._part, self._half = traced.program, traced.part, half
        self._torch = torch()
        self._tensors = {**traced.program.state_dict, **traced.program.constants}
        self._inputs: dict[str, str] = {}
        """Placeholder -> the part's input it is."""
        self._targets: dict[str, str] = {}
        """Placeholder -> the weight it is."""
        self._exact: set[Any] = set()
        self._casts: set[str] = set()
        self._written: list[Any] = []
        self.outputs: list[str] = []
        self.weights: dict[str, Any] = {}
        """Name in the file -> its tensor, converted."""

    def nodes(self) -> list[Any]:
        specs = self._program.graph_signature.input_specs
        names = iter(self._part.inputs)
        placeholders = [node for node in self._program.graph.nodes if node.op == "placeholder"]
        for placeholder, spec in zip(placeholders, specs, strict=True):
            if spec.kind.name == "USER_INPUT":
                self._inputs[placeholder.name] = next(names).name
                if self._inputs[placeholder.name] == "timestep":
                    self._exact.add(placeholder)
            else:
                self._targets[placeholder.name] = spec.target
        for node in self._program.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                for value, spec in zip(node.args[0], self._part.outputs, strict=True):
                    name = self._name(value)
                    if spec.dtype == "float32" and self._is_half(value):
                        name = self._cast(value, self._torch.float32)
                    self.outputs.append(name)
        return self._written

    def _call(self, node: Any) -> None:
        if node.target.__name__ == "getitem":
            operator = ITEM
        else:
            operator = str(node.target)
        if operator not in OPERATORS:
            raise CheckpointError(
                f"{self._part.name}: {node.name} is {operator}, which graphs of ATen operators may not hold",
                fix="export for an ONNX Runtime target, or report it with the model's configuration",
            )
        sources = [source for source in node.all_input_nodes if source.name not in self._targets]
        product = operator.split(".")[1] in PRODUCTS if operator != ITEM else False
        if (
            not product
            and all(source in self._exact for source in sources)
            and (sources or not node.all_input_nodes)
        ):
            self._exact.add(node)
        kwargs = dict(node.kwargs)
        if node not in self._exact and kwargs.get("dtype") is self._torch.float32:
            kwargs["dtype"] = self._half
        item = [
            node.name,
            operator,
            [self._value(value, node) for value in node.args],
            {name: self._value(value, node) for name, value in kwargs.items() if name != "pin_memory"},
        ]
        self._written.append(item)

    def _value(self, value: Any, reader: Any) -> Any:
        th = self._torch
        if isinstance(value, th.fx.Node):
            if value.name in self._targets:
                return {"weight": self._weight(value, exact=reader in self._exact)}
            if reader not in self._exact and self._is_whole(value):
                return {"value": self._cast(value, self._half)}
            return {"value": self._name(value)}
        if isinstance(value, list | tuple):
            return [self._value(item, reader) for item in value]
        if isinstance(value, th.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, th.device):
            return {"device": "own"}
        if isinstance(value, float) and math.isinf(value):
            return {"infinity": 1 if value > 0 else -1}
        if value is None or isinstance(value, bool | int | float | str):
            return self._finite(value, reader)
        if isinstance(value, th.memory_format):
            return None  # as the sizes say: compiled code chooses its own
        raise CheckpointError(
            f"{self._part.name}: {reader.name} has an argument that is a {type(value).__name__}",
            expected="numbers, text, types and tensors of fixed sizes",
            fix="fix the sizes (dynamic_shapes = false), or report it with the model's configuration",
        )

    def _finite(self, value: Any, reader: Any) -> Any:
        """Masks hold float32's lowest number, which float16 does not have."""
        most = self._torch.finfo(self._half).max
        if isinstance(value, float) and abs(value) > most and reader not in self._exact:
            return math.copysign(most, value)
        return value

    def _is_half(self, value: Any) -> bool:
        """Whether what was float32 when traced is computed in half precision."""
        return (
            self._half is not self._torch.float32
            and _floats(value)
            and value not in self._exact
            and (value.name not in self._inputs)
        )

    def _is_whole(self, value: Any) -> bool:
        """Whether it is float32 and would have to be converted where half precision is computed."""
        return self._half is not self._torch.float32 and _floats(value) and not self._is_half(value)

    def _cast(self, value: Any, dtype: Any) -> str:
        """The name of the value converted; written before the node that asks first."""
        kind = str(dtype).removeprefix("torch.")
        name = f"{self._name(value)}.{kind}"
        if name not in self._casts:
            self._casts.add(name)
            to = {"dtype": {"dtype": kind}}
            self._written.append([name, "aten._to_copy.default", [{"value": self._name(value)}], to])
        return name

    def _name(self, value: Any) -> str:
        name: str = value.name
        return self._inputs.get(name, name)

    def _weight(self, placeholder: Any, *, exact: bool) -> str:
        th, name = self._torch, self._targets[placeholder.name]
        tensor = self._tensors[name].detach()
        dtype = tensor.dtype
        if dtype == th.float32 and not exact:
            dtype = self._half
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > th.finfo(dtype).max:
                raise BadInput(
                    f"{self._part.name}: {name} holds {largest:.3g}, more than {dtype} can",
                    fix='precision = "bfloat16" or "float32" in a --recipe',
                )
        elif exact and dtype == th.float32 and self._half != th.float32:
            name = f"{name}.float32"  # others may read it in half
        self.weights[name] = (tensor, dtype)
        return name


def _floats(value: Any) -> bool:
    held = value.meta.get("val")
    first = held[0] if isinstance(held, list | tuple) else held
    return first is not None and str(getattr(first, "dtype", "")) == "torch.float32"


def _write_weights(file: Path, weights: dict[str, Any]) -> None:
    """safetensors, in the order of use; one tensor is converted at a time."""
    th = torch()
    names = {ours: theirs for theirs, ours in SAFETENSORS.items()}
    header, end = dict[str, Any](), 0
    for name, (tensor, dtype) in weights.items():
        size = tensor.numel() * th.empty((), dtype=dtype).element_size()
        kind = names[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns what follows
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for block in _bytes(weights):
            opened.write(block)


def _bytes(weights: dict[str, Any]) -> Iterator[Any]:
    th = torch()
    for tensor, dtype in weights.values():
        flat = tensor.to(dtype).contiguous().reshape(-1)
        yield flat.view(th.uint8).numpy().data if flat.numel() else np.empty(0, np.uint8).data

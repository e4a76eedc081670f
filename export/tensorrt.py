"""Lower one Part to the ONNX graph that TensorRT builds its engine from, on the device, when the bundle first runs.

The graph says all of it: float16 and float32 by its types, integers by QuantizeLinear and DequantizeLinear with
positive scales and zero points of zero, sizes fixed. The very library that will read it parses it and builds an engine
here, ahead of time and without a GPU (TensorRT for RTX does), so that what it refuses is known before the bundle ships.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..model.model import Part
from ..model.quantized import Layer, Quantized
from ..runtime.backends import Session
from ..runtime.errors import BadInput, BundleError, GateFailed, MissingExtra
from ..runtime.manifest import PartSpec
from ..targets import Target
from .codes import fits_int8
from .formats import Here
from .onnx import Traced, write_graph

__all__ = ["Options", "as_it_takes", "lower", "on_this_host", "options", "stand_in"]


@dataclass(frozen=True)
class Options:
    """[backend.options] of a target."""

    compute_capability: str
    """Of the GPU: "8.9" for instance."""
    checked_for: str = ""
    """The capability engines are built for at export, where TensorRT for RTX does not build for the GPU's own."""
    float32: tuple[str, ...] = ()
    """Parts that are computed in float32 whatever the recipe's precision."""


def options(target: Target) -> Options:
    """Raises BadInput for keys that are none."""
    found: Options = target.options_as(Options)
    return found


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """Write folder/model.onnx, and model.onnx_data where weights are large, and build an engine of it.

    Raises BadInput for integers TensorRT has no kernels for, for weights float16 cannot hold and for sizes left free,
    GateFailed naming the node and the reason where TensorRT refuses the graph.
    """
    part, own = traced.part, options(target)
    if target.limits.dynamic_shapes:
        raise BadInput(
            f"targets/{target.id}.toml: free sizes", expected="dynamic_shapes = false under [limits]"
        )
    half = target.recipe.precision == "float16" and part.name not in own.float32
    if target.recipe.precision == "bfloat16":
        raise BadInput(
            "precision bfloat16 for TensorRT", expected="float16 or float32", fix="or --target cuda-aoti"
        )
    if part.quantized is not None:
        part = replace(part, quantized=as_it_takes(part.quantized, part))
    from .halves import halve
    from .qdq import TENSORRT

    graph = write_graph(
        Traced(part, traced.program),
        folder,
        opset=target.backend.opset,
        convention=TENSORRT,
        rewrite=halve if half else None,
    )
    check(graph, part, own)
    return PartSpec(
        "tensorrt",
        f"{part.name}/{graph.name}",
        part.inputs,
        part.outputs,
        precision="float16" if half else "float32",
        device="gpu",
    )


def check(graph: Path, part: Part, own: Options) -> int:
    """Bytes of the engine that TensorRT builds of the graph for the target's GPU. Raises GateFailed."""
    try:
        from ..runtime.backends import tensorrt
    except ModuleNotFoundError:
        raise MissingExtra.of("tensorrt_rtx", "tensorrt") from None
    capability = own.checked_for or own.compute_capability
    try:
        return len(tensorrt.build_engine(graph, capability))
    except BundleError as error:
        raise GateFailed(
            f"{part.name}: {error.found}",
            expected=f"a graph that TensorRT builds an engine of, for compute capability {capability}",
            fix="keep the layer it names in floating point (keep = [...] under [quantize] of a --recipe), or report it "
            "with the model's configuration",
        ) from None


def stand_in(spec: PartSpec, target: Target) -> Here:
    """ONNX Runtime on this host's CPU, of the very graph."""
    return Here(spec, spec.precision, "converted", on_this_host)


def on_this_host(path: Path, spec: PartSpec) -> Session:
    """The graph in ONNX Runtime, which computes most of float16 in float32: what is too large for it is watched."""
    from .tensorrt_watch import open_watched

    return open_watched(path, spec)


def as_it_takes(quantized: Quantized, part: Part) -> Quantized:
    """The same numbers as TensorRT takes them: int8 without zero points, a scale a row.

    Codes of fewer bits become the bytes they mean. Tables become floats: it gathers from no integers. Raises BadInput
    for groups with float scales of their own.
    """
    layers, params = dict[str, Layer](), dict(quantized.params)
    tables = {name for name, module in part.module.named_modules() if type(module).__name__ == "Embedding"}
    for name, layer in quantized.layers.items():
        weights = layer.weights
        if name in tables:
            params[f"{name}.weight"] = weights.floats()
            continue
        if not fits_int8(weights):
            raise BadInput(
                f"{part.name}.{name}: groups of weights with scales of their own",
                expected="one scale a row, which is what TensorRT has integer kernels for",
                fix='scheme = "w8a8" under [quantize] of a --recipe',
            )
        if weights.bits != 8:
            codes = weights.integers().astype(np.int8)
            weights = replace(weights, bits=8, codes=codes, zero=None, multiplier=None)
        layers[name] = replace(layer, weights=weights)
    return replace(quantized, layers=layers, params=params)

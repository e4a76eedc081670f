"""Lower one Part to a .tflite graph for LiteRT, the engine that every Android app can have.

litert_torch converts the module itself (its interface takes no torch.export program); litert_graph.py puts the part's
own integers into the result.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..model.libraries import library, quiet, torch
from ..model.model import Part
from ..model.quantized import Quantized
from ..quant.simulate import simulated
from ..runtime.errors import BadInput, CheckpointError
from ..runtime.manifest import PartSpec, TensorSpec
from ..targets import Target, read_table
from . import litert_file, litert_graph
from .formats import Here, check_fixed
from .onnx import Traced

__all__ = ["GRAPH", "Options", "lower", "stand_in"]

GRAPH = "model.tflite"
MAX_BYTES = 2**31 - 1
"""Of a flatbuffer: its offsets have 32 bits with a sign."""
GRAPH_BYTES = 4 << 20
"""Set aside for what is not weights."""
NARROW = {"int64": "int32", "float64": "float32"}
"""What LiteRT's converter makes of types of 64 bits."""


@dataclass(frozen=True)
class Options:
    """[backend.options] of a target: LiteRT takes none."""


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """Write folder/model.tflite; returns the part's spec, whole numbers in it as LiteRT has them: 32 bits.

    The same part gives the same bytes. Raises BadInput for free sizes, weights beyond 2 GiB and integers that LiteRT
    has no kernel for, before any work; CheckpointError where litert_torch cannot convert the part.
    """
    read_table(Options, target.backend.options, f"targets/{target.id}.toml", "backend.options")
    part = traced.part
    check(part)
    with _marked(part):
        data = _converted(part)
    model = litert_file.read(data)
    del data
    if part.quantized is not None:
        litert_graph.store(model, part.quantized.layers)
    inputs, outputs = _narrow(part.inputs), _narrow(part.outputs)
    litert_file.tidy(model, *(tuple(spec.name for spec in specs) for specs in (inputs, outputs)))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / GRAPH).write_bytes(litert_file.written(model))
    return PartSpec("litert", f"{part.name}/{GRAPH}", inputs, outputs, device=target.device.kind)


def stand_in(spec: PartSpec, target: Target) -> Here:
    """LiteRT on this host's CPU."""
    return Here(replace(spec, device="cpu"), "float32")


def check(part: Part) -> None:
    """Raises BadInput for what no .tflite graph of this part can be."""
    check_fixed(part, "fixed sizes: LiteRT's XNNPACK kernels are laid out for them")
    if part.quantized is not None:
        _check_integers(part, part.quantized)
    size, most = _bytes(part), MAX_BYTES - GRAPH_BYTES
    if size > most:
        raise BadInput(
            f"{part.name} has {size / 2**30:.2f} GiB of weights",
            expected=f"less than {most / 2**30:.2f} GiB: a .tflite file is one flatbuffer, and those end at 2 GiB",
            fix="" if part.quantized is not None else "--quantize w8a8, or w8: a quarter of that",
        )


def _check_integers(part: Part, quantized: Quantized) -> None:
    modules = dict(part.module.named_modules())
    names = {id(parameter): name for name, parameter in part.module.named_parameters()}  # each once
    for name, layer in quantized.layers.items():
        weights = layer.weights
        if name not in modules:
            raise BadInput(f"{part.name} has no layer {name}", expected="the name of a module of the part")
        if names[id(modules[name].weight)] != f"{name}.weight":
            raise BadInput(
                f"{part.name}: {name} shares its weights with {names[id(modules[name].weight)]}",
                fix="leave one of the two in float",
            )
        if weights.bits != 8 or weights.zero is not None or weights.scale.shape[1] > 1 or weights.groups > 1:
            found, expected = f"weights of {weights.bits} bits", "8 bits, and one scale a row"
        elif layer.input is not None and layer.input.bits != 8:
            found, expected = f"inputs of {layer.input.bits} bits", "8 bits, which its kernels round to"
        else:
            continue
        raise BadInput(
            f"{part.name}: {name} has {found}, which LiteRT's kernels do not take",
            expected=expected,
            fix="--quantize w8a8 or w8 for this target",
        )


def _bytes(part: Part) -> int:
    """Of the part's constants, as they will be stored."""
    layers = {} if part.quantized is None else part.quantized.layers
    saved = 3 * sum(layer.weights.codes.size for layer in layers.values())
    return part.weight_bytes() - saved


def _narrow(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, dtype=NARROW.get(spec.dtype, spec.dtype)) for spec in specs)


@contextmanager
def _marked(part: Part) -> Iterator[None]:
    """Inside, quantized layers compute with what their integers mean, but for two values of each, which mark them: all
    are found again in the graph, though the converter may have scaled them (attention's 1 / sqrt(d), for instance).

    Neither the rounding nor the smoothing of inputs is there. A bound that no input reaches is, in front of each layer:
    without it the converter would fold a norm's factors into the weights behind it, and its summands into the bias.
    """
    if part.quantized is None:
        yield
        return
    plain = {name: replace(layer, input=None, smooth=None) for name, layer in part.quantized.layers.items()}
    modules = dict(part.module.named_modules())
    bound = torch().tensor(litert_graph.BOUND)
    with (
        simulated(part, replace(part.quantized, layers=plain, drift=None), inputs=False),
        ExitStack() as stack,
    ):
        for number, name in enumerate(part.quantized.layers):
            litert_graph.mark(modules[name].weight.data.reshape(-1), number)
            if not isinstance(modules[name], torch().nn.Embedding):
                hook = modules[name].register_forward_pre_hook(lambda _, x: (x[0].minimum(bound), *x[1:]))
                stack.callback(hook.remove)
        yield


def _converted(part: Part) -> bytes:
    th = torch()
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0)
    arguments = tuple(th.from_numpy(array) for array in feeds.values())
    module = part.module
    if part.quantized is not None and part.quantized.drift is not None:
        module = _undrifted(part)
    try:
        with _quiet(), th.no_grad():
            return bytes(library("litert_torch").convert(module.eval(), arguments).model_content())
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"litert_torch cannot convert {part.name} ({type(error).__name__}: {reason})",
            fix="export for an ONNX Runtime target, or report it with the model's configuration",
        ) from error


def _undrifted(part: Part) -> Any:
    """The module less the mean error of its output by timestep, in operators that can be traced.

    Linear between the timesteps and constant beyond:
    m(t) = m_0 + sum_i clip((t - t_i) / (t_j - t_i), 0, 1) (m_j - m_i), where j = i + 1.
    """
    th, nn = torch(), torch().nn
    assert part.quantized is not None
    assert part.quantized.drift is not None
    times, means = (th.from_numpy(array).float() for array in part.quantized.drift)
    place = [spec.name for spec in part.inputs].index("timestep")

    class Undrifted(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = part.module

        def forward(self, *inputs: Any) -> Any:
            output = self.inner(*inputs)
            share = (inputs[place].reshape(-1, 1) - times[:-1]) / (times[1:] - times[:-1])
            mean = means[0] + share.clamp(0, 1) @ (means[1:] - means[:-1])
            return output - mean.reshape(*mean.shape, *[1] * (output.ndim - 2))

    return Undrifted()


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, litert_torch and what it is made of neither warn nor draw their progress."""
    from ..runtime.backends.litert import silent

    shown = os.environ.get("LITERT_TORCH_SHOW_PROGRESS")
    off = logging.root.manager.disable
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    logging.disable(logging.WARNING)
    try:
        with quiet(), silent(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(off)
        if shown is None:
            del os.environ["LITERT_TORCH_SHOW_PROGRESS"]
        else:
            os.environ["LITERT_TORCH_SHOW_PROGRESS"] = shown

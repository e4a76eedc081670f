"""Lower one Part to the ONNX graph that Qualcomm's Hexagon NPU is compiled from, and run that in QNN's emulator.

The graph is portable: fixed sizes, standard operators, in float16, or with integers of 16 bits for what layers take and
give and of 8 bits for their weights (A16W8), which HTP has kernels for. Context binaries are made here only to prove
that the whole graph is one, for the emulator, and are thrown away: a device compiles its own.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ..model.libraries import library
from ..model.model import Part
from ..runtime.backends import Session, open_session
from ..runtime.errors import BadInput
from ..runtime.manifest import PartSpec
from ..targets import Target
from .formats import Here, check_fixed
from .onnx import Traced, write_graph

__all__ = ["Options", "lower", "open_emulated", "options_of", "stand_in"]

OPSET = 21
"""The first with inputs of 16 bits in QuantizeLinear, and with group norms scaled by channel, as HTP has them."""

BAD_ROWS = 16
"""Rows of a layer norm whose quantized result QNN 2.51 puts in the wrong places; 1 to 15, 17 to 1024 are right
(benchmarks/hexagon.py)."""

EMULATED_CELLS = 32 * 32
"""Pixels or cells of an input up to which the emulator runs a part. emoji-64's U-Net has 256 and takes 1.4 core seconds
a call (benchmarks/results/hexagon.json); SD-1.5's has 4,096, and a hundred times the weights: half an hour by that."""


@dataclass(frozen=True)
class Options:
    """[backend.options] of a target."""

    soc_model: int
    """Qnn_SocModel_t of QNN's QnnTypes.h."""
    htp_arch: int
    """Version of the Hexagon tensor processor."""


def options_of(target: Target) -> Options:
    found: Options = target.options_as(Options)
    return found


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """Write folder/model.onnx, and folder/model.onnx_data where the weights are large; returns the part's spec.

    The same part gives the same bytes. Raises BadInput for free sizes and for integers that Hexagon has no kernels
    for, CheckpointError where torch.onnx cannot translate the part.
    """
    options_of(target)
    part = traced.part
    check(part)
    from .halves import halve
    from .qdq import HEXAGON

    write_graph(
        traced,
        folder,
        opset=max(OPSET, target.backend.opset),
        convention=HEXAGON,
        rewrite=halve if part.quantized is None else rewrite,
    )
    return PartSpec(
        "qnn",
        f"{part.name}/model.onnx",
        part.inputs,
        part.outputs,
        precision=target.recipe.precision,
        device=target.device.kind,
    )


def check(part: Part) -> None:
    """Raises BadInput for what no graph of this part can be on Hexagon."""
    check_fixed(part, "fixed sizes: a context binary has no others")
    for name, layer in {} if part.quantized is None else part.quantized.layers.items():
        weights = layer.weights
        even = weights.bits == 8 and weights.groups == 1 and weights.zero is None
        if weights.shape[1:] == (1,):
            raise BadInput(
                f"{part.name}.{name} is a linear layer of one input",
                expected="more: QNN 2.51 compiles that one for ever in integers",
                fix=f'leave it in floating point: keep = ["{part.name}.{name}"] under [quantize] of a --recipe',
            )
        ends = [how.bits for how in (layer.input, layer.output) if how is not None]
        if not even or (ends != [16, 16] and not _is_table(part, name)):
            raise BadInput(
                f"{part.name}.{name} has weights of {weights.bits} bits and inputs of {ends[0] if ends else 'no'} bits",
                expected="weights of 8 bits, one scale a row, between inputs and outputs of 16",
                fix="--quantize w8a16, with decoder and text alike where a --recipe sets them",
            )


def _is_table(part: Part, name: str) -> bool:
    return type(dict(part.module.named_modules())[name]).__name__ == "Embedding"


def rewrite(model: Any) -> None:
    """What QNN 2.51 and its plug-in 2.7 get wrong beside integers, in other words."""
    round_group_norms(model)
    split_layer_norms(model)


def round_group_norms(model: Any) -> None:
    """Round a group norm's result at once where that is only laid out otherwise before it is rounded.

    The plug-in moves such a rounding up to the norm by itself, and then does not know its size.
    """
    from .nodes import Writer

    writer = Writer(model.graph, "round")
    for node in list(model.graph):
        if node.op_type != "GroupNormalization":
            continue
        for use in list(node.outputs[0].uses()):
            after = use.node
            while after is not None and after.op_type in ("Reshape", "Transpose"):
                after = next((reader.node for reader in after.outputs[0].uses()), None)
            if after is use.node or after is None or after.op_type != "QuantizeLinear":
                continue
            writer.before = use.node
            ends = after.inputs[1:]
            rounded = writer.add("QuantizeLinear", node.outputs[0], *ends)
            use.node.replace_input_with(use.idx, writer.add("DequantizeLinear", rounded, *ends))


def split_layer_norms(model: Any) -> None:
    """Replace layer norms of BAD_ROWS rows by two of half as many."""
    from .nodes import Writer

    ir = library("onnx_ir")
    writer = Writer(model.graph, "rows")
    for node in list(model.graph):
        x = node.inputs[0] if node.inputs else None
        if node.op_type != "LayerNormalization" or x is None or x.shape is None or not x.shape.is_static():
            continue
        *rows, _ = x.shape.numpy()
        if prod(rows) != BAD_ROWS or rows[-1] != BAD_ROWS:
            continue
        writer.before = node
        axis, half = len(rows) - 1, BAD_ROWS // 2
        halves = []
        for begin in (0, half):
            ends = (writer.sizes(end) for end in (begin, begin + half, axis))
            piece = writer.add("Slice", x, *ends)
            halves.append(
                writer.add("LayerNormalization", piece, *node.inputs[1:], attributes=node.attributes)
            )
        result = writer.add("Concat", *halves, attributes={"axis": axis})
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def stand_in(spec: PartSpec, target: Target) -> Here:
    """QNN's emulator of the target's Hexagon; for what takes that hours, its compiler and ONNX Runtime's CPU."""
    options = options_of(target)
    pictures = (tensor.shape[2:] for tensor in spec.inputs if len(tensor.shape) == 4)
    cells = max((prod(map(int, shape)) for shape in pictures), default=0)
    how, opener = ("emulated", open_emulated) if cells <= EMULATED_CELLS else ("converted", open_converted)
    chosen = partial(opener, soc_model=options.soc_model, htp_arch=options.htp_arch)
    return Here(spec, spec.precision, how, chosen)


def open_converted(
    path: Path, spec: PartSpec, *, soc_model: int, htp_arch: int, threads: int | None = None
) -> Session:
    """The graph on ONNX Runtime's CPU, once that Hexagon's compiler took all of it. Raises as open_emulated does."""
    with tempfile.TemporaryDirectory(prefix="fewstep-qnn-") as work:
        _compile(path, Path(work) / "context.onnx", soc_model, htp_arch)
    return open_session(path, replace(spec, engine="onnxruntime", device="cpu"), threads=threads)


def open_emulated(
    path: Path, spec: PartSpec, *, soc_model: int, htp_arch: int, threads: int | None = None
) -> Session:
    """The graph in QNN's emulator, compiled for that Hexagon. It is no measure of a device's speed.

    Raises BundleError where some of the graph would be left to the CPU, naming the operators; BadInput where this
    host has no emulator.
    """
    from ..runtime.backends import qnn

    with tempfile.TemporaryDirectory(prefix="fewstep-qnn-") as work:
        context = Path(work) / "context.onnx"
        found, soc = _compile(path, context, soc_model, htp_arch)
        return qnn.load_context(path, context, found, soc)


def _compile(path: Path, context: Path, soc_model: int, htp_arch: int) -> tuple[Any, Any]:
    """The device of the plug-in and the chip that it was compiled for."""
    library("onnxruntime_qnn")
    from ..runtime.backends import qnn

    found = qnn.devices()[:1]
    if not found:
        raise BadInput(
            "onnxruntime-qnn offers no device on this host",
            expected="x86_64 Linux, where it has an emulator, or a Snapdragon",
            fix="export on such a machine",
        )
    soc = qnn.Soc(soc_model, htp_arch)
    qnn.compile_context(path, context, found, soc)
    return found, soc

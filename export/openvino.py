"""Lower one Part to OpenVINO IR: a graph in XML beside its weights, by the names optimum-intel gives them.

Through the ONNX translation that export has anyway. OpenVINO reads that in 0.06 s with attention kept as one operator;
converting the traced torch program gives a graph that is neither faster nor closer and takes 5 to 9 s a part (emoji-64,
2026.4). Nor does reading send telemetry, which openvino.convert_model does.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..model.libraries import library, torch
from ..model.quantized import Layer
from ..runtime.backends import runs_in
from ..runtime.errors import CheckpointError, MissingExtra
from ..runtime.manifest import PartSpec
from ..targets import Target
from .formats import Here
from .onnx import Traced, write_graph
from .openvino_weights import fill, stand_ins

__all__ = ["GRAPH", "convert", "lower", "stand_in", "write"]

GRAPH = "openvino_model.xml"


def lower(traced: Traced, folder: Path, target: Target) -> PartSpec:
    """For OpenVINO on `target`; see `write`."""
    return write(
        traced,
        folder,
        opset=target.backend.opset,
        weights=target.recipe.weights,
        precision=target.recipe.precision,
        device=target.device.kind,
    )


def stand_in(spec: PartSpec, target: Target) -> Here:
    """OpenVINO on this host's CPU."""
    local = replace(spec, device="cpu")
    precision = runs_in(local)
    assert precision is not None, "every host has a CPU"
    return Here(local, precision)


def write(
    traced: Traced,
    folder: Path,
    *,
    opset: int,
    weights: str = "float32",
    precision: str = "float32",
    device: str = "cpu",
    model: Any = None,
) -> PartSpec:
    """Write folder/openvino_model.xml and .bin; returns the part's spec.

    opset      the ONNX operator set it is read from
    weights    what large constants are stored as: float32 or float16; quantized ones take the bits they have
    precision  what the engine is asked to compute in, but for layers whose input is quantized as well
    device     cpu, gpu or npu
    model      an openvino.Model of this part to store instead, its weights compressed already for instance
    The same part gives the same bytes. Raises CheckpointError where OpenVINO cannot read the translation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = traced.part.quantized is None
    if model is not None:
        _save(model, folder / GRAPH, weights, whole=whole)
    else:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _save(convert(traced, Path(work), opset=opset), folder / GRAPH, weights, whole=whole)
    part, graph = traced.part, f"{traced.part.name}/{GRAPH}"
    return PartSpec("openvino", graph, part.inputs, part.outputs, precision=precision, device=device)


def convert(traced: Traced, work: Path, *, opset: int) -> Any:
    """The part as an openvino.Model in float32, its quantized weights as integers; they are mapped from `work`."""
    openvino, part = _openvino(), traced.part
    core, shorter = openvino.Core(), dict[str, Layer]()
    if part.quantized is not None:
        embedding = torch().nn.Embedding
        tables = (name for name, module in part.module.named_modules() if isinstance(module, embedding))
        quantized, shorter = stand_ins(part.quantized, frozenset(tables))
        traced = Traced(replace(part, quantized=quantized), traced.program)
    try:
        model = core.read_model(str(write_graph(traced, work, opset=opset)))
        fill(model, shorter)
        if part.quantized is not None and part.name.startswith("vae_"):
            _norm_by_channel(model)
        exact = _angles(model)
        _reshape_by_name(model, exact)
        openvino.save_model(model, str(work / "float32.xml"), compress_to_fp16=False)
        _mark(work / "float32.xml", exact)
        return core.read_model(str(work / "float32.xml"))
    except RuntimeError as error:
        raise CheckpointError(
            f"OpenVINO {openvino.__version__} cannot read the translation of {part.name} "
            f"({' '.join(str(error).split())[-300:]})",
            fix="export for an ONNX Runtime target, or report it with the model's configuration",
        ) from error


def _angles(model: Any) -> set[str]:
    """Names of the nodes that make what sines and cosines are taken of: no half precision there.

    A timestep of 999 is 1000 in bfloat16, and as an angle that is another one: of a small U-Net of random weights the
    whole output was off by 0.13 of its size at the last step.
    """
    exact: set[str] = set()
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Sin", "Cos"):
            continue
        above, rest = {node.get_friendly_name(): node}, [node]
        while rest:
            for port in rest.pop().inputs():
                source = port.get_source_output().get_node()
                if source.get_friendly_name() not in above:
                    above[source.get_friendly_name()] = source
                    rest.append(source)
        if not {source.get_type_name() for source in above.values()} & {"MatMul", "Convolution"}:
            exact |= above.keys()  # an angle of the network's own making is no better than the network
    return exact


def _norm_by_channel(model: Any) -> None:
    """Replace group norms of pictures by a factor and a summand a channel, found from each channel's two moments.

    The engine's own group norm wants the picture by planes, an integer convolution wants it by pixels: two copies fewer
    for each. SD-1.5's decoder in int8 takes 3.30 core seconds in place of 3.62 and is as close; one of 16 x 16 pixels,
    as in a U-Net, takes 8 % longer, and one of nothing but bfloat16 is half as exact.
    """
    operators = library("openvino.opset13")
    pixels = np.array([2, 3])
    for node in model.get_ordered_ops():
        if node.get_type_name() != "GroupNormalization" or node.input_value(0).get_partial_shape().rank != 4:
            continue
        x, groups = node.input_value(0), int(node.get_attributes()["num_groups"])
        grouped, single = np.array([0, groups, -1, 1]), np.array([0, -1, 1, 1])  # 0: as it is

        def by_group(value: Any, shape: Any = grouped) -> Any:
            return operators.reshape(value, shape, True)

        shape = operators.shape_of(x)
        count = operators.reduce_prod(operators.gather(shape, pixels, np.array(0)), np.array([0]), True)
        length = by_group(operators.reduce_l2(x, pixels, True))
        squares = operators.divide(operators.multiply(length, length), operators.convert(count, np.float32))
        within = np.array([2])
        mean = operators.reduce_mean(by_group(operators.reduce_mean(x, pixels, True)), within, True)
        square = operators.reduce_mean(squares, within, True)
        variance = operators.subtract(square, operators.multiply(mean, mean))
        spread = operators.sqrt(operators.add(variance, np.float32(node.get_attributes()["epsilon"])))
        weight, bias = (by_group(node.input_value(place), np.array([1, groups, -1, 1])) for place in (1, 2))
        factor = operators.divide(weight, spread)
        summand = operators.subtract(bias, operators.multiply(mean, factor))
        scaled = operators.multiply(x, by_group(factor, single))
        result = operators.add(scaled, by_group(summand, single))
        result.set_friendly_name(node.get_friendly_name())
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(result.output(0))


def _reshape_by_name(model: Any, names: set[str]) -> None:
    """Replace Unsqueeze of a vector by Reshape: the CPU plugin makes the one into the other and forgets the mark."""
    operators = library("openvino.opset13")
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Unsqueeze" or node.get_friendly_name() not in names:
            continue
        axes, vector = node.input_value(1).get_node(), node.input_value(0)
        if vector.get_partial_shape().rank.to_string() != "1" or axes.get_type_name() != "Constant":
            continue
        shape = np.ones(1 + axes.data.size, np.int64)
        shape[[axis for axis in range(shape.size) if axis not in axes.data % shape.size]] = -1
        same = operators.reshape(vector, operators.constant(shape), False)
        same.set_friendly_name(node.get_friendly_name())
        for port in node.output(0).get_target_inputs():
            port.replace_source_output(same.output(0))


def _mark(file: Path, names: set[str]) -> None:
    """Mark layers of an IR as neither stored nor computed in half precision.

    OpenVINO has no call for it but reads it from the file; its "from any type to float16" holds for bfloat16 as well.
    """
    tree = ElementTree.parse(file)
    for layer in tree.iter("layer"):
        if layer.get("name") in names and layer.get("type") != "Parameter" and layer.find("rt_info") is None:
            mark = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
            ElementTree.SubElement(ElementTree.SubElement(layer, "rt_info"), "attribute", mark)
    tree.write(file, encoding="utf-8", xml_declaration=True)


def _save(model: Any, file: Path, weights: str, *, whole: bool) -> None:
    """whole: nothing is quantized. What is has float scales, and those of 1e-5 would keep 3 digits in float16."""
    _name(model)
    halves = weights == "float16"
    if halves and not whole:
        _halve(model)
    _openvino().save_model(model, str(file), compress_to_fp16=halves and whole)
    # its indentation is a sixth of a small graph's file
    file.write_text(re.sub(r">\s+<", "><", file.read_text(encoding="utf-8")), encoding="utf-8")


def _halve(model: Any) -> None:
    """Store float weights that an operator reads as they are, and only those, in float16."""
    operators = library("openvino.opset13")
    for node in model.get_ordered_ops():
        if node.get_type_name() not in ("Convolution", "MatMul", "Gather"):
            continue
        for place in (0, 1):
            weights = node.input_value(place).get_node()
            if weights.get_type_name() == "Constant" and weights.get_element_type().to_string() == "f32":
                half = operators.convert(operators.constant(weights.data.astype(np.float16)), np.float32)
                half.set_friendly_name(f"{weights.get_friendly_name()}.whole")
                node.input(place).replace_source_output(half.output(0))


def _name(model: Any) -> None:
    """Nodes the reader made are numbered by a counter of the process; number them by their place in the graph."""
    for number, node in enumerate(model.get_ordered_ops()):
        made = re.fullmatch(r"(.*?)_\d+", node.get_friendly_name())
        if made and made[1] == node.get_type_name():
            node.set_friendly_name(f"{made[1]}_{number}")


def _openvino() -> Any:
    try:
        return library("openvino")
    except MissingExtra:
        raise MissingExtra.of("openvino", "openvino") from None

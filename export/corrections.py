"""What a description says beside its layers: smoothing that a norm can give by itself, and the drift of the output."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..model.model import Part
from .nodes import Writer

__all__ = ["fold_smoothing", "subtract_drift"]

Array = NDArray[Any]


def fold_smoothing(graph: Writer) -> int:
    """Let a norm give x / smooth where all that reads it multiplies by the same 1 / smooth; returns how many do.

    before:  Mul(LayerNormalization(x, scale, bias), inverse)            of GroupNormalization likewise
    after:   LayerNormalization(x, scale * inverse, bias * inverse)
    """
    done = 0
    for node in list(graph.graph):
        if node.op_type not in ("LayerNormalization", "GroupNormalization") or len(node.inputs) < 3:
            continue
        output, uses = node.outputs[0], list(node.outputs[0].uses())
        affine = [ir.convenience.get_const_tensor(value) for value in node.inputs[1:3] if value is not None]
        factors = {use.node.inputs[1 - use.idx] for use in uses if use.node.op_type == "Mul"}
        inverse = factors.pop() if len(factors) == 1 else None
        if (
            inverse is None
            or inverse.name not in graph.graph.initializers
            or any(use.node.op_type != "Mul" for use in uses)
            or None in affine
            or output.shape is None
        ):
            continue
        held = inverse.const_value.numpy() if inverse.const_value is not None else np.ones(())
        space = 0 if node.op_type == "LayerNormalization" else len(output.shape) - 2
        if any(item is None or held.shape != (item.size, *[1] * space) for item in affine):
            continue
        for place, item in enumerate(affine, 1):
            if item is not None:
                name = f"{output.name}.{place}"
                node.replace_input_with(place, graph.weight(name, item.numpy() * held.ravel()))
        for use in uses:
            ir.convenience.replace_all_uses_with(use.node.outputs[0], output, replace_graph_outputs=True)
        done += 1
    return done


def subtract_drift(graph: Writer, drift: tuple[Array, Array], part: Part) -> None:
    """Take the mean error at the call's timestep from the first output; linear between timesteps, constant beyond.

    mean(t) = means[0] + sum over k of slope[k] (min(max(t, times[k]), times[k + 1]) - times[k])
    """
    times, means = (np.asarray(array, np.float32) for array in drift)
    inner = graph.graph
    t = next(value for value in inner.inputs if value.name == "timestep")
    output = inner.outputs[0]
    mean = graph.constant(means[:1])
    if len(times) > 1:
        t = graph.add("Cast", t, attributes={"to": int(ir.DataType.FLOAT)})
        t = graph.add("Reshape", t, graph.sizes(-1, 1))
        held = graph.add("Min", graph.add("Max", t, graph.constant(times[:-1])), graph.constant(times[1:]))
        ramps = graph.add("Sub", held, graph.constant(times[:-1]))
        slopes = np.diff(means, axis=0) / np.diff(times)[:, None]
        mean = graph.add("Add", graph.add("MatMul", ramps, graph.constant(slopes)), mean)
    space = len(part.outputs[0].shape) - 2
    mean = graph.add("Reshape", mean, graph.sizes(-1, means.shape[1], *[1] * space))
    result = graph.add("Sub", output, mean)
    result.name, output.name = output.name, result.name
    result.shape, result.type = output.shape, output.type
    inner.outputs[0] = result

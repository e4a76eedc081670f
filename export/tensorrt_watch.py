"""A float16 graph on this host's CPU, and how large its values get there.

ONNX Runtime's CPU keeps float32 between most operators of a float16 graph. What overflows on a GPU would pass here, and
draw black pictures there; so the largest number that each sum and product comes to is asked for along the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from ..runtime.errors import GateFailed
from ..runtime.manifest import PartSpec
from .halves import MAX_HALF, types_of
from .nodes import Writer

__all__ = ["WatchedSession", "open_watched"]

Array = NDArray[Any]

GROW = {"Add", "Conv", "Div", "Gemm", "MatMul", "Mul", "Pow", "Sub"}
"""Operators whose results can be larger than what they are given; all others pass on or bound it."""

WATCH = "fewstep.largest"
"""The output that is added: of each watched value its largest magnitude."""


class WatchedSession:
    """Outputs as ever; GateFailed where a value is beyond float16."""

    def __init__(self, session: Any, part: str, watched: Sequence[str]) -> None:
        self._session: Any = session
        self._part, self._watched = part, watched

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        assert self._session is not None, "this session is closed"
        names = [output.name for output in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        if self._watched:
            largest = np.nan_to_num(found.pop(WATCH), nan=np.inf)
            first = int(np.argmax(largest >= MAX_HALF))  # what comes after is large because of it
            if largest[first] >= MAX_HALF:
                reached = f"{self._watched[first]} comes to {largest[first]:.3g}"
                raise GateFailed(
                    f"{self._part}: {reached}, and float16 ends at {MAX_HALF:.0f}",
                    expected="values that float16 holds",
                    fix=f'float32 = ["{self._part}"] under [backend.options] of the target, or precision = "float32" '
                    "in a --recipe",
                )
        return {name: found[name] for name in outputs or found}

    def close(self) -> None:
        self._session = None


def open_watched(path: Path, spec: PartSpec) -> WatchedSession:
    """The graph in ONNX Runtime with that output added; float32 graphs as they are."""
    model = ir.load(path)
    graph = model.graph
    types, writer = types_of(graph), Writer(graph, "fewstep.w")
    half = [
        node.outputs[0]
        for node in graph
        if node.op_type in GROW and types[node.outputs[0]] == ir.DataType.FLOAT16
    ]
    if half:
        every = []
        for value in half:
            size = writer.add("Cast", writer.add("Abs", value), attributes={"to": int(ir.DataType.FLOAT)})
            every.append(
                writer.add(
                    "Reshape", writer.add("ReduceMax", size, attributes={"keepdims": 0}), writer.sizes(1)
                )
            )
        largest = writer.add("Concat", *every, attributes={"axis": 0})
        largest.name, largest.type = WATCH, ir.TensorType(ir.DataType.FLOAT)
        largest.shape = ir.Shape((len(half),))
        graph.outputs.append(largest)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        # of signed integers it makes unsigned ones at opset 21 and later, and then refuses its own graph (1.31.1)
        disabled_optimizers=["QDQPropagationTransformer"],
    )
    return WatchedSession(session, spec.graph.partition("/")[0], [str(value.name) for value in half])

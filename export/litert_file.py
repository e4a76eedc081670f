"""A .tflite file as objects, and those as a file: without the converter's names and notes, each constant once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ..model.libraries import library

__all__ = ["Stored", "operator_names", "read", "schema", "tidy", "written"]

ALIGNMENT = 16
"""Of constants: `force_align` of Buffer.data in LiteRT's schema, which flatbuffers' Python writer does not know."""


@dataclass(frozen=True)
class Stored:
    """A buffer with its bytes aligned; the generated ModelT calls `Pack`, as it does of its own."""

    data: Any = b""
    """Bytes, or an array of uint8."""

    def Pack(self, builder: Any) -> int:
        generated, at = schema(), 0
        if len(self.data):
            builder.StartVector(1, len(self.data), ALIGNMENT)
            builder.head -= len(self.data)
            builder.Bytes[builder.head : builder.head + len(self.data)] = memoryview(self.data)
            at = builder.EndVector()
        generated.BufferStart(builder)
        if at:
            generated.BufferAddData(builder, at)
        return int(generated.BufferEnd(builder))


def read(data: bytes) -> Any:
    """The model as objects of the generated schema."""
    generated = schema()
    return generated.ModelT.InitFromObj(generated.Model.GetRootAs(data))


def operator_names(model: Any) -> list[str]:
    """Of the model's operator codes."""
    known = {code: name for name, code in vars(schema().BuiltinOperator).items() if not name.startswith("_")}
    return [known[code.builtinCode] for code in model.operatorCodes]


def tidy(model: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Name inputs and outputs, drop every other name and note, and whatever no operator reads; equal constants once.

    The converter names each tensor after the modules and the source files it came from: a fiftieth of a small file.
    """
    graph = model.subgraphs[0]
    ends = [[int(number) for number in numbers] for numbers in (graph.inputs, graph.outputs)]
    used = [
        *ends[0],
        *(int(n) for each in graph.operators for n in (*each.inputs, *each.outputs) if n >= 0),
        *ends[1],
    ]
    order = {number: place for place, number in enumerate(dict.fromkeys(used))}
    buffers: list[Stored] = [Stored()]
    known: dict[bytes, int] = {}
    tensors = []
    for number in order:
        tensor = graph.tensors[number]
        data = model.buffers[tensor.buffer].data
        place = 0
        if data is not None and len(data):
            key = hashlib.sha256(memoryview(data)).digest()
            place = known.setdefault(key, len(buffers))
            if place == len(buffers):
                buffers.append(Stored(data))
        tensor.buffer, tensor.name = place, None
        tensor.shapeSignature = None  # the sizes are fixed: it says the same
        if tensor.quantization is not None and tensor.quantization.scale is None:
            tensor.quantization = None
        tensors.append(tensor)
    for operator in graph.operators:
        operator.inputs, operator.outputs = (
            [order[int(n)] if n >= 0 else -1 for n in numbers]
            for numbers in (operator.inputs, operator.outputs)
        )
        operator.intermediates = operator.mutatingVariableInputs = None
        operator.debugMetadataIndex = -1
    codes: dict[int, int] = {}
    for operator in graph.operators:
        operator.opcodeIndex = codes.setdefault(operator.opcodeIndex, len(codes))
    signature = model.signatureDefs[0]
    for names, numbers, maps in zip(
        (inputs, outputs), ends, (signature.inputs, signature.outputs), strict=True
    ):
        maps.sort(key=lambda each: int(each.name.rpartition(b"_")[2]))  # args_0, args_1: in torch's order
        for name, each in zip(names, maps, strict=True):
            each.tensorIndex = order[int(each.tensorIndex)]
            each.name = tensors[each.tensorIndex].name = name
        numbers[:] = [each.tensorIndex for each in maps]
    graph.inputs, graph.outputs = ends
    graph.tensors, graph.name, graph.debugMetadataIndex = tensors, None, -1
    model.operatorCodes = [model.operatorCodes[number] for number in codes]
    model.buffers, model.description = buffers, "fewstep"
    model.metadata = model.metadataBuffer = None


def written(model: Any) -> bytes:
    """The model as the bytes of a file."""
    builder = library("flatbuffers").Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def schema() -> Any:
    """The classes that flatbuffers' compiler makes of LiteRT's schema."""
    return library("ai_edge_litert.schema_py_generated")

"""A Core ML package cut in two of about equal size, which run one after the other and are loaded one at a time.

The protobuf is cut, not the program: no weight is read but to be copied. (coremltools' own bisect_model loads all of
them twice, passes the arrays between the halves in float32 and in an order that changes from run to run.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..runtime.coremlfile import WEIGHTS
from .coreml_package import write
from .mil_reference import coremltools

__all__ = ["chunked"]

Operation = Any
NEAR = 0.05
"""Of all weights: how far from the middle the cut may lie, to be where the fewest bytes cross it."""
KINDS = {10: (65552, 2), 11: (65568, 4), 23: (131104, 4)}
"""MIL.proto's FLOAT16, FLOAT32 and INT32 -> FeatureTypes.proto's, and bytes."""


def chunked(package: Path, work: Path) -> list[Path]:
    """Cut a package near where half of its weights are behind; returns the two in order, in `work`.

    Arrays that cross are outputs of the first and inputs of the second, under the same names, as precise as they are.
    """
    proto = coremltools("coremltools.proto.Model_pb2")
    spec = proto.Model()
    spec.ParseFromString((package / "Data" / "com.apple.CoreML" / "model.mlmodel").read_bytes())
    main = next(iter(spec.mlProgram.functions.values()))
    block = next(iter(main.block_specializations.values()))
    graph = _Graph.of(list(block.operations))
    steps = [place for place, op in enumerate(graph.operations) if place not in graph.constant]
    cut = _best_cut(graph, steps)
    first, second = steps[:cut], steps[cut:]
    made = {out.name for place in first for out in graph.operations[place].outputs}
    ends = list(block.outputs)
    needed = [name for place in second for name in graph.inputs[place]] + ends
    crossing = [name for name in dict.fromkeys(needed) if name in made]
    types = {out.name: out.type for op in graph.operations for out in op.outputs}
    types |= {given.name: given.type for given in main.inputs}
    found = []
    for number, (part, outputs) in enumerate(((first, crossing), (second, ends)), 1):
        half = proto.Model()
        half.CopyFrom(spec)
        function = next(iter(half.mlProgram.functions.values()))
        body = next(iter(function.block_specializations.values()))
        kept = sorted({*part, *graph.constants_of(part)})
        del body.operations[:]
        body.operations.extend(graph.operations[place] for place in kept)
        body.outputs[:] = outputs
        read = dict.fromkeys(name for place in part for name in graph.inputs[place])
        inputs = [given.name for given in main.inputs if given.name in read]
        inputs += [name for name in crossing if number == 2 and name in read]
        del function.inputs[:]
        for name in inputs:
            function.inputs.add(name=name, type=types[name])
        half.description.Clear()
        for entries, names in ((half.description.input, inputs), (half.description.output, outputs)):
            for name in names:
                _describe(entries.add(name=name), types[name])
        target = work / f"{package.stem}Chunk{number}.mlpackage"
        weights = work / f"weights{number}.bin"
        _copy_weights(package / "Data" / WEIGHTS / "weight.bin", weights, body.operations)
        write(half, weights, target)
        found.append(target)
    return found


@dataclass(frozen=True)
class _Graph:
    """The operators of a program by their places."""

    operations: list[Operation]
    inputs: Mapping[int, tuple[str, ...]]
    """Names of what each reads."""
    maker: Mapping[str, int]
    constant: frozenset[int]
    """Constants, and what unpacks constants."""

    @classmethod
    def of(cls, operations: list[Operation]) -> _Graph:
        inputs: dict[int, tuple[str, ...]] = {}
        maker: dict[str, int] = {}
        constant: set[int] = set()
        for place, op in enumerate(operations):
            bound = [binding for argument in op.inputs.values() for binding in argument.arguments]
            inputs[place] = tuple(
                binding.name for binding in bound if binding.WhichOneof("binding") == "name"
            )
            maker |= {out.name: place for out in op.outputs}
            if op.type == "const" or op.type.startswith("constexpr_"):
                constant.add(place)
        return cls(operations, inputs, maker, frozenset(constant))

    def constants_of(self, places: Iterable[int]) -> set[int]:
        """All constants that some operators need, however far up."""
        found: set[int] = set()
        rest = list(places)
        while rest:
            for name in self.inputs[rest.pop()]:
                place = self.maker.get(name)
                if place in self.constant and place not in found:
                    found.add(place)
                    rest.append(place)
        return found

    def bytes_of(self, place: int) -> int:
        """Of a constant in the file of weights."""
        values = self.operations[place].attributes.values()
        return sum(
            _size(value.type.tensorType) for value in values if value.WhichOneof("value") == "blobFileValue"
        )


def _size(tensor: Any) -> int:
    count: int = prod(dimension.constant.size for dimension in tensor.dimensions)
    return count * KINDS.get(tensor.dataType, (0, 1))[1]


def _best_cut(graph: _Graph, steps: list[int]) -> int:
    """How many of `steps` go first: near half of the weights, where the fewest bytes cross."""
    seen: set[int] = set()
    behind: list[int] = []
    for place in steps:
        new = graph.constants_of([place]) - seen
        seen |= new
        behind.append((behind[-1] if behind else 0) + sum(graph.bytes_of(each) for each in new))
    middle, allowed = behind[-1] / 2, NEAR * behind[-1]
    last = {name: number for number, place in enumerate(steps) for name in graph.inputs[place]}
    crossing, alive = [], 0
    ends: dict[int, int] = {}
    for number, place in enumerate(steps):
        for out in graph.operations[place].outputs:
            size = _size(out.type.tensorType)
            alive += size
            ends[last.get(out.name, number)] = ends.get(last.get(out.name, number), 0) + size
        alive -= ends.pop(number, 0)
        crossing.append(alive)
    places = range(1, len(steps))
    near = [n for n in places if abs(behind[n - 1] - middle) <= allowed]
    near = near or [min(places, key=lambda n: abs(behind[n - 1] - middle))]
    return min(near, key=lambda n: (crossing[n - 1], abs(behind[n - 1] - middle)))


def _describe(entry: Any, kind: Any) -> None:
    array = entry.type.multiArrayType
    array.shape.extend(dimension.constant.size for dimension in kind.tensorType.dimensions)
    array.dataType = KINDS[kind.tensorType.dataType][0]


def _copy_weights(source: Path, target: Path, operations: Iterable[Operation]) -> None:
    """Copy the constants of `operations` into a file of their own, and tell the operators where they are now.

    A file of weights is a header of 64 bytes (their number, the format's version) and for each constant 64 bytes
    (a mark, its type, its bytes, where they begin), then the bytes, everything aligned to 64.
    """
    moved: dict[int, int] = {}
    with open(source, "rb") as old, open(target, "wb") as new:
        header = bytearray(old.read(64))
        new.write(header)
        for op in operations:
            for value in op.attributes.values():
                if value.WhichOneof("value") != "blobFileValue":
                    continue
                offset = value.blobFileValue.offset
                if offset not in moved:
                    old.seek(offset)
                    head = bytearray(old.read(64))
                    length, at = struct.unpack_from("<QQ", head, 8)
                    moved[offset] = new.tell()
                    struct.pack_into("<Q", head, 16, new.tell() + 64)
                    new.write(head)
                    old.seek(at)
                    for start in range(0, length, 1 << 24):
                        new.write(old.read(min(1 << 24, length - start)))
                    new.write(bytes(-new.tell() % 64))
                value.blobFileValue.offset = moved[offset]
        struct.pack_into("<I", header, 0, len(moved))
        new.seek(0)
        new.write(header)

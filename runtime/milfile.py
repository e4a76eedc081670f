"""A gate for ML programs: the protobuf of a Core ML package and the constants it keeps in the file of weights.

Every field is a known one (as graphfile.py has it for ONNX), every constant lies inside the one file of weights and is
as long as its type says, and the program is one of operators without control flow. Field numbers are those of
Model.proto and MIL.proto (coremltools 9.0).
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from .onnxproto import Reader, message

__all__ = ["check_program"]

MAX_BYTES = 2**40
"""Of one tensor, as in graphfile.py."""
VERSIONS = range(6, 10)
"""Of the specification: ML programs came with 6 (iOS 15); 9 is iOS 18. 10 is iOS 26, which nothing here needs."""
FORBIDDEN_OPS = re.compile(
    r"cond|while_loop|make_list|list_.*|read_state|coreml_update_state|custom.*|classify"
)
"""Control flow, lists, state that outlives a run, code from elsewhere."""
BITS = {
    1: 8,
    10: 16,
    11: 32,
    12: 64,
    13: 16,
    21: 8,
    22: 16,
    23: 32,
    24: 64,
    25: 4,
    31: 8,
    32: 16,
    33: 32,
    34: 64,
}
BITS |= {35: 4, 36: 2, 37: 1, 38: 6, 39: 3, 40: 8, 41: 8}
"""MIL.proto's DataType -> bits of one element; strings have none."""
STRING = 2
BLOB_MAGIC = 0xDEADBEEF
BLOB_TYPES = {
    1: 16,
    2: 32,
    3: 8,
    4: 8,
    5: 16,
    6: 16,
    7: 16,
    8: 4,
    9: 1,
    10: 2,
    11: 4,
    12: 3,
    13: 6,
    14: 32,
    15: 32,
}
BLOB_TYPES |= {16: 8, 17: 8}
"""BlobDataType of coremltools' MILBlob -> bits, for the length of what lies in the file."""

_MODEL = message("1V:version 2L:description 10V:updatable 502L:program")
_PROGRAM = message("1V:version 3L:doc_string", "2L:function 4L:attribute")
_ENTRY = message("1L:key 2L:value")
_FUNCTION = message("2L:opset", "1L:input 3L:block 4L:attribute")
_BLOCK = message("", "1L:input 2L:output 3L:operation 4L:attribute")
_OPERATION = message("1L:type", "2L:input 3L:output 4L:block 5L:attribute")
_ARGUMENT = message("", "1L:binding")
_BINDING = message("1L:name 2L:value")
_NAMED = message("1L:name 2L:type")
_VALUE = message("1L:doc_string 2L:type 3L:immediate 5L:blob")
_BLOB = message("1L:file 2V:offset")
_TYPE = message("1L:tensor 2L:list 3L:tuple 4L:dictionary 5L:state")
_TENSOR = message("1V:kind 2V:rank", "3L:dimension 4L:attribute")
_DIMENSION = message("1L:constant 2L:unknown")
_SIZE = message("1V:size")


def check_program(name: str, model: Path, weights: Path) -> None:
    """Refuse a program that is damaged, or would make a parser read, compute or allocate what it must not.

    name  what errors call it
    Reads structure only: time grows with the number of operators, not with the weights. Raises BundleError.
    """
    with (
        open(model, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        open(weights, "rb") as blob,
        mmap.mmap(blob.fileno(), 0, access=mmap.ACCESS_READ) as constants,
    ):
        _Gate(Reader(name, data), constants).model()


@dataclass
class _Gate:
    """One pass over a program: the mapped protobuf and the mapped weights."""

    wire: Reader
    weights: mmap.mmap
    where: str = "the program"

    def model(self) -> None:
        wire, version, program = self.wire, -1, None
        for name, a, b in wire.fields(0, len(wire.data), _MODEL):
            if name == "version":
                version = a
            elif name == "updatable" and a:
                wire.refuse("a model that may be trained on the device", "one for inference")
            elif name == "program":
                program = (a, b)
        if version not in VERSIONS:
            wire.refuse(f"specification version {version}", f"{VERSIONS[0]} to {VERSIONS[-1]}")
        if program is None:
            wire.refuse("it holds no ML program")
        for name, a, b in wire.fields(*program, _PROGRAM):
            if name == "function":
                self.function(*self.value_of(a, b))

    def value_of(self, start: int, end: int) -> tuple[int, int]:
        """The value of a map's entry."""
        for name, a, b in self.wire.fields(start, end, _ENTRY):
            if name == "value":
                return a, b
            self.wire.text(a, b)
        return end, end

    def function(self, start: int, end: int) -> None:
        for name, a, b in self.wire.fields(start, end, _FUNCTION):
            if name == "input":
                self.named(a, b)
            elif name == "block":
                self.block(*self.value_of(a, b))

    def block(self, start: int, end: int) -> None:
        for name, a, b in self.wire.fields(start, end, _BLOCK):
            if name == "operation":
                self.operation(a, b)
            elif name == "input":
                self.named(a, b)

    def operation(self, start: int, end: int) -> None:
        kind, parts = "", []
        for name, a, b in self.wire.fields(start, end, _OPERATION):
            if name == "type":
                kind = self.wire.text(a, b)
            else:
                parts.append((name, a, b))
        self.where = f"an operator {kind[:80]!r}"
        if not kind or FORBIDDEN_OPS.fullmatch(kind):
            self.wire.refuse(self.where, "no control flow, lists or state")
        for name, a, b in parts:
            if name == "block":
                self.wire.refuse(f"{self.where} holds a block", "no control flow")
            elif name == "output":
                self.named(a, b)
            elif name == "attribute":
                self.value(*self.value_of(a, b))
            else:
                for _, binding, stop in self.wire.fields(*self.value_of(a, b), _ARGUMENT):
                    for what, x, y in self.wire.fields(binding, stop, _BINDING):
                        if what == "value":
                            self.value(x, y)
                        else:
                            self.wire.text(x, y)

    def named(self, start: int, end: int) -> None:
        for name, a, b in self.wire.fields(start, end, _NAMED):
            if name == "type":
                self.type(a, b)
            else:
                self.wire.text(a, b)

    def value(self, start: int, end: int) -> None:
        bits, blob = None, None
        for name, a, b in self.wire.fields(start, end, _VALUE):
            if name == "type":
                bits = self.type(a, b)
            elif name == "blob":
                blob = (a, b)
        if blob is not None:
            self.blob(*blob, bits)

    def type(self, start: int, end: int) -> int | None:
        """Bits of a tensor that its type says; None for what is none of fixed sizes."""
        bits = None
        for name, a, b in self.wire.fields(start, end, _TYPE):
            if name == "state":
                self.wire.refuse(f"{self.where} has state", "tensors")
            if name == "tensor":
                bits = self.tensor(a, b)
        return bits

    def tensor(self, start: int, end: int) -> int | None:
        kind, sizes, free = 0, [], False
        for name, a, b in self.wire.fields(start, end, _TENSOR):
            if name == "kind":
                kind = a
            elif name == "dimension":
                for which, x, y in self.wire.fields(a, b, _DIMENSION):
                    if which == "unknown":
                        free = True
                    else:
                        sizes += [value for _, value, _ in self.wire.fields(x, y, _SIZE)] or [0]
        if kind == STRING:
            return None
        if kind not in BITS:
            self.wire.refuse(f"{self.where} has element type {kind}", "a number type of MIL")
        if len(sizes) > 16 or prod(sizes) * BITS[kind] > 8 * MAX_BYTES:
            self.wire.refuse(
                f"{self.where} has a tensor of shape {sizes[:16]}", f"at most {MAX_BYTES:,} bytes"
            )
        return None if free else prod(sizes) * BITS[kind]

    def blob(self, start: int, end: int, bits: int | None) -> None:
        """A constant in the file of weights: 64 bytes that say where it lies, inside, as long as its type says."""
        file, offset = "", 0
        for name, a, b in self.wire.fields(start, end, _BLOB):
            if name == "file":
                file = self.wire.text(a, b)
            else:
                offset = a
        if file != "@model_path/weights/weight.bin":
            self.wire.refuse(f"{self.where} has weights in {file[:80]!r}", "@model_path/weights/weight.bin")
        size = len(self.weights)
        if offset % 64 or not 64 <= offset <= size - 64:
            self.wire.refuse(
                f"{self.where} has weights at byte {offset:,}", f"a multiple of 64 within {size:,} bytes"
            )
        head = self.weights[offset : offset + 64]
        magic, kind = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:8], "little")
        length, at = int.from_bytes(head[8:16], "little"), int.from_bytes(head[16:24], "little")
        if magic != BLOB_MAGIC or kind not in BLOB_TYPES:
            self.wire.refuse(f"{self.where} has no weights at byte {offset:,}")
        if at + length > size:
            self.wire.refuse(f"{self.where} ends at byte {at + length:,} of its weights", f"at most {size:,}")
        if bits is None or length != (bits + 7) // 8:
            expected = "" if bits is None else f"{(bits + 7) // 8:,}"
            self.wire.refuse(f"{self.where} has {length:,} bytes of weights", expected)

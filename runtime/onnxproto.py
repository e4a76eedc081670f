"""The protobuf of an ONNX file, read strictly and without copying: only what a table of known fields allows.

The field numbers are those of onnx.proto (ONNX 1.23).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from .errors import BundleError

__all__ = [
    "ATTRIBUTE",
    "BITS",
    "DIM",
    "ENTRY",
    "FIXED",
    "GRAPH",
    "MODEL",
    "NODE",
    "OPSET",
    "SHAPE",
    "TENSOR",
    "TENSOR_TYPE",
    "TYPE",
    "TYPED",
    "VALUE",
    "Reader",
]

MAX_NAME = 1 << 16
"""Bytes of one name or text that is read."""
MAX_FIELDS = 4_000_000
"""Fields read in all: bounds time to seconds and memory to megabytes. UNets exported here had up to 44,000."""
MAX_PACKED = 32
"""Numbers of one packed list that is read: dimensions."""

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def message(once: str, repeated: str = "") -> dict[int, tuple[str, bool]]:
    """The known fields of a message: "7L:graph" is number 7, with a length, called graph.

    once, repeated  fields that may come once, or often; V varint, L length, F fixed32, D fixed64
    Returns {tag: (name, whether it may come once only)}; a tag holds the number and the wire type. Protobuf
    parsers skip a field of the wrong wire type and let the last of several win; refusing both means that what is
    checked is what the engine will see.
    """
    wires = {"V": VARINT, "L": LENGTH, "F": FIXED32, "D": FIXED64}
    table = {}
    for words, single in ((once, True), (repeated, False)):
        for word in words.split():
            number, name = word.split(":")
            table[int(number[:-1]) << 3 | wires[number[-1]]] = (name, single)
    return table


MODEL = message(
    "1V:ir_version 2L:producer_name 3L:producer_version 4L:domain 5V:model_version 6L:doc_string 7L:graph",
    "8L:opset_import 14L:metadata 20L:training_info 25L:functions 26L:configuration",
)
OPSET = message("1L:domain 2V:version")
GRAPH = message(
    "2L:name 10L:doc_string",
    "1L:node 5L:initializer 15L:sparse 11L:value 12L:value 13L:value 14L:quantization 16L:metadata",
)
NODE = message(
    "3L:name 4L:op_type 6L:doc_string 7L:domain 8L:overload", "1L:input 2L:output 5L:attribute 9L:metadata"
)
ATTRIBUTE = message(
    "1L:name 13L:doc_string 20V:type 2F:f 3V:i 4L:s 5L:tensor 6L:graph 22L:sparse 14L:type_proto "
    "21L:reference",
    "7F:floats 7L:floats 8V:ints 8L:ints 9L:strings 10L:tensor 11L:graph 23L:sparse 15L:type_proto",
)
TENSOR = message(
    "2V:data_type 8L:name 12L:doc_string 9L:raw_data 14V:data_location",
    "1V:dims 1L:dims 4F:float_data 4L:float_data 5V:int32_data 5L:int32_data 7V:int64_data 7L:int64_data "
    "10D:double_data 10L:double_data 11V:uint64_data 11L:uint64_data 13L:external_data 16L:metadata",
)
ENTRY = message("1L:key 2L:value")
VALUE = message("1L:name 2L:type 3L:doc_string", "4L:metadata")
TYPE = message("1L:tensor 6L:denotation")
TENSOR_TYPE = message("1V:elem_type 2L:shape")
SHAPE = message("", "1L:dim")
DIM = message("1V:value 2L:parameter 3L:denotation")


# TensorProto.DataType -> bits of one element; strings, complex numbers and 6-bit floats have no place here
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16}
BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8, 25: 2, 26: 2}
# the typed list that may hold a type, when the values are not raw bytes
TYPED = {1: "float_data", 11: "double_data", 7: "int64_data", 12: "uint64_data", 13: "uint64_data"}
FIXED = {"float_data": 4, "double_data": 8}


@dataclass
class Reader:
    """A mapped file; `name` is what errors call it."""

    name: str
    data: mmap.mmap
    left: int = MAX_FIELDS
    """Fields that may still be read."""

    def refuse(self, found: str, expected: str = "") -> NoReturn:
        raise BundleError(
            f"{self.name}: {found}",
            expected=expected,
            fix="export the bundle again; do not run this graph",
        )

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """The number at `at` and the place after it."""
        value = shift = 0
        while at < end:
            byte = self.data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                self.refuse(f"a number at byte {at} is longer than 64 bits")
        self.refuse(f"it ends inside a number at byte {at}: the file is cut short or is no ONNX file")

    def fields(
        self, start: int, end: int, known_fields: dict[int, tuple[str, bool]]
    ) -> Iterator[tuple[str, int, int]]:
        """(name, value, -1) for a number, (name, start, end) for anything with a length or a fixed size."""
        data, at = self.data, start
        seen = set()
        while at < end:
            tag = data[at]
            at += 1
            if tag >= 0x80:
                tag, at = self.varint(at - 1, end)
            known = known_fields.get(tag)
            if known is None:
                self.refuse(
                    f"unknown field {tag >> 3} at byte {at}: the file is damaged, too new or no ONNX file"
                )
            self.left -= 1
            if self.left < 0:
                self.refuse(f"more than {MAX_FIELDS:,} fields")
            name, single = known
            if single:
                if tag in seen:
                    self.refuse(f"{name} is given twice at byte {at}")
                seen.add(tag)
            wire = tag & 7
            if wire == VARINT:
                value, at = self.varint(at, end)
                yield name, value, -1
                continue
            if wire == LENGTH:
                size, at = self.varint(at, end)
            else:
                size = 4 if wire == FIXED32 else 8
            if size > end - at:
                self.refuse(
                    f"{name} at byte {at} needs {size:,} bytes, {end - at:,} are left: the file is cut short"
                )
            yield name, at, at + size
            at += size

    def text(self, start: int, end: int) -> str:
        if end - start > MAX_NAME:
            self.refuse(f"a name of {end - start:,} bytes", f"at most {MAX_NAME:,}")
        try:
            return self.data[start:end].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"the name at byte {start} is not UTF-8")

    def numbers(self, start: int, end: int) -> list[int]:
        """Packed numbers."""
        values = []
        while start < end:
            value, start = self.varint(start, end)
            values.append(value)
            if len(values) > MAX_PACKED:
                self.refuse(f"a tensor of more than {MAX_PACKED} dimensions")
        return values

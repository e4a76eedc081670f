"""Protobuf, read strictly and without copying: only what a table of known fields allows."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from .errors import BundleError

__all__ = ["Reader", "message"]

MAX_NAME = 1 << 16
"""Bytes of one name or text that is read."""
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


@dataclass(frozen=True)
class Reader:
    """A mapped file; `name` is what errors call it."""

    name: str
    data: mmap.mmap

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

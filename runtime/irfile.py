"""A gate for OpenVINO IR: what a stranger's model.xml must be before a native parser sees a byte of it.

As graphfile.py for ONNX: structure only, through a streaming parser that knows no entities. OpenVINO 2026.4 itself
refuses most of what is refused here; what it accepts (one id given to two layers), runs out of time on (a chain of
30,000 layers took more than 40 s to compile) or would follow (loops, state) is why this comes first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from .errors import BundleError
from .plainfiles import plain_size

__all__ = ["check_ir"]

MAX_FILE = 64 << 20
"""Bytes of XML. The U-Net of SD-1.5 has 2 MiB."""
MAX_LAYERS = 20_000
"""The U-Net of SD-1.5 has 4,200."""
MAX_DEPTH = 16
MAX_BYTES = 2**40
"""Of one tensor, as in graphfile.py."""
VERSION = "11"
"""Of the IR: the only one OpenVINO has written since 2022.1."""
OPSETS = re.compile(r"opset([1-9]|1[0-6])")
"""Those of OpenVINO 2026.4; an extension's operators have a name of their own there."""
FORBIDDEN_OPS = {"If", "Loop", "TensorIterator", "ReadValue", "Assign"}
"""Control flow, and state that outlives a run."""
BITS = {
    **{"boolean": 8, "f64": 64, "f32": 32, "f16": 16, "bf16": 16, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8},
    **{"f4e2m1": 4, "nf4": 4, "i64": 64, "i32": 32, "i16": 16, "i8": 8, "i4": 4, "i2": 2},
    **{"u64": 64, "u32": 32, "u16": 16, "u8": 8, "u6": 6, "u4": 4, "u3": 3, "u2": 2, "u1": 1},
}
"""Element type -> bits."""
INSIDE = {
    "": {"net"},
    "net": {"layers", "edges", "rt_info"},
    "layers": {"layer"},
    "layer": {"data", "input", "output", "rt_info"},
    "input": {"port"},
    "output": {"port"},
    "port": {"dim", "rt_info"},
    "edges": {"edge"},
}
"""Element -> what may lie in it: no bodies of loops, no weights by another name."""


def check_ir(path: Path | str, weights: Path | str) -> None:
    """Refuse an IR that is damaged, or would make the engine read, compute or allocate what it must not.

    weights  the .bin beside it, the only file its constants may lie in
    Raises BundleError naming the file and the layer.
    """
    path, weights = Path(path), Path(weights)
    size = plain_size(path)
    if not 0 < size <= MAX_FILE:
        raise BundleError(
            f"{path.name}: {size:,} bytes", expected=f"1 to {MAX_FILE:,}", fix="export the bundle again"
        )
    gate = _Gate(path.name, weights.name, plain_size(weights))
    parser = expat.ParserCreate("UTF-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = gate.start, gate.end
    parser.CharacterDataHandler = gate.text
    parser.StartDoctypeDeclHandler = lambda *_: gate.refuse("a DOCTYPE", "elements alone")
    parser.ProcessingInstructionHandler = lambda *_: gate.refuse("a processing instruction", "elements alone")
    try:
        with open(path, "rb") as file:
            parser.ParseFile(file)
    except expat.ExpatError as error:
        gate.refuse(f"it is not XML ({error})")
    gate.check_overlaps()


class _Gate:
    """The state of one pass over the file: where it is, what it has seen."""

    def __init__(self, name: str, weights: str, size: int) -> None:
        self.name, self.weights, self.size = name, weights, size
        self.above = [""]
        self.ids: set[str] = set()
        self.layer, self.kind = "", ""
        self.dims: list[int] = []
        self.ranges: list[tuple[int, int, str]] = []

    def refuse(self, found: str, expected: str = "") -> NoReturn:
        raise BundleError(
            f"{self.name}: {found}", expected=expected, fix="download or export the bundle again"
        )

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        inside = self.above[-1]
        self.above.append(tag)
        if len(self.above) > MAX_DEPTH:
            self.refuse("its elements are nested too deeply", f"at most {MAX_DEPTH} levels")
        if "rt_info" in self.above[:-1]:
            return  # notes of the converter, of any shape
        if tag not in INSIDE.get(inside, set()):
            self.refuse(f"{self.where()}: <{tag[:80]}> in <{inside}>", "one graph of operators")
        if tag == "net" and attributes.get("version") != VERSION:
            self.refuse(f"IR version {attributes.get('version', '')[:40]!r}", VERSION)
        elif tag == "layer":
            self.start_layer(attributes)
        elif tag == "data" and self.kind in ("Const", "Parameter"):
            self.check_data(attributes)
        elif tag == "port":
            self.dims = []

    def end(self, tag: str) -> None:
        self.above.pop()
        if tag == "port":
            self.check_shape(self.dims, 8)

    def text(self, text: str) -> None:
        if self.above[-1] == "dim":
            self.dims.append(self.whole(text.strip(), "a size", least=-1))

    def start_layer(self, attributes: Mapping[str, str]) -> None:
        number, self.kind = attributes.get("id", ""), attributes.get("type", "")
        self.layer = attributes.get("name", "")
        if number in self.ids or not re.fullmatch("[0-9]{1,9}", number):
            self.refuse(f"{self.where()}: id {number[:40]!r}", "a number of its own")
        self.ids.add(number)
        if len(self.ids) > MAX_LAYERS:
            self.refuse("too many layers", f"at most {MAX_LAYERS:,}")
        if not OPSETS.fullmatch(attributes.get("version", "")):
            self.refuse(f"{self.where()} is of {attributes.get('version', '')[:80]!r}", "opset1 to opset16")
        if self.kind in FORBIDDEN_OPS:
            self.refuse(self.where(), "no control flow and no state")

    def check_data(self, attributes: Mapping[str, str]) -> None:
        """A constant lies inside the .bin and is as long as its shape says; an input could be allocated."""
        kind = attributes.get("element_type", "")
        if kind not in BITS:
            self.refuse(f"{self.where()} has element type {kind[:40]!r}", "a number type of OpenVINO")
        sizes = [size.strip() for size in attributes.get("shape", "").split(",") if size.strip()]
        if self.kind == "Parameter":
            self.check_shape([int(size) for size in sizes if re.fullmatch("[0-9]{1,19}", size)], BITS[kind])
            return
        needed = self.check_shape([self.whole(size, "a size") for size in sizes], BITS[kind])
        offset = self.whole(attributes.get("offset", ""), "its offset")
        length = self.whole(attributes.get("size", ""), "its length")
        if length != needed:
            self.refuse(
                f"{self.where()}: {length:,} bytes of {kind} {sizes}", f"{needed:,} for its shape and type"
            )
        if offset + length > self.size:
            self.refuse(
                f"{self.where()} ends at byte {offset + length:,} of {self.weights}",
                f"at most {self.size:,}, its size",
            )
        if length:
            self.ranges.append((offset, offset + length, self.where()))

    def check_shape(self, dims: list[int], bits: int) -> int:
        """Bytes of a tensor, free axes left out; refuses what no memory holds."""
        size = (prod(dim for dim in dims if dim >= 0) * bits + 7) // 8
        if size > MAX_BYTES:
            self.refuse(f"{self.where()} of shape {dims[:8]} needs {size:,} bytes", f"at most {MAX_BYTES:,}")
        return size

    def check_overlaps(self) -> None:
        """Two constants may share their bytes entirely (equal ones are stored once) but not in part."""
        for (start, stop, one), (begin, end, other) in pairwise(sorted(self.ranges)):
            if begin < stop and (begin, end) != (start, stop):
                self.refuse(f"{one} and {other} overlap in {self.weights}", "separate or identical ranges")

    def whole(self, text: str, what: str, least: int = 0) -> int:
        if not re.fullmatch("-?[0-9]{1,19}", text) or int(text) < least:
            self.refuse(f"{self.where()}: {what} is {text[:40]!r}", f"a whole number from {least}")
        return int(text)

    def where(self) -> str:
        return f"layer {self.layer[:80]!r} ({self.kind[:80]})" if self.layer else "the file"

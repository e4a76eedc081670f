"""A gate for .tflite files: what a stranger's graph must be before a native parser sees a byte of it.

As graphfile.py for ONNX: structure only, through a memory map. LiteRT maps the file and follows its offsets without
checking one (the interpreter verifies no flatbuffer), so here every table, vector and index is followed first.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NoReturn

from . import tfliteops as schema
from .errors import BundleError
from .plainfiles import plain_size
from .tfliteops import OPERATORS, OPTIONAL, SIZED

__all__ = ["check_tflite"]

MAX_FILE = 2**31 - 1
"""Flatbuffers' offsets have 32 bits with a sign."""
MAX_ITEMS = 100_000
"""Of a vector of tables; SD-1.5's U-Net has some ten thousand tensors."""
MAX_DIMS = 8
"""LiteRT's own limit on most operators is 6."""
MAX_BYTES = 2**32
"""Of one tensor: the engine allocates what a file says an intermediate one has. SD-1.5's largest has 1 GiB."""
MAX_SIZE = 2**20
"""Of one number that says how large an output is: pixels of a side, repetitions."""
MAX_NAME = 4096
ALIGNMENT = 16
"""Of a constant's bytes: kernels read them as vectors."""
BITS = {0: 32, 1: 16, 2: 32, 3: 8, 4: 64, 6: 8, 7: 16, 9: 8, 10: 64, 17: 4}
"""Element type -> bits: float32, float16, int32, uint8, int64, bool, int16, int8, float64, int4."""
WHOLE = {2: "i", 4: "q"}
INT8 = 9
WIDTHS = {"b": 1, "h": 2, "i": 4, "q": 8, "v": 4, "o": 4, "x": 0}
"""Fields of tables: numbers of so many bytes, v and o are offsets, x must be absent."""


def check_tflite(path: Path | str) -> None:
    """Refuse a .tflite file that is damaged, or would make the engine read, compute or allocate what it must not.

    Raises BundleError naming the file and the place in it.
    """
    path = Path(path)
    size = plain_size(path)
    if not 8 <= size <= MAX_FILE:
        raise BundleError(
            f"{path.name}: {size:,} bytes",
            expected=f"8 to {MAX_FILE:,}",
            fix="download or export the bundle again",
        )
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _check_model(_File(path.name, data, size))


Table = Mapping[int, int]
"""Slot of a field that is there -> its place in the file."""


@dataclass
class _File:
    """The mapped file; everything is read through its checks."""

    name: str
    data: mmap.mmap
    size: int

    def refuse(self, found: str, expected: str = "") -> NoReturn:
        fix = "export the bundle again; do not run this graph"
        raise BundleError(f"{self.name}: {found}", expected=expected, fix=fix)

    def number(self, at: int, kind: str = "I") -> int:
        """One number of struct's kind, at a multiple of its own size."""
        width = struct.calcsize(f"<{kind}")
        if at < 0 or at + width > self.size or at % width:
            self.refuse(f"a number at byte {at} is outside the file or odd: it is cut short or damaged")
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])

    def follow(self, at: int) -> int:
        """Where the offset at `at` leads."""
        step = self.number(at)
        if not 4 <= step <= self.size - at - 4:
            self.refuse(f"the offset at byte {at} leads out of the file: it is cut short or damaged")
        return at + step

    def table(self, at: int, fields: str, what: str) -> Table:
        """The table at `at`, which has no other fields than these, each inside it."""
        back = self.number(at, "i")
        start = at - back
        if start < 4 or start + 4 > self.size:
            self.refuse(f"{what}: its vtable is outside the file")
        length, inline = self.number(start, "H"), self.number(start + 2, "H")
        if length < 4 or length % 2 or start + length > self.size or inline < 4 or at + inline > self.size:
            self.refuse(f"{what}: a vtable of {length} bytes for a table of {inline}")
        found = {}
        for slot in range((length - 4) // 2):
            offset = self.number(start + 4 + 2 * slot, "H")
            if not offset:
                continue
            kind = fields[slot] if slot < len(fields) else "x"
            width = WIDTHS[kind]
            if not width:
                self.refuse(
                    f"{what} has field {slot}", "a plain graph: nothing custom, external, sparse or stateful"
                )
            if not 4 <= offset <= inline - width or (at + offset) % width:
                self.refuse(f"{what}: field {slot} lies outside its table")
            found[slot] = at + offset
        return found

    def value(self, table: Table, slot: int, kind: str = "i", default: int = 0) -> int:
        return self.number(table[slot], kind) if slot in table else default

    def vector(
        self, table: Table, slot: int, width: int, what: str, *, most: int = MAX_ITEMS
    ) -> tuple[int, int]:
        """(its first byte, number of entries of `width` bytes); (0, 0) where it is absent."""
        if slot not in table:
            return 0, 0
        at = self.follow(table[slot])
        count = self.number(at)
        if count > most or at + 4 + count * width > self.size or (at + 4) % width:
            self.refuse(f"{what}: {count:,} entries at byte {at}", f"at most {most:,}, inside the file")
        return at + 4, count

    def numbers(self, table: Table, slot: int, kind: str, what: str, *, most: int = MAX_ITEMS) -> list[int]:
        width = struct.calcsize(f"<{kind}")
        at, count = self.vector(table, slot, width, what, most=most)
        return list(struct.unpack_from(f"<{count}{kind}", self.data, at))

    def tables(self, table: Table, slot: int, fields: str, what: str) -> list[Table]:
        at, count = self.vector(table, slot, 4, f"{what}s")
        places = range(at, at + 4 * count, 4)
        return [self.table(self.follow(place), fields, f"{what} {i}") for i, place in enumerate(places)]

    def text(self, table: Table, slot: int, what: str) -> str:
        at, count = self.vector(table, slot, 1, what, most=MAX_NAME)
        try:
            return self.data[at : at + count].decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8")


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    kind: int
    data: tuple[int, int]
    """First byte and number of bytes of its values; (0, 0): it is computed."""


def _check_model(f: _File) -> None:
    if f.data[4:8] != b"TFL3":
        f.refuse("it is no LiteRT graph", "the mark TFL3 in bytes 4 to 8")
    model = f.table(f.follow(0), schema.MODEL, "the model")
    if f.value(model, 0) != 3:
        f.refuse(f"schema version {f.value(model, 0)}", "3")
    f.text(model, 3, "the description")
    codes = [_check_code(f, code) for code in f.tables(model, 1, schema.CODE, "operator code")]
    buffers = [
        _check_buffer(f, table, i) for i, table in enumerate(f.tables(model, 4, schema.BUFFER, "buffer"))
    ]
    if not buffers or buffers[0][1]:
        f.refuse("buffer 0 is not empty", "an empty one, which tensors without values name")
    graphs = f.tables(model, 2, schema.SUBGRAPH, "subgraph")
    if len(graphs) != 1:
        f.refuse(f"{len(graphs)} subgraphs", "one: no branches, no loops, no calls")
    (graph,) = graphs
    f.text(graph, 4, "the subgraph's name")
    tensors = [
        _check_tensor(f, t, i, buffers) for i, t in enumerate(f.tables(graph, 0, schema.TENSOR, "tensor"))
    ]
    inputs, outputs = (f.numbers(graph, slot, "i", "inputs or outputs") for slot in (1, 2))
    for number in (*inputs, *outputs):
        if not 0 <= number < len(tensors):
            f.refuse(f"input or output {number}", f"a tensor, 0 to {len(tensors) - 1}")
    ready = {i for i, tensor in enumerate(tensors) if tensor.data[1]}
    if len(set(inputs)) < len(inputs) or ready & set(inputs):
        f.refuse("an input is given twice, or has values of its own")
    ready |= set(inputs)
    for place, operator in enumerate(f.tables(graph, 3, schema.OPERATOR, "operator")):
        _check_operator(f, operator, place, codes, tensors, ready)
    if missing := sorted(set(outputs) - ready):
        f.refuse(f"output {missing[0]} is never computed")
    _check_signature(f, model, inputs, outputs)


def _check_code(f: _File, code: Table) -> int:
    """The larger of the two numbers is the code, as LiteRT reads them."""
    number = max(f.value(code, 0, "b"), f.value(code, 3))
    if number not in OPERATORS:
        f.refuse(
            f"operator {number}", "arithmetic alone: no control flow, no state, nothing custom (tfliteops.py)"
        )
    return number


def _check_buffer(f: _File, buffer: Table, number: int) -> tuple[int, int]:
    if f.value(buffer, 1, "Q") or f.value(buffer, 2, "Q"):
        f.refuse(f"buffer {number} lies behind the flatbuffer", "inside it")
    at, count = f.vector(buffer, 0, 1, f"buffer {number}", most=MAX_FILE)
    if count and at % ALIGNMENT:
        f.refuse(f"buffer {number} begins at byte {at}", f"a multiple of {ALIGNMENT}")
    return at, count


def _check_tensor(f: _File, tensor: Table, number: int, buffers: list[tuple[int, int]]) -> _Tensor:
    what = f"tensor {number}"
    f.text(tensor, 3, f"the name of {what}")
    shape, kind = tuple(f.numbers(tensor, 0, "i", what, most=MAX_DIMS)), f.value(tensor, 1, "b")
    f.numbers(tensor, 7, "i", what, most=MAX_DIMS)  # the shape with -1 for sizes left free: not used here
    if kind not in BITS:
        f.refuse(f"{what} has element type {kind}", "a number type of LiteRT")
    if min(shape, default=1) < 1:
        f.refuse(f"{what} of shape {shape}", "sizes from 1")
    size = (prod(shape) * BITS[kind] + 7) // 8
    if size > MAX_BYTES:
        f.refuse(f"{what} of shape {shape} needs {size:,} bytes", f"at most {MAX_BYTES:,}")
    if f.value(tensor, 5, "b") or f.value(tensor, 10):
        f.refuse(f"{what} keeps its values from run to run, or has them elsewhere")
    place = f.value(tensor, 2, "I")
    if place >= len(buffers):
        f.refuse(f"{what} has buffer {place:,}", f"0 to {len(buffers) - 1:,}")
    if buffers[place][1] not in ((0, size) if place == 0 else (size,)):
        f.refuse(f"{what} of shape {shape} holds {buffers[place][1]:,} bytes", f"{size:,}")
    if 4 in tensor:
        _check_quantization(
            f, f.table(f.follow(tensor[4]), schema.QUANTIZATION, f"{what}'s quantization"), shape, what
        )
    return _Tensor(shape, kind, buffers[place])


def _check_quantization(f: _File, table: Table, shape: tuple[int, ...], what: str) -> None:
    for slot in (0, 1):
        f.vector(table, slot, 4, what)
    if f.value(table, 4, "b"):
        f.refuse(f"{what} is quantized in a way of its own", "scales and zero points")
    at, count = f.vector(table, 2, 4, what)
    zeros, axis = f.vector(table, 3, 8, what)[1], f.value(table, 6)
    if not count and not zeros:
        return
    if count > 1 and (not 0 <= axis < len(shape) or shape[axis] != count):
        f.refuse(f"{what} of shape {shape} has {count} scales along axis {axis}", "one for each entry")
    if zeros != count:
        f.refuse(f"{what} has {count} scales and {zeros} zero points", "as many")
    if not all(0 < scale < math.inf for scale in struct.unpack_from(f"<{count}f", f.data, at)):
        f.refuse(f"{what} has a scale that is no positive number")


def _check_operator(
    f: _File, table: Table, place: int, codes: list[int], tensors: list[_Tensor], ready: set[int]
) -> None:
    """Inputs are constants or were computed before, outputs are not: a straight line. `ready` grows."""
    code = f.value(table, 0, "I")
    if code >= len(codes):
        f.refuse(f"operator {place} has code {code}", f"0 to {len(codes) - 1}")
    name, options, fields = OPERATORS[codes[code]]
    what = f"operator {place} ({name})"
    inputs, outputs = (f.numbers(table, slot, "i", what, most=1024) for slot in (1, 2))
    for slot, number in enumerate(inputs):
        if number == -1 and OPTIONAL.get(name) == slot:
            continue
        if number not in ready:
            f.refuse(f"{what} reads tensor {number} before it is there")
        if name in SIZED and tensors[number].kind in WHOLE:
            _check_sizes(f, tensors[number], what)
    for number in outputs:
        if not 0 <= number < len(tensors) or number in ready:
            f.refuse(f"{what} writes tensor {number}", "one that nothing wrote before")
        ready.add(number)
    if not outputs or f.value(table, 9, "Q") or f.value(table, 10, "Q") or f.value(table, 11, "B"):
        f.refuse(f"{what} has no output, or options of another kind")
    kind = f.value(table, 3, "B")
    if kind not in (0, options) or (kind == 0) != (4 not in table):
        f.refuse(f"{what} has options of kind {kind}", f"{options} or none")
    if 4 in table:
        given = f.table(f.follow(table[4]), fields, f"{what}'s options")
        for slot, field in enumerate(fields):
            if field == "v":
                f.numbers(given, slot, "i", what, most=MAX_DIMS)


def _check_sizes(f: _File, tensor: _Tensor, what: str) -> None:
    at, count = tensor.data
    kind = WHOLE[tensor.kind]
    values = struct.unpack_from(f"<{count // struct.calcsize(f'<{kind}')}{kind}", f.data, at)
    if values and not 0 <= min(values) <= max(values) <= MAX_SIZE:
        f.refuse(f"{what} asks for a size of {max(values, key=abs):,}", f"0 to {MAX_SIZE:,}")


def _check_signature(f: _File, model: Table, inputs: list[int], outputs: list[int]) -> None:
    signatures = f.tables(model, 7, schema.SIGNATURE, "signature")
    if len(signatures) != 1 or f.value(signatures[0], 4):
        f.refuse(f"{len(signatures)} signatures", "one, of the one subgraph")
    f.text(signatures[0], 2, "the signature's key")
    for slot, numbers in enumerate((inputs, outputs)):
        named = f.tables(signatures[0], slot, schema.NAMED, "name")
        for each in named:
            f.text(each, 0, "a name")
        if sorted(f.value(each, 1, "I") for each in named) != sorted(numbers):
            f.refuse("the signature names other inputs or outputs than the subgraph has")

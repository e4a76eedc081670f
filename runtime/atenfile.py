"""A network as data: a list of PyTorch's own operators in JSON, and the weights beside it as safetensors.

torch.export.save writes archives that its loader unpickles in part and whose sizes it evaluates as Python, so a file of
those is a program. This one is read here, whole, by a gate that knows every operator a network may use, before torch
sees any of it. spec/bundle.md has the rules.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from .atenops import OPERATORS
from .errors import BundleError
from .plainfiles import plain_size
from .strictjson import MAX_BYTES, loads

__all__ = ["BYTES", "GRAPH", "WEIGHTS", "AtenGraph", "Node", "Stored", "check_aten", "read_aten"]

GRAPH, WEIGHTS = "aten.json", "aten.safetensors"
VERSION_KEY, VERSION = "fewstep_aten", 1

MAX_NODES = 50_000
"""The U-Net of SDXL has 5,000."""
MAX_DIMS = 32
MAX_ELEMENTS = 2**36
"""Of what one list of sizes can ask for; an activation of SDXL at 2048 x 2048 pixels has 2^31."""
BYTES = {
    **{
        "float64": 8,
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
        "int64": 8,
        "int32": 4,
        "int16": 2,
        "int8": 1,
    },
    **{"uint8": 1, "bool": 1},
}
"""Type of a tensor -> bytes of an element."""
SAFETENSORS = {
    **{
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
    },
    **{"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
"""What safetensors calls them."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,255}")
WORD = re.compile(r"[A-Za-z0-9_,.> -]{0,100}")
"""Text among arguments: "tanh", "floor", an einsum's equation."""


@dataclass(frozen=True)
class Node:
    name: str
    operator: str
    args: tuple[Any, ...]
    """JSON values; {"value": NAME} is an input or the output of an earlier node, {"weight": NAME} a weight, {"dtype":
    NAME} a type, {"device": "own"} the device it runs on, {"infinity": -1} or 1."""
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """One weight: where in the file beside the graph it lies."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    """Bytes from the start of the file."""


@dataclass(frozen=True)
class AtenGraph:
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    """(name, type, shape) of each."""
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    """Names of nodes or inputs."""
    weights: Mapping[str, Stored]


def check_aten(path: Path | str, weights: Path | str) -> None:
    """Refuse a graph that is damaged, or would make torch do what a network has no need of. Raises BundleError."""
    read_aten(path, weights)


def read_aten(path: Path | str, weights: Path | str) -> AtenGraph:
    """The checked graph. Raises BundleError naming the file and the node, input or weight."""
    path, weights = Path(path), Path(weights)
    plain_size(path)
    with open(path, "rb") as file:
        data = loads(file.read(MAX_BYTES + 1), path.name)
    gate = _Gate(path.name)
    stored = _weights(weights)
    return gate.graph(data, stored)


class _Gate:
    """Reads one graph; knows what was defined so far."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._known: set[str] = set()
        self._used: set[str] = set()
        self._stored: Mapping[str, Stored] = {}

    def refuse(self, found: str, expected: str = "") -> NoReturn:
        raise BundleError(f"{self._file}: {found}", expected=expected, fix="export the bundle again")

    def graph(self, data: Any, stored: Mapping[str, Stored]) -> AtenGraph:
        keys = {VERSION_KEY, "inputs", "nodes", "outputs"}
        if not isinstance(data, dict) or data.keys() != keys:
            self.refuse("it is no graph of fewstep's", ", ".join(sorted(keys)))
        if data[VERSION_KEY] != VERSION:
            self.refuse(f"version {str(data[VERSION_KEY])[:40]}", str(VERSION))
        for key in ("inputs", "nodes", "outputs"):
            if not isinstance(data[key], list) or not 0 < len(data[key]) <= MAX_NODES:
                self.refuse(f"{key} is no list of 1 to {MAX_NODES:,}")
        self._stored = stored
        inputs = tuple(self._input(item) for item in data["inputs"])
        nodes = tuple(self._node(item) for item in data["nodes"])
        outputs = tuple(self._name(item, "output") for item in data["outputs"])
        for name in outputs:
            if name not in self._known:
                self.refuse(f"output {name!r} is of no node")
        if unused := sorted(stored.keys() - self._used):
            self.refuse(f"weight {unused[0]!r} is read by no node")
        return AtenGraph(inputs, nodes, outputs, stored)

    def _define(self, item: Any, what: str) -> str:
        name = self._name(item, what)
        if name in self._known:
            self.refuse(f"{what} {name!r} is given twice")
        self._known.add(name)
        return name

    def _name(self, item: Any, what: str) -> str:
        if not isinstance(item, str) or not NAME.fullmatch(item):
            self.refuse(f"{what} {str(item)[:80]!r}", "letters, digits, _ and .")
        return item

    def _input(self, item: Any) -> tuple[str, str, tuple[int, ...]]:
        if not isinstance(item, list) or len(item) != 3:
            self.refuse("an input that is not [name, type, sizes]")
        name, dtype, shape = item
        name = self._define(name, "input")
        if dtype not in BYTES:
            self.refuse(f"input {name!r} is of type {str(dtype)[:40]!r}", " or ".join(BYTES))
        return name, dtype, self._shape(shape, f"input {name!r}")

    def _shape(self, shape: Any, where: str) -> tuple[int, ...]:
        whole = isinstance(shape, list) and all(type(size) is int and 0 < size < 2**31 for size in shape)
        if not whole or len(shape) > MAX_DIMS or prod(shape) > MAX_ELEMENTS:
            self.refuse(f"{where} has sizes {str(shape)[:80]}", f"at most {MAX_ELEMENTS:,} elements in all")
        return tuple(shape)

    def _node(self, item: Any) -> Node:
        if not isinstance(item, list) or len(item) != 4:
            self.refuse("a node that is not [name, operator, arguments, named arguments]")
        label, operator, args, kwargs = item
        where = f"node {str(label)[:80]!r}"
        if not isinstance(operator, str) or operator not in OPERATORS:
            self.refuse(f"{where} is {str(operator)[:80]!r}", "one of the operators of atenops.py")
        if not isinstance(args, list) or not isinstance(kwargs, dict) or len(args) + len(kwargs) > MAX_DIMS:
            self.refuse(f"{where} has no arguments that fit {operator}")
        for name in kwargs:
            self._name(name, f"{where}: named argument")
        for value in (*args, *kwargs.values()):
            self._value(value, where, 0)
        return Node(self._define(label, "node"), operator, tuple(args), kwargs)

    def _value(self, value: Any, where: str, depth: int) -> None:
        if value is None or isinstance(value, bool | float):
            return
        if isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                self.refuse(f"{where}: the number {value}", "at most 63 bits")
        elif isinstance(value, str):
            if not WORD.fullmatch(value):
                self.refuse(f"{where}: the text {value[:80]!r}", "a word, or an equation")
        elif isinstance(value, list):
            if depth > 1 or len(value) > 4096:  # a list of lists is the deepest; the longest concatenates
                self.refuse(f"{where} has a list too deep or too long")
            sizes = [abs(item) for item in value if type(item) is int and item]
            if len(sizes) > MAX_DIMS or prod(sizes) > MAX_ELEMENTS:
                self.refuse(f"{where} asks for sizes {sizes[:8]}", f"at most {MAX_ELEMENTS:,} elements")
            for item in value:
                self._value(item, where, depth + 1)
        else:
            self._reference(value, where)

    def _reference(self, value: Any, where: str) -> None:
        kind, named = next(iter(value.items())) if len(value) == 1 else ("", None)
        if kind == "value" and isinstance(named, str):
            if named not in self._known:
                self.refuse(f"{where} reads {named[:80]!r}", "an input or an earlier node")
        elif kind == "weight" and isinstance(named, str):
            if named not in self._stored:
                self.refuse(f"{where} reads the weight {named[:80]!r}, which is not there")
            self._used.add(named)
        elif not (
            (kind == "dtype" and named in BYTES)
            or (kind == "device" and named == "own")
            or (kind == "infinity" and type(named) is int and named in (-1, 1))
        ):
            self.refuse(
                f"{where} has the argument {str(value)[:80]}", "a value, a weight, a type, a number or text"
            )


def _weights(path: Path) -> dict[str, Stored]:
    """The header of a safetensors file, which must describe all of it: no hole, no overlap, nothing behind."""

    def refuse(found: str, expected: str = "") -> NoReturn:
        raise BundleError(f"{path.name}: {found}", expected=expected, fix="export the bundle again")

    size = plain_size(path)
    if size < 8:
        refuse(f"{size} bytes", "a safetensors file")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        length = int.from_bytes(data[:8], "little")
        if length > min(size - 8, MAX_BYTES):
            refuse(f"a header of {length:,} bytes in a file of {size:,}", f"at most {MAX_BYTES:,}")
        header = loads(data[8 : 8 + length], path.name)
    if not isinstance(header, dict):
        refuse("its header is no object")
    header.pop("__metadata__", None)
    found: dict[str, Stored] = {}
    for name, item in header.items():
        where = f"tensor {name[:80]!r}"
        if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
            refuse(f"{where} has not exactly dtype, shape and data_offsets")
        dtype, shape, offsets = SAFETENSORS.get(str(item["dtype"])), item["shape"], item["data_offsets"]
        if dtype is None:
            refuse(f"{where} is of type {str(item['dtype'])[:40]!r}", " or ".join(SAFETENSORS))
        if not _counts(shape, MAX_DIMS) or not _counts(offsets, 2) or len(offsets) != 2:
            refuse(f"{where} has sizes or offsets that are none")
        start, stop = offsets
        if stop - start != prod(shape) * BYTES[dtype]:
            refuse(
                f"{where} of sizes {shape} holds {stop - start:,} bytes", f"{prod(shape) * BYTES[dtype]:,}"
            )
        found[name] = Stored(dtype, tuple(shape), 8 + length + start, 8 + length + stop)
    end = 8 + length
    for stored in sorted(found.values(), key=lambda each: (each.start, each.stop)):
        if stored.start != end:
            refuse(f"its tensors overlap, or leave a hole, at byte {end:,}")
        end = stored.stop
    if end != size:
        refuse(f"its tensors end at byte {end:,}, the file at {size:,}")
    return found


def _counts(value: Sequence[Any], most: int) -> bool:
    whole = isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
    return whole and len(value) <= most

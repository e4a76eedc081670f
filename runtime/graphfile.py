"""A gate for ONNX files: what a stranger's graph must be before a native parser sees a byte of it.

Only the structure is read, through a memory map: weights are skipped, whatever their size. Each rule stands
against something measured (spec/bundle.md): a loop hangs an engine, an odd `location` crashes one, a hard link
or `..` reads files outside the bundle, a huge shape asks for memory that is not there.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path

from .errors import BundleError
from .onnxproto import (
    ATTRIBUTE,
    BITS,
    DIM,
    ENTRY,
    FIXED,
    GRAPH,
    MODEL,
    NODE,
    OPSET,
    SHAPE,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    TYPED,
    VALUE,
    Reader,
)
from .plainfiles import plain_size

__all__ = ["check_graph"]

IR_VERSIONS = range(4, 14)
"""From initializers that are no inputs (4) to the newest that ONNX Runtime 1.31 loads (13)."""
OPSETS = {"": range(7, 27), "ai.onnx": range(7, 27), "com.microsoft": range(1, 2)}
"""Operator domains and their versions: what ONNX Runtime 1.31 supports."""
FORBIDDEN_OPS = {"If", "Loop", "Scan", "SequenceMap", "EPContext"}
"""Control flow (a Loop of 2^62 turns hangs at loading), and nodes that open another file."""
MAX_FILE = 2**31 - 1
"""Protobuf cannot hold more."""
MAX_DIMS = 32


@dataclass
class _File:
    """The mapped file, and what is known of the data file beside it."""

    path: Path
    wire: Reader
    beside: set[str]
    external: dict[str, int] = field(default_factory=dict)
    """Data file -> its size, once a tensor has named it."""
    ranges: list[tuple[int, int, str]] = field(default_factory=list)
    """(start, end, tensor) in the data file."""


def check_graph(path: Path | str, data_files: set[str]) -> None:
    """Refuse an ONNX file that is damaged, or would make an engine read, compute or allocate what it must not.

    data_files  names of the files beside it that may hold its external data; a graph uses one of them at most
    Reads structure only: time grows with the number of nodes and tensors, not with the weights.
    Raises BundleError naming the file and the node or tensor.
    """
    path = Path(path)
    size = plain_size(path)
    if not 0 < size <= MAX_FILE:
        raise BundleError(
            f"{path.name}: {size:,} bytes",
            expected=f"1 to {MAX_FILE:,}",
            fix="download it again" if not size else "export the weights as external data",
        )
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for start, what, fix in (
            (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "git lfs pull"),
            (b"<", "is a web page, not a graph", "download it again"),
        ):
            if data[: len(start)] == start:
                raise BundleError(f"{path.name} {what}", fix=fix)
        _check_model(_File(path, Reader(path.name, data), data_files))


def _check_model(f: _File) -> None:
    ir_version, graph = 0, None
    opsets: dict[str, int] = {}
    for name, a, b in f.wire.fields(0, len(f.wire.data), MODEL):
        if name == "ir_version":
            ir_version = a
        elif name == "graph":
            graph = (a, b)
        elif name == "opset_import":
            domain, version = "", 0
            for key, start, end in f.wire.fields(a, b, OPSET):
                if key == "domain":
                    domain = f.wire.text(start, end)
                else:
                    version = start
            if domain in opsets:
                f.wire.refuse(f"operator set {domain!r} is imported twice")
            opsets[domain] = version
        elif name in ("functions", "training_info", "configuration"):
            f.wire.refuse(f"the model holds {name}", "one graph of operators")
    if ir_version not in IR_VERSIONS:
        f.wire.refuse(f"IR version {ir_version}", f"{IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
    for domain, version in opsets.items():
        if domain in OPSETS and version not in OPSETS[domain]:
            known = OPSETS[domain]
            f.wire.refuse(f"operator set {domain or 'ai.onnx'} {version}", f"{known[0]} to {known[-1]}")
    if graph is None:
        f.wire.refuse("it has no graph")
    _check_main(f, *graph, opsets)
    _check_overlaps(f)


def _check_main(f: _File, start: int, end: int, opsets: Mapping[str, int]) -> None:
    names: set[str] = set()
    for name, a, b in f.wire.fields(start, end, GRAPH):
        if name == "node":
            _check_node(f, a, b, opsets)
        elif name == "initializer":
            tensor = _check_tensor(f, a, b, "")
            if tensor in names:
                f.wire.refuse(f"tensor {tensor!r} is given twice")
            names.add(tensor)
        elif name == "value":
            _check_value(f, a, b)
        elif name == "sparse":
            f.wire.refuse("a sparse tensor", "dense tensors")


def _check_node(f: _File, start: int, end: int, opsets: Mapping[str, int]) -> None:
    label = op = domain = ""
    attributes = []
    for name, a, b in f.wire.fields(start, end, NODE):
        if name == "attribute":
            attributes.append((a, b))
        elif name == "op_type":
            op = f.wire.text(a, b)
        elif name == "domain":
            domain = f.wire.text(a, b)
        elif name == "name":
            label = f.wire.text(a, b)
        elif name in ("input", "output"):
            f.wire.text(a, b)  # UTF-8, or ONNX Runtime's own error about it cannot be decoded
        elif name == "overload" and b > a:
            f.wire.refuse(f"node {label[:80]!r} calls a function")
    where = f"node {label[:80]!r} ({op[:80]})"
    if domain not in OPSETS:
        f.wire.refuse(f"{where} is of the operator set {domain[:80]!r}", "ai.onnx or com.microsoft")
    if domain not in opsets and not (domain in ("", "ai.onnx") and ("" in opsets or "ai.onnx" in opsets)):
        f.wire.refuse(f"{where}: its operator set {domain or 'ai.onnx'} is not imported")
    if op in FORBIDDEN_OPS:
        f.wire.refuse(where, "no control flow and no embedded engine contexts")
    for a, b in attributes:
        for name, start, end in f.wire.fields(a, b, ATTRIBUTE):
            if name == "name":
                f.wire.text(start, end)
            elif name == "tensor":
                _check_tensor(f, start, end, where)
            elif name in ("graph", "sparse", "type_proto", "reference"):
                f.wire.refuse(
                    f"{where} has an attribute that holds a {name}", "numbers, text and dense tensors"
                )


def _check_value(f: _File, start: int, end: int) -> None:
    """An input, output or intermediate value: a tensor whose fixed sizes an engine could allocate."""
    label, kind = "", None
    for name, a, b in f.wire.fields(start, end, VALUE):
        if name == "name":
            label = f.wire.text(a, b)
        elif name == "type":
            kind = (a, b)
    where = f"value {label[:80]!r}"
    if kind is None:
        return
    for name, a, b in f.wire.fields(*kind, TYPE):
        if name != "tensor":
            continue
        for key, start, end in f.wire.fields(a, b, TENSOR_TYPE):
            if key == "shape":
                dims = [
                    value
                    for _, dim, stop in f.wire.fields(start, end, SHAPE)
                    for what, value, _ in f.wire.fields(dim, stop, DIM)
                    if what == "value"
                ]
                _check_dims(f, dims, 8, where)


def _check_dims(f: _File, dims: list[int], bits: int, where: str) -> int:
    """Bytes of a tensor, computed in whole numbers of any size; refuses what no memory holds."""
    if len(dims) > MAX_DIMS:
        f.wire.refuse(f"{where} has {len(dims):,} dimensions", f"at most {MAX_DIMS}")
    if any(size >= 2**63 for size in dims):
        f.wire.refuse(f"{where} has a negative size", "0 or more")
    size = (prod(dims) * bits + 7) // 8
    if size > 2**40:
        f.wire.refuse(f"{where} of shape {dims} needs {size:,} bytes", f"at most {2**40:,}")
    return size


def _check_tensor(f: _File, start: int, end: int, where: str) -> str:
    """One tensor with its values, inline or in the data file. Returns its name."""
    label, kind, location = "", 0, 0
    dims: list[int] = []
    raw: int | None = None
    typed: dict[str, int] = {}
    external: dict[str, str] = {}
    for name, a, b in f.wire.fields(start, end, TENSOR):
        if name == "dims":
            dims += f.wire.numbers(a, b) if b >= 0 else [a]
        elif name == "data_type":
            kind = a
        elif name == "name":
            label = f.wire.text(a, b)
        elif name == "data_location":
            location = a
        elif name == "raw_data":
            raw = b - a
        elif name == "external_data":
            entry = {key: f.wire.text(s, e) for key, s, e in f.wire.fields(a, b, ENTRY)}
            if entry.get("key") in external:
                f.wire.refuse(f"tensor {label[:80]!r}: external data key {entry.get('key')!r} is given twice")
            external[entry.get("key", "")] = entry.get("value", "")
        elif name.endswith("_data"):
            typed[name] = typed.get(name, 0) + _count(f, name, a, b)
    where = f"tensor {label[:80]!r}" + (f" of {where}" if where else "")
    if kind not in BITS:
        f.wire.refuse(f"{where} has element type {kind}", "a number type of ONNX")
    size = _check_dims(f, dims, BITS[kind], where)
    if location not in (0, 1):
        f.wire.refuse(f"{where} has data location {location}", "0 (here) or 1 (in the data file)")
    if location == 1:
        if raw is not None or typed:
            f.wire.refuse(f"{where} has its values here and in a data file", "one place")
        _check_external(f, external, size, where)
    elif external:
        f.wire.refuse(f"{where} names a data file without using it")
    elif raw is not None:
        if typed or raw != size:
            f.wire.refuse(f"{where} of shape {dims} holds {raw:,} bytes", f"{size:,}")
    else:
        # int32_data holds one element an entry, or as many 4- and 2-bit ones as fill a byte
        entries = size if BITS[kind] < 8 else prod(dims)
        expected = {TYPED.get(kind, "int32_data"): entries} if entries else {}
        if {name: n for name, n in typed.items() if n} != expected:
            found = ", ".join(f"{n:,} in {name}" for name, n in typed.items()) or "no values"
            f.wire.refuse(f"{where} of shape {dims} holds {found}", f"{entries:,} values")
    return label


def _count(f: _File, name: str, a: int, b: int) -> int:
    """Values of a typed list; varints end at the byte below 0x80."""
    if b < 0:
        return 1
    if width := FIXED.get(name):
        if (b - a) % width:
            f.wire.refuse(f"{name} at byte {a} ends inside a value")
        return (b - a) // width
    upper = bytes(range(0x80, 0x100))
    return sum(len(f.wire.data[i : min(i + 65536, b)].translate(None, upper)) for i in range(a, b, 65536))


def _check_external(f: _File, external: Mapping[str, str], size: int, where: str) -> None:
    """The values lie in the one data file beside the graph, inside it, and are as long as the shape says."""
    name = external.get("location", "")
    if name not in f.beside or not re.fullmatch(r"[^/\\*:]+", name) or name in (".", ".."):
        f.wire.refuse(
            f"{where} lies in {name[:80]!r}",
            f"a data file of the bundle beside the graph: {sorted(f.beside)}",
        )
    if unknown := sorted(external.keys() - {"location", "offset", "length", "checksum"}):
        f.wire.refuse(f"{where}: unknown external data key {unknown[0][:80]!r}")
    if name not in f.external:
        if f.external:
            f.wire.refuse(f"{where} lies in {name!r}", f"one data file for all: {next(iter(f.external))!r}")
        f.external[name] = plain_size(f.path.with_name(name))
    offset, length = external.get("offset", "0"), external.get("length", "")
    if not all(re.fullmatch("[0-9]{1,19}", number) for number in (offset, length)):
        f.wire.refuse(f"{where}: offset {offset[:40]!r}, length {length[:40]!r}", "whole numbers")
    if int(length) != size:
        f.wire.refuse(f"{where}: {int(length):,} bytes of external data", f"{size:,} for its shape")
    start, stop = int(offset), int(offset) + size
    if stop > f.external[name]:
        f.wire.refuse(f"{where} ends at byte {stop:,} of {name}", f"at most {f.external[name]:,}, its size")
    if size:
        f.ranges.append((start, stop, where))


def _check_overlaps(f: _File) -> None:
    """Two tensors may share their bytes entirely (tied weights) but not in part."""
    ranges = sorted(f.ranges)
    for (start, stop, one), (next_start, next_stop, other) in pairwise(ranges):
        if next_start < stop and (next_start, next_stop) != (start, stop):
            f.wire.refuse(f"{one} and {other} overlap in the data file", "separate or identical ranges")

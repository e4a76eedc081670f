"""Run a Core ML package where there is no Core ML: reload what was written and evaluate its MIL program with torch.

Core ML predicts on macOS alone. What can be proven elsewhere is that the package on the disk (its graph, its constants,
its compressed weights) computes what the network did. coremltools reads the package back and evaluates whatever
operator mil_ops.py lacks by its own `value_inference`. A tensor the program declares as half precision is rounded to it
after every operator; how a device accumulates inside of one, and where it places it, is not known here.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import library, torch
from ..runtime.coremlcalls import Call, chained, fitted
from ..runtime.coremlfile import check_packages, packages_of
from ..runtime.errors import BundleError
from ..runtime.manifest import PartSpec
from .mil_ops import MOVES, OPS

__all__ = ["MilSession", "coremltools", "open_session", "silent"]

Array = NDArray[Any]


@contextmanager
def silent() -> Iterator[None]:
    """Inside, coremltools neither logs that it was not tested with this torch, nor warns, nor draws progress bars."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def coremltools(name: str = "coremltools") -> Any:
    """coremltools, or a module of it, imported without its remarks. Raises MissingExtra."""
    with silent():
        return library(name)


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> MilSession:
    """A session over the package whose Manifest.json `path` is, and the chunks beside it.

    threads  torch's own number counts; taken so that it opens like a backend
    Raises BundleError for a package the gate refuses or coremltools cannot read.
    """
    check_packages(path)
    return MilSession(path, spec)


class MilSession:
    """A Core ML package evaluated by torch on this host's processor: converted, not executed by Core ML."""

    def __init__(self, path: Path, spec: PartSpec) -> None:
        programs = [_read(package) for package in packages_of(path)]
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._call: Call | None = chained([program.call for program in programs])
        self._inputs = {name: shape for p in reversed(programs) for name, shape in p.inputs.items()}
        wanted = {tensor.name for tensor in spec.inputs}
        self._inputs = {name: shape for name, shape in self._inputs.items() if name in wanted}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        assert self._call is not None, "this session is closed"
        return fitted(self._call, self._inputs, feeds, outputs or self._outputs)

    def close(self) -> None:
        self._call = None


@dataclass(frozen=True)
class _Step:
    """One operator: what it computes, of which values, into which."""

    run: Callable[..., Any]
    inputs: tuple[Any, ...]
    """Names of values, or tuples of them."""
    outputs: tuple[str, ...]
    halves: tuple[bool, ...]
    """Whether an output is to be rounded."""
    last: tuple[str, ...]
    """Values nobody needs afterwards."""


@dataclass(frozen=True)
class _Program:
    steps: tuple[_Step, ...]
    constants: Mapping[str, Any]
    """Value -> torch tensor; floats in float32, whatever they are stored as."""
    inputs: Mapping[str, tuple[int, ...]]
    halves: frozenset[str]
    """Inputs that the program takes in half precision."""
    outputs: Mapping[str, str]
    """Output -> the value it is."""

    def call(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        th = torch()
        values = dict(self.constants)
        with th.no_grad():
            for name in self.inputs:
                value = th.from_numpy(np.ascontiguousarray(feeds[name]))
                value = value.float() if value.is_floating_point() else value.long()
                values[name] = _rounded(value) if name in self.halves else value
            for step in self.steps:
                given = (
                    [values[n] for n in name] if isinstance(name, tuple) else values[name]
                    for name in step.inputs
                )
                result = step.run(*given)
                every = result if isinstance(result, tuple) else (result,)
                for name, half, value in zip(step.outputs, step.halves, every, strict=True):
                    values[name] = _rounded(value) if half and value.is_floating_point() else value
                for name in step.last:
                    del values[name]
            return {name: values[inner].numpy() for name, inner in self.outputs.items()}


def _rounded(value: Any) -> Any:
    return value.half().float()


def _read(package: Path) -> _Program:
    """The package as steps of torch; every compressed weight is unpacked once."""
    ct = coremltools()
    load = coremltools("coremltools.converters.mil.frontend.milproto.load").load
    with silent():
        try:
            spec = ct.models.utils.load_spec(str(package))
            weights = package / "Data" / "com.apple.CoreML" / "weights"
            program = load(spec, spec.specificationVersion, str(weights))
        except Exception as error:  # protobuf's, its own assertions, KeyError
            raise BundleError(
                f"{package.name}: coremltools {ct.__version__} cannot read it ({str(error).splitlines()[0][:200]})",
                fix="export the bundle again, or update coremltools",
            ) from error
        return _steps(program, spec.description.defaultFunctionName or "main")


def _steps(program: Any, function: str) -> _Program:
    types = coremltools("coremltools.converters.mil.mil.types")
    main = program.functions[function]
    constants: dict[str, Any] = {}
    written: list[tuple[Any, tuple[Any, ...], Callable[..., Any]]] = []
    for op in main.operations:
        if op.op_type == "const":
            continue
        if op.op_type.startswith("constexpr_"):
            constants[op.outputs[0].name] = _unpacked(op)
            continue
        names, static = _parameters(op)
        written.append((op, names, OPS[op.op_type][1](static) if op.op_type in OPS else _inferred(op)))
        for var in _flat(tuple(v for v in op.inputs.values() if v is not None)):
            if var.op is not None and var.op.op_type == "const" and var.name in _flat(names):
                constants.setdefault(var.name, _tensor(var.val))
    outputs = {var.name: var.name for var in main.outputs}
    uses: dict[str, int] = {}
    for number, (op, names, _) in enumerate(written):
        for name in (*_flat(names), *(var.name for var in op.outputs)):
            uses[name] = number
    for name in (*constants, *outputs):
        uses.pop(name, None)
    dies: dict[int, list[str]] = {}
    for name, number in uses.items():
        dies.setdefault(number, []).append(name)
    steps = tuple(
        _Step(
            run,
            names,
            tuple(var.name for var in op.outputs),
            tuple(op.op_type not in MOVES and var.dtype == types.fp16 for var in op.outputs),
            tuple(dies.get(number, ())),
        )
        for number, (op, names, run) in enumerate(written)
    )
    shapes = {name: tuple(int(size) for size in var.shape) for name, var in main.inputs.items()}
    halves = frozenset(name for name, var in main.inputs.items() if var.dtype == types.fp16)
    return _Program(steps, constants, shapes, halves, outputs)


def _flat(names: tuple[Any, ...]) -> list[Any]:
    return [inner for name in names for inner in (name if isinstance(name, tuple | list) else (name,))]


def _parameters(op: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Names of the values an operator computes with, in the order of OPS, and its constant parameters."""
    given = {name: var for name, var in op.inputs.items() if var is not None}
    if op.op_type not in OPS:
        tensors = tuple(
            name for name, var in given.items() if isinstance(var, tuple | list) or var.val is None
        )
    else:
        tensors = OPS[op.op_type][0]
    names: list[Any] = []
    for place, name in enumerate(tensors):
        if name not in given:
            assert not any(later in given for later in tensors[place:]), f"{op.op_type} lacks {name}"
            break
        var = given.pop(name)
        names.append(tuple(v.name for v in var) if isinstance(var, tuple | list) else var.name)
    return tuple(names), {name: var.val for name, var in given.items() if not isinstance(var, tuple | list)}


def _tensor(value: Any) -> Any:
    """A constant as torch holds it here: floats in float32, whole numbers in int64."""
    array = np.asarray(value)
    kind = np.float32 if array.dtype.kind == "f" else np.bool_ if array.dtype.kind == "b" else np.int64
    array = np.ascontiguousarray(array, dtype=kind)
    return torch().from_numpy(array if array.flags.writeable else array.copy())


def _unpacked(op: Any) -> Any:
    """The floats that a compressed weight means, rounded as the program declares them."""
    if (
        op.op_type == "constexpr_lut_to_dense"
        and op.lut.rank == op.indices.rank + 2
        and op.lut.shape[-1] == 1
    ):
        indices, tables = np.asarray(op.indices.val), np.asarray(op.lut.val)
        grouped = [axis for axis in range(indices.ndim) if tables.shape[axis] > 1]
        if len(grouped) <= 1:
            axis = grouped[0] if grouped else 0
            count = tables.shape[axis]
            parts = np.split(indices, count, axis)
            flat = tables.reshape(count, -1).astype(np.float32)
            return _tensor(np.concatenate([flat[i][part] for i, part in enumerate(parts)], axis))
    if op.op_type == "constexpr_blockwise_shift_scale" and op.data.val is not None:
        data, scale = np.asarray(op.data.val).astype(np.float32), np.asarray(op.scale.val)
        split = [
            n for size, count in zip(data.shape, scale.shape, strict=True) for n in (count, size // count)
        ]
        single = [n for count in scale.shape for n in (count, 1)]
        blocks = data.reshape(split)
        if op.offset is not None:
            blocks = blocks - np.asarray(op.offset.val).astype(np.float32).reshape(single)
        found = (blocks * scale.astype(np.float32).reshape(single)).astype(scale.dtype)
        return _tensor(found.reshape(data.shape))
    return _tensor(op.materialized_val_inference())


def _inferred(op: Any) -> Callable[..., Any]:
    """An operator by coremltools' own evaluation."""
    names = [
        name
        for name, var in op.inputs.items()
        if var is not None and (isinstance(var, tuple | list) or var.val is None)
    ]

    def run(*tensors: Any) -> Any:
        for name, value in zip(names, tensors, strict=True):
            for var, tensor in zip(
                op.inputs[name] if isinstance(op.inputs[name], tuple | list) else (op.inputs[name],),
                value if isinstance(value, list) else (value,),
                strict=True,
            ):
                var._sym_val = _Known(tensor.numpy())
        found = op.value_inference()
        if found is None:
            raise BundleError(
                f"{op.name}: operator {op.op_type} cannot be evaluated here",
                expected=f"one of {', '.join(sorted(OPS))}",
                fix="report it with the model's configuration",
            )
        every = found if isinstance(found, tuple | list) and len(op.outputs) > 1 else (found,)
        return tuple(_tensor(value) for value in every)

    return run


class _Known:
    """What coremltools keeps a known value in."""

    def __init__(self, val: Array) -> None:
        self.val = val

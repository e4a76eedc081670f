"""LiteRT: a .tflite graph on the CPU, through its XNNPACK kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from ..errors import BadInput, BundleError
from ..manifest import PartSpec, TensorSpec

__all__ = ["LiteRtSession", "library_version", "open_session", "runs_in", "silent"]

Array = NDArray[Any]


def library_version() -> str:
    return version("ai-edge-litert")


def runs_in(spec: PartSpec) -> str | None:
    """Its CPU kernels compute in float32, layers of integer weights and rounded inputs apart."""
    return "float32" if spec.device == "cpu" else None


class LiteRtSession:
    """A graph loaded by LiteRT's interpreter. All its sizes are fixed; one run at a time."""

    def __init__(
        self, name: str, interpreter: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
    ) -> None:
        """inputs, outputs  name -> what the interpreter says of that tensor"""
        self._name, self._interpreter, self._inputs, self._outputs = name, interpreter, inputs, outputs

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Whole numbers of 64 bits are taken where the graph has 32. Raises BadInput for another shape."""
        assert self._interpreter is not None, "this session is closed"
        for name, about in self._inputs.items():
            array = np.ascontiguousarray(feeds[name], about["dtype"])
            if array.shape != tuple(about["shape"]):
                raise BadInput(
                    f"{self._name}: {name} of shape {array.shape}",
                    expected=f"{tuple(int(size) for size in about['shape'])}: the sizes of a LiteRT graph are fixed",
                )
            self._interpreter.set_tensor(about["index"], array)
        self._interpreter.invoke()
        return {
            name: self._interpreter.get_tensor(self._outputs[name]["index"])
            for name in outputs or list(self._outputs)
        }

    def close(self) -> None:
        self._interpreter = None


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> LiteRtSession:
    """Map a .tflite file and lay out its weights as the kernels want them."""
    if runs_in(spec) is None:
        raise BadInput(
            f"{path.name} is for a {spec.device}", expected="cpu, which LiteRT runs graphs on here"
        )
    if path.suffix != ".tflite":  # the bundle's gate reads what has that name, and nothing else
        raise BundleError(
            f"{path.name} is no LiteRT graph", expected="a .tflite file", fix="export the bundle again"
        )
    try:
        with silent():
            interpreter = Interpreter(model_path=str(path), num_threads=threads or os.cpu_count() or 1)
            interpreter.allocate_tensors()
    except Exception as error:  # RuntimeError, ValueError and MemoryError, straight from pybind
        reason = " ".join(str(error).split())[-200:]
        raise BundleError(
            f"{path.name}: LiteRT {library_version()} cannot load it ({reason})",
            fix="export the bundle again, or update ai-edge-litert",
        ) from None
    inputs = {str(tensor["name"]): tensor for tensor in interpreter.get_input_details()}
    outputs = {str(tensor["name"]): tensor for tensor in interpreter.get_output_details()}
    _check(path, inputs, spec.inputs)
    _check(path, outputs, spec.outputs)
    return LiteRtSession(path.name, interpreter, inputs, outputs)


def _check(path: Path, found: Mapping[str, Any], expected: Sequence[TensorSpec]) -> None:
    """Names, types and shapes of inputs or outputs are those of the manifest."""
    got = {
        name: (np.dtype(about["dtype"]).name, tuple(map(int, about["shape"])))
        for name, about in found.items()
    }
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in expected}
    if got != wanted:
        raise BundleError(f"{path.name} has {got}", expected=f"{wanted}", fix="export the bundle again")


_SILENT = Lock()


@contextmanager
def silent() -> Iterator[None]:
    """Inside, nothing reaches standard error: the library writes there that it made an XNNPACK delegate, its converter
    how many operations it counted, and neither has a setting for it. What goes wrong they raise as well.
    """
    with _SILENT:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

"""Engines: one module a library, named for it, imported only when a graph asks for it.

A backend module offers `open_session(path, spec, *, threads=None) -> Session`, `library_version() -> str` and
`runs_in(spec) -> str | None`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast

from numpy.typing import NDArray

from ..errors import BadInput, MissingExtra
from ..manifest import PartSpec

__all__ = ["ENGINES", "Engine", "Opener", "Session", "open_session", "require", "runs_in"]


@dataclass(frozen=True)
class Engine:
    library: str
    """What its backend imports."""
    extra: str
    """The extra of fewstep that installs it."""


ENGINES = {
    "onnxruntime": Engine("onnxruntime", "onnx"),
    "openvino": Engine("openvino", "openvino"),
    "coreml": Engine("coremltools", "coreml"),
    "litert": Engine("ai_edge_litert", "litert"),
    "qnn": Engine("onnxruntime_qnn", "qnn"),
    "tensorrt": Engine("tensorrt", "tensorrt"),
    "aoti": Engine("torch", "export"),
}
"""What a manifest and a target may name. Adding an engine is a module beside this one and a line here."""


class Session(Protocol):
    """One loaded graph on one engine: named arrays in, named arrays out."""

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Run the graph once. `outputs` picks some of the outputs; None means all."""
        ...

    def close(self) -> None:
        """Free the weights. The session cannot run afterwards; closing twice is fine."""
        ...


Opener: TypeAlias = Callable[[Path, PartSpec], Session]
"""What opens a graph in the place of `open_session`: something else that runs the same file."""


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> Session:
    """Load one graph on the engine its spec names.

    threads  cores for one run; None lets the engine take all of them
    Raises BadInput for an engine this version does not know, MissingExtra where its library is not installed.
    """
    return cast(Session, _backend(spec.engine).open_session(path, spec, threads=threads))


def runs_in(spec: PartSpec) -> str | None:
    """The precision this host computes the part in: the spec's, or float32 where the device lacks that.

    None where this host has no such device. Raises as `open_session` does for the engine.
    """
    return cast("str | None", _backend(spec.engine).runs_in(spec))


def require(engine: str) -> None:
    """Raise what `open_session` would for an engine that is not there, before any work for it."""
    _backend(engine)


def _backend(engine: str) -> Any:
    if engine not in ENGINES:
        raise BadInput(f"engine {engine!r}", expected=f"one of {', '.join(sorted(ENGINES))}")
    library = ENGINES[engine].library
    try:
        return import_module(f".{engine}", __package__)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise MissingExtra.of(library, ENGINES[engine].extra) from None

"""One module of this folder an engine: what it lowers a part to, and how a host without the device runs that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from ..model.model import Part
from ..runtime.backends import Opener, open_session
from ..runtime.errors import BadInput
from ..runtime.manifest import PartSpec
from ..targets import Target

if TYPE_CHECKING:
    from .onnx import Traced

__all__ = ["MODULES", "Format", "Here", "check_fixed", "format_of"]

MODULES: Mapping[str, str] = {
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "coreml": "coreml",
    "litert": "litert",
    "qnn": "qnn",
    "tensorrt": "tensorrt",
    "aoti": "aoti",
}
"""Engine -> the module beside this one that writes for it."""


@dataclass(frozen=True)
class Here:
    """How this host runs a lowered part."""

    spec: PartSpec
    """The part's, or what the stand-in takes in its place: another engine, another device."""
    precision: str
    """What that computes in."""
    how: str = "converted"
    """As PartSpec.executed: device, emulated or converted."""
    opener: Opener = open_session
    """A function of a module: it may be called in a process of its own."""


class Format(Protocol):
    """What each of MODULES offers."""

    def lower(self, traced: Traced, folder: Path, target: Target) -> PartSpec:
        """Write the part's graph into `folder`; the same part gives the same bytes."""
        ...

    def stand_in(self, spec: PartSpec, target: Target) -> Here:
        """How a host that is no such device runs the very graph that `lower` wrote."""
        ...


def check_fixed(part: Part, expected: str) -> None:
    """Raises BadInput, saying what was expected and why, for a part that leaves sizes free."""
    free = {axis for spec in (*part.inputs, *part.outputs) for axis in spec.shape if isinstance(axis, str)}
    if free:
        raise BadInput(
            f"{part.name} leaves {', '.join(sorted(free))} free",
            expected=expected,
            fix="dynamic_shapes = false under [limits] of the target",
        )


def format_of(engine: str) -> Format:
    return cast(Format, import_module(f".{MODULES[engine]}", __package__))

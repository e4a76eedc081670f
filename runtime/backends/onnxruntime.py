"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
from numpy.typing import NDArray

from ..errors import BundleError
from ..manifest import PartSpec


def library_version() -> str:
    return str(onnxruntime.__version__)


def runs_in(spec: PartSpec) -> str | None:
    """The graph's own types decide, on every host alike."""
    return spec.precision if spec.device == "cpu" else None


class OnnxRuntimeSession:
    """A graph loaded by ONNX Runtime."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session: onnxruntime.InferenceSession | None = session

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        assert self._session is not None, "this session is closed"
        names = list(outputs) if outputs else [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def close(self) -> None:
        self._session = None


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> OnnxRuntimeSession:
    if path.suffix != ".onnx":  # it would take .ort too, which the bundle's gate does not read
        raise BundleError(
            f"{path.name} is no ONNX file", expected="an .onnx file", fix="export the bundle again"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = (
        3  # errors only: its warnings are about graphs, not about anything a user did
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it raises a dozen unrelated types, some of them straight from pybind
        raise BundleError(
            f"{path.name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({str(error).splitlines()[0]})",
            fix="export the bundle again, or update onnxruntime",
        ) from None
    return OnnxRuntimeSession(session)

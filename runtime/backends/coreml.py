"""Core ML on a Mac, through coremltools: the Neural Engine, the GPU or the CPU.

Core ML predicts on macOS alone, so elsewhere `runs_in` says that there is no such device, whatever coremltools is able
to read. Nothing in this project has executed this module on a Mac: its tests put a double in the place of MLModel.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_log = logging.getLogger("coremltools")
_level = _log.level
_log.setLevel(
    logging.ERROR
)  # on import it says what it was not tested with, and off macOS that Core ML is not there
import coremltools  # noqa: E402

_log.setLevel(_level)

from ..coremlcalls import Call, chained, fitted  # noqa: E402
from ..coremlfile import check_packages, packages_of  # noqa: E402
from ..errors import BadInput, BundleError  # noqa: E402
from ..manifest import PartSpec  # noqa: E402

__all__ = ["CoreMlSession", "library_version", "open_session", "runs_in"]

Array = NDArray[Any]

UNITS = {"npu": "CPU_AND_NE", "gpu": "CPU_AND_GPU", "cpu": "CPU_ONLY"}
"""Device -> coremltools.ComputeUnit: what Core ML may place operators on; what fits nowhere else runs on the CPU."""
TYPES = {65568: np.float32, 65552: np.float16, 131104: np.int32}
"""ArrayFeatureType.ArrayDataType of FeatureTypes.proto -> numpy's."""


def library_version() -> str:
    return str(coremltools.__version__)


def runs_in(spec: PartSpec) -> str | None:
    """The precision its program declares: Core ML keeps to it. None off macOS, and for a Neural Engine on Intel's."""
    if platform.system() != "Darwin" or (spec.device == "npu" and platform.machine() != "arm64"):
        return None
    return spec.precision


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> CoreMlSession:
    """Compile and load the package whose Manifest.json `path` is, and the chunks beside it.

    threads  Core ML takes what it wants; given for the same call on every engine
    """
    if runs_in(spec) is None:
        raise BadInput(
            f"Core ML has no {spec.device} on {platform.system()} {platform.machine()}",
            expected="macOS, on Apple silicon for the Neural Engine",
            fix="run the bundle there, or export for a target of this host (fewstep targets)",
        )
    check_packages(path)
    units = getattr(coremltools.ComputeUnit, UNITS[spec.device])
    models = []
    for package in packages_of(path):
        try:
            models.append(coremltools.models.MLModel(str(package), compute_units=units))
        except Exception as error:  # RuntimeError with Core ML's own words, or protobuf's
            raise BundleError(
                f"{package.name}: Core ML cannot load it ({(str(error).splitlines() or [''])[0][:200]})",
                fix="export the bundle again, or update macOS: packages are for macOS 15 and later",
            ) from None
    return CoreMlSession(models, spec)


class CoreMlSession:
    """Packages loaded by Core ML, which run one after the other."""

    def __init__(self, models: Sequence[Any], spec: PartSpec) -> None:
        wanted = {tensor.name for tensor in spec.inputs}
        shapes: dict[str, tuple[int, ...]] = {}
        for model in models:
            shapes |= {name: shape for name, (shape, _) in _inputs(model).items() if name in wanted}
        self._shapes = shapes
        self._outputs = [tensor.name for tensor in spec.outputs]
        self._call: Call | None = chained([_predict(model) for model in models])

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        assert self._call is not None, "this session is closed"
        return fitted(self._call, self._shapes, feeds, outputs or self._outputs)

    def close(self) -> None:
        self._call = None


def _inputs(model: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Input -> its shape and type, as the package declares them."""
    arrays = {item.name: item.type.multiArrayType for item in model.get_spec().description.input}
    return {
        name: (tuple(int(n) for n in array.shape), TYPES[array.dataType]) for name, array in arrays.items()
    }


def _predict(model: Any) -> Call:
    inputs = _inputs(model)

    def call(feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {name: np.ascontiguousarray(feeds[name], dtype=kind) for name, (_, kind) in inputs.items()}
        return {name: np.asarray(value) for name, value in model.predict(given).items()}

    return call

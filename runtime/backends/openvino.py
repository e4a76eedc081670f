"""OpenVINO: the CPU of any machine, and the GPU and NPU of Intel's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import openvino
from numpy.typing import NDArray
from openvino.passes import ConstantFolding, Manager

from ..errors import BadInput, BundleError
from ..manifest import PartSpec, TensorSpec

__all__ = ["OpenVinoSession", "devices", "library_version", "open_session", "runs_in"]

HINTS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
CAPABILITIES = {"float16": "FP16", "bfloat16": "BF16"}
"""Precision -> what OpenVINO calls it when it lists what a device computes in; all compute in float32."""

LARGE_BYTES = 512 << 20
"""Weights above this are compiled once at a time: for every compiled graph the engine lays them out anew."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def library_version() -> str:
    return str(openvino.__version__).partition("-")[0]


@cache
def _core() -> Any:
    return openvino.Core()


def devices() -> list[str]:
    """The devices OpenVINO finds on this host, in its own names: CPU, GPU, NPU, GPU.1."""
    return list(_core().available_devices)


def runs_in(spec: PartSpec) -> str | None:
    """The precision this host computes the part in: the spec's where the device has it, else float32."""
    device = spec.device.upper()
    if device not in {name.partition(".")[0] for name in devices()}:
        return None
    needed = CAPABILITIES.get(spec.precision)
    able = needed in _core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    return spec.precision if able else "float32"


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> OpenVinoSession:
    """Read an IR; it is compiled at the first run, when the sizes are known."""
    device, precision = spec.device.upper(), runs_in(spec)
    if precision is None:
        raise BadInput(
            f"OpenVINO finds no {device} on this host, only {', '.join(devices())}",
            fix="install the device's driver, or export for another target (fewstep targets)",
        )
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if device != "NPU":  # which computes in float16, and knows no such hint
        properties["INFERENCE_PRECISION_HINT"] = HINTS[precision]
    if device == "CPU":
        # pinned threads wait for their core while another is free: 20 times slower beside other programs' threads
        properties["ENABLE_CPU_PINNING"] = False
        if threads is not None:
            properties["INFERENCE_NUM_THREADS"] = threads
    weights = path.with_suffix(".bin")
    if path.suffix != ".xml":  # the engine would guess at the format, and the bundle's gate knows this one
        raise BundleError(
            f"{path.name} is no OpenVINO IR", expected="an .xml file", fix="export the bundle again"
        )
    try:
        # both files by name: the engine looks for neither, and maps the weights instead of reading them
        model = _core().read_model(str(path), str(weights))
    except Exception as error:
        raise _cannot("read", path, error) from None
    _check(path, model.inputs, spec.inputs)
    _check(path, model.outputs, spec.outputs)
    _unpack(model)
    return OpenVinoSession(path, model, device, properties, large=weights.stat().st_size > LARGE_BYTES)


class OpenVinoSession:
    """A graph read by OpenVINO.

    With sizes left free the engine takes 1.3 times as long on a small network (benchmarks/x86.py), so the graph is
    compiled for the sizes of the first run. A run at other sizes compiles it once more, with all sizes free.
    """

    def __init__(
        self, path: Path, model: Any, device: str, properties: Mapping[str, Any], *, large: bool
    ) -> None:
        self._path, self._model, self._device, self._properties = path, model, device, properties
        self._large = large
        self._requests: dict[Shapes | None, Any] = {}
        """Sizes it was compiled for -> the request that runs it; None: all sizes."""

    def run(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, NDArray[Any]]:
        assert self._model is not None, "this session is closed"
        request = self._request(feeds)
        # shared: nothing is copied on the way in, and on the way out only what was asked for
        request.infer(dict(feeds), share_inputs=True, share_outputs=True)
        names = outputs or [output.get_any_name() for output in self._model.outputs]
        return {name: request.get_tensor(name).data.copy() for name in names}

    def close(self) -> None:
        self._requests.clear()
        self._model = None

    def _request(self, feeds: Mapping[str, NDArray[Any]]) -> Any:
        shapes: Shapes = tuple((name, array.shape) for name, array in feeds.items())
        request = self._requests.get(shapes) or self._requests.get(None)
        if request is None:
            model, key = self._model, None
            if model.is_dynamic() and not self._requests:
                model, key = model.clone(), shapes
                model.reshape({name: list(shape) for name, shape in shapes})
            if self._large:
                self._requests.clear()
            try:
                compiled = _core().compile_model(model, self._device, self._properties)
            except Exception as error:
                raise _cannot("compile", self._path, error) from None
            request = self._requests[key] = compiled.create_infer_request()
        return request


def _unpack(model: Any) -> None:
    """Compute integer weights that the file has in fewer bits, or as groups with multipliers.

    export/openvino_weights.py ends them all in a Convert to i8. The engine would leave some of that for run time, and
    would not see that an integer kernel fits.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Convert" and node.get_element_type() == openvino.Type.i8:
            alone = openvino.Model(
                [node.output(0)], []
            )  # of the same nodes: what is folded here is folded there
            manager = Manager()
            manager.register_pass(ConstantFolding())
            manager.run_passes(alone)


def _check(path: Path, found: Sequence[Any], expected: Sequence[TensorSpec]) -> None:
    """The names and types of inputs or outputs are those of the manifest."""
    got = {
        min(tensor.get_names(), default="a nameless one"): tensor.get_element_type().to_dtype().name
        for tensor in found
    }
    wanted = {spec.name: spec.dtype for spec in expected}
    if got != wanted:
        raise BundleError(f"{path.name} has {got}", expected=f"{wanted}", fix="export the bundle again")


def _cannot(do: str, path: Path, error: Exception) -> BundleError:
    """OpenVINO's errors are pages that begin with places in its own source; the last line has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return BundleError(
        f"{path.name}: OpenVINO {library_version()} cannot {do} it ({' '.join(lines[-1:])[:200]})",
        fix="export the bundle again, or update openvino",
    )

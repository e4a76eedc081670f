"""NVIDIA's GPUs by TensorRT: the engine is built on the device from the bundle's graph, and kept for the next start.

Either library will do: TensorRT for RTX (tensorrt_rtx), which pip installs whole and which builds without a GPU, or the
full TensorRT (tensorrt), which data centre and Jetson GPUs need. Memory and streams are the driver's own (cudadriver).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..compiled import compiled, find, hash_files, keep
from ..errors import BadInput, BundleError, FewstepError
from ..manifest import PartSpec
from .cudadriver import Device, Memory, open_device

try:
    import tensorrt as trt
except ModuleNotFoundError as missing:
    try:
        import tensorrt_rtx as trt
    except ModuleNotFoundError:
        raise missing from None

__all__ = ["TensorRtSession", "build_engine", "capabilities", "library_version", "open_session", "runs_in"]

Array = NDArray[Any]

FOR_RTX = trt.__name__ == "tensorrt_rtx"

DRIVERS = {
    "tensorrt_rtx_cu13": 13000,
    "tensorrt_cu13_libs": 13000,
    "tensorrt_rtx_cu12": 12000,
    "tensorrt_cu12_libs": 12000,
}
"""Package -> the least version of CUDA the driver must know, as cuDriverGetVersion counts: its own CUDA's first."""


def library_version() -> str:
    return f"{'RTX ' if FOR_RTX else ''}{trt.__version__}"


def capabilities() -> tuple[str, ...]:
    """Compute capabilities that this library builds for without such a GPU at hand: "8.9" and so on."""
    known = getattr(trt, "ComputeCapability", None)
    numbers = [] if known is None else [int(name[2:]) for name in known.__members__ if name.startswith("SM")]
    return tuple(f"{number // 10}.{number % 10}" for number in sorted(numbers))


def runs_in(spec: PartSpec) -> str | None:
    """The graph's own types decide, on every GPU alike; None without a GPU."""
    try:
        open_device().close()
    except BadInput:
        return None
    return spec.precision if spec.device == "gpu" else None


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> TensorRtSession:
    """Load the engine of a graph, or build it first, which takes seconds to minutes.

    Raises BadInput where there is no GPU or its driver is too old, BundleError where TensorRT refuses the graph.
    """
    device = open_device()
    try:
        _check_driver(device)
        data = path.with_name("model.onnx_data")
        key = {
            "graph": hash_files(path, data),
            "device": f"{device.name}, compute capability {device.capability}",
            "driver": str(device.driver_version),
            "library": f"{trt.__name__} {trt.__version__}",
        }
        ours = device.capability if device.capability in capabilities() else None
        key_of_engine = {**key, "what": "engine"}
        engine = compiled("tensorrt", key_of_engine, lambda file: file.write_bytes(build_engine(path, ours)))
        return TensorRtSession(engine, spec, device, {**key, "what": "kernels"})
    except BaseException:
        device.close()
        raise


class TensorRtSession:
    """An engine on the GPU, with room for its inputs and outputs at the sizes of the last run."""

    def __init__(self, engine: Path, spec: PartSpec, device: Device, kernels: Mapping[str, str]) -> None:
        """engine   a file that this process or an earlier one of this user has built
        kernels  the key under which what is compiled at the first run is kept; TensorRT for RTX alone does that
        """
        self._device: Device | None = device
        self._spec, self._kernels = spec, kernels
        self._log = _Log()
        runtime = trt.Runtime(self._log)
        self._engine = runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise _cannot("load the engine", self._log, device)
        self._runtime = runtime  # an engine does not keep it
        self._jit: Any = None
        self._context = self._new_context()
        if self._context is None:
            raise _cannot("make room for the engine", self._log, device)
        self._memory: dict[str, Memory] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        device = self._device
        assert device is not None, "this session is closed"
        device.enter()
        arrays = {
            tensor.name: np.ascontiguousarray(feeds[tensor.name], dtype=tensor.dtype)
            for tensor in self._spec.inputs
        }
        self._fit({name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            device.copy_in(self._memory[name], array)
        if not self._context.execute_async_v3(device.stream):
            raise _cannot("run", self._log, device)
        results = {}
        for tensor in self._spec.outputs:
            if outputs is None or tensor.name in outputs:
                shape = tuple(self._context.get_tensor_shape(tensor.name))
                results[tensor.name] = np.empty(shape, tensor.dtype)
                device.copy_out(results[tensor.name], self._memory[tensor.name])
        device.wait()
        self._keep_kernels()
        return results

    def close(self) -> None:
        device, self._device = self._device, None
        if device is None:
            return
        device.enter()
        self._context = self._engine = self._runtime = self._jit = None
        for memory in self._memory.values():
            memory.free()
        self._memory.clear()
        device.close()

    def _fit(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Tell the engine the sizes, and give every input and output its room, where they are other than last time."""
        if shapes == self._shapes:
            return
        assert self._device is not None
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise BadInput(
                    f"{name} of shape {shape}, and the graph takes {tuple(self._engine.get_tensor_shape(name))}",
                    fix="draw at the size the bundle was made for",
                )
        for tensor in (*self._spec.inputs, *self._spec.outputs):
            shape = shapes.get(tensor.name) or tuple(self._context.get_tensor_shape(tensor.name))
            size = int(np.prod(shape)) * np.dtype(tensor.dtype).itemsize
            held = self._memory.pop(tensor.name, None)
            if held is None or held.size < size:
                if held is not None:
                    held.free()
                held = self._device.memory(size)
            self._memory[tensor.name] = held
            self._context.set_tensor_address(tensor.name, held.address)
        self._shapes = shapes

    def _new_context(self) -> Any:
        if not FOR_RTX:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._jit = config.create_runtime_cache()
        kept = find("tensorrt", self._kernels)
        if kept is not None:
            self._jit.deserialize(kept.read_bytes())
            self._kernels = {}
        config.set_runtime_cache(self._jit)
        return self._engine.create_execution_context(config)

    def _keep_kernels(self) -> None:
        """After the first run: what the library compiled for it, so that the next start need not."""
        if self._jit is not None and self._kernels:
            data = bytes(self._jit.serialize())
            keep("tensorrt", self._kernels, lambda file: file.write_bytes(data))
            self._kernels = {}


def build_engine(path: Path, capability: str | None = None, notes: list[str] | None = None) -> bytes:
    """The engine of an ONNX graph, strongly typed: it computes in the types that the graph has.

    capability  of the GPU it is for, one of `capabilities`; None: the one at hand
    notes       gets the library's warnings
    Raises BundleError naming the node and TensorRT's reason where it refuses the graph, and BadInput for a
    capability that this library does not build for.
    """
    log = _Log()
    builder = trt.Builder(log)
    typed = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # later versions know nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise _refused(path, "; ".join(_said(parser.get_error(i)) for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    if capability is not None:
        if capability not in capabilities():
            known = ", ".join(capabilities()) or "none: TensorRT for RTX does"
            raise BadInput(
                f"compute capability {capability}", expected=f"one this library builds for: {known}"
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), 0)
    free = [network.get_input(i) for i in range(network.num_inputs)]
    free = [tensor for tensor in free if -1 in tuple(tensor.shape)]
    if free:
        names = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in free)
        raise _refused(path, f"free sizes: {names}; engines here are of one size")
    _let_attention_decompose(network)
    engine = builder.build_serialized_network(network, config)
    if notes is not None:
        notes += log.warnings
    if engine is None:
        raise _refused(path, log.reason())
    return bytes(engine)


def _let_attention_decompose(network: Any) -> None:
    """Where the library has no fused kernel for an attention, it may compute it step by step instead of giving up."""
    begins = getattr(
        trt.LayerType, "ATTENTION_INPUT", None
    )  # none before TensorRT had an attention of its own
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if begins is not None and layer.type == begins:
            layer.__class__ = trt.IAttentionInputLayer  # how its Python interface is told what a layer is
            layer.attention.decomposable = True


class _Log(trt.ILogger):  # type: ignore[misc]
    """Keeps what the library has to say: a library never prints."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
            self.errors.append(text)
        elif severity == trt.ILogger.WARNING:
            self.warnings.append(text)

    def reason(self) -> str:
        return "; ".join(self.errors[:3]) or "it gives no reason"


def _said(error: Any) -> str:
    """One error of the parser: the node, its operator and why."""
    return f"node {error.node_name()!r} ({error.node_operator()}): {' '.join(error.desc().split())}"


def _refused(path: Path, reason: str) -> BundleError:
    return BundleError(
        f"{path.name}: TensorRT {library_version()} refuses it: {reason[:600]}",
        fix="export the bundle again, or update the library",
    )


def _check_driver(device: Device) -> None:
    for package, least in DRIVERS.items():
        try:
            version(package)
        except PackageNotFoundError:
            continue
        if device.driver_version < least:
            raise BadInput(
                f"the NVIDIA driver knows CUDA {_cuda(device.driver_version)}, and {package} needs {_cuda(least)}",
                fix="update the NVIDIA driver",
            )
        return


def _cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _cannot(do: str, log: _Log, device: Device) -> FewstepError:
    """Which of the things that go wrong on a device it was, as far as the library says."""
    reason = log.reason()
    if "out of memory" in reason.lower() or "outofmemory" in reason.lower():
        free, total = device.room()
        return FewstepError(
            f"TensorRT cannot {do}: {device.name} has {free >> 20:,} of {total >> 20:,} MiB free",
            fix="close other programs that use it, draw with low_memory=True, or take a smaller bundle",
        )
    return FewstepError(
        f"TensorRT {library_version()} cannot {do}: {reason[:300]}", fix="update the NVIDIA driver"
    )

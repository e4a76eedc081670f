"""PyTorch's AOTInductor: a graph of ATen operators is compiled on the device at first run, and kept for the next start.

NVIDIA's GPUs (Triton and a C++ compiler), and the CPU (a C++ compiler). On a GPU the compiled network is recorded once
as a CUDA graph, which each step of a plan then replays.
"""

from __future__ import annotations

import logging
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..atenfile import GRAPH, MAX_ELEMENTS, WEIGHTS, AtenGraph, Stored, read_aten
from ..atenops import ITEM
from ..compiled import cache_folder, compiled, hash_files
from ..errors import BadInput, BundleError, FewstepError
from ..manifest import PartSpec

__all__ = ["AotiSession", "library_version", "open_session", "program", "runs_in"]

Array = NDArray[Any]

COMPILERS = ("g++", "c++", "clang++")
WARM_UP = 3
"""Runs before a CUDA graph is recorded: the first allocate, and choose algorithms (torch's notes on CUDA semantics)."""


def library_version() -> str:
    return str(torch.__version__)


def runs_in(spec: PartSpec) -> str | None:
    """The graph's own types decide; None where this host has no such device."""
    if spec.device == "gpu":
        return spec.precision if torch.cuda.is_available() else None
    return spec.precision if spec.device == "cpu" else None


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> AotiSession:
    """Load what was compiled of a graph, or compile it first, which takes a minute or several.

    Raises BadInput where there is no GPU or no compiler, BundleError where torch cannot compile the graph.
    """
    if path.name != GRAPH:
        raise BundleError(
            f"{path.name} is no graph of ATen operators", expected=GRAPH, fix="export the bundle again"
        )
    cuda = spec.device == "gpu"
    if cuda and not torch.cuda.is_available():
        raise BadInput(
            f"torch {torch.__version__} finds no NVIDIA GPU",
            expected="an NVIDIA GPU, its driver, and torch built for CUDA",
            fix="check nvidia-smi and torch.version.cuda, or export for another target (fewstep targets)",
        )
    threads = threads or torch.get_num_threads()
    weights = path.with_name(WEIGHTS)
    key = {
        "graph": hash_files(path, weights),
        "device": _device_name() if cuda else f"{_processor()}, {threads} threads",
        "driver": str(torch.version.cuda) if cuda else _compiler(),
        "library": f"torch {torch.__version__}",
        "what": "package",
    }
    package = compiled(
        "aoti", key, lambda file: _compile(path, weights, file, "cuda" if cuda else "cpu", threads), "pt2"
    )
    with _errors(path, "load"), _quiet():
        # one call at a time, which is what a CUDA graph can record
        network = torch._inductor.aoti_load_package(str(package), run_single_threaded=cuda)
    return AotiSession(network, spec, torch.device("cuda" if cuda else "cpu"))


class AotiSession:
    """A compiled network and, on a GPU, its CUDA graph with the memory it reads and writes."""

    def __init__(self, network: Any, spec: PartSpec, device: torch.device) -> None:
        self._network, self._spec, self._device = network, spec, device
        self._graph: Any = None
        self._inputs: list[torch.Tensor] = []
        self._outputs: list[torch.Tensor] = []

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        assert self._network is not None, "this session is closed"
        given = []
        for tensor in self._spec.inputs:
            array = np.ascontiguousarray(feeds[tensor.name], dtype=tensor.dtype)
            if array.shape != tensor.shape:
                raise BadInput(
                    f"{tensor.name} of shape {array.shape}, and the graph takes {tensor.shape}",
                    fix="draw at the size the bundle was made for",
                )
            given.append(torch.from_numpy(array))
        with torch.no_grad(), _errors(None, "run"):
            cpu = self._device.type == "cpu"
            found = _flat(self._network(*given)) if cpu else self._replay(given)
            return {
                # a copy of what is recorded: the next replay writes there
                spec.name: (value if cpu else value.to("cpu", copy=True)).numpy()
                for spec, value in zip(self._spec.outputs, found, strict=True)
                if outputs is None or spec.name in outputs
            }

    def close(self) -> None:
        self._graph = self._network = None
        self._inputs, self._outputs = [], []

    def _replay(self, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy into the recorded inputs and run the recording again; the first call makes it."""
        if self._graph is None:
            self._record(given)
        else:
            for held, value in zip(self._inputs, given, strict=True):
                held.copy_(value, non_blocking=True)
        self._graph.replay()
        return self._outputs

    def _record(self, given: Sequence[torch.Tensor]) -> None:
        self._inputs = [value.to(self._device) for value in given]
        side = torch.cuda.Stream()  # recording needs a stream that is not the default one
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._network(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = _flat(self._network(*self._inputs))
        self._graph = graph


def program(graph: AtenGraph, weights: Path, device: str) -> Any:
    """The graph as a torch.export.ExportedProgram on a device, its weights mapped from the file beside it.

    Raises BundleError for arguments that do not fit their operator, and for results no memory holds.
    """
    data = np.memmap(weights, np.uint8, "c")  # copy on write: torch wants memory that may be written
    root, inner = torch.nn.Module(), torch.fx.Graph()
    values: dict[str, Any] = {name: inner.placeholder(name) for name, _, _ in graph.inputs}
    attributes: dict[str, Any] = {}

    def weight(name: str) -> Any:
        if name not in attributes:
            label = f"weight_{len(attributes)}"
            root.register_buffer(label, _tensor(data, graph.weights[name]).to(device))
            attributes[name] = inner.get_attr(label)
        return attributes[name]

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [value(each) for each in item]
        if not isinstance(item, dict):
            return item
        kind, named = next(iter(item.items()))
        if kind == "value":
            return values[named]
        if kind == "weight":
            return weight(named)
        if kind == "dtype":
            return getattr(torch, named)
        return torch.device(device) if kind == "device" else named * float("inf")

    for node in graph.nodes:
        args = tuple(value(item) for item in node.args)
        kwargs = {name: value(item) for name, item in node.kwargs.items()}
        if node.operator == ITEM:
            values[node.name] = inner.call_function(_item, args)
            continue
        _, name, overload = node.operator.split(".")
        operator = getattr(getattr(torch.ops.aten, name), overload)
        values[node.name] = inner.call_function(operator, args, kwargs)
    inner.output(tuple(values[name] for name in graph.outputs))
    example = tuple(
        torch.zeros(shape, dtype=getattr(torch, dtype), device=device) for _, dtype, shape in graph.inputs
    )
    with torch.no_grad(), _quiet():
        exported = torch.export.export(torch.fx.GraphModule(root, inner), example, strict=False)
    for node in exported.graph.nodes:
        held = node.meta.get("val")
        if isinstance(held, torch.Tensor) and prod(int(size) for size in held.shape) > MAX_ELEMENTS:
            raise BundleError(
                f"{GRAPH}: {node.name} would have sizes {tuple(held.shape)}",
                expected=f"at most {MAX_ELEMENTS:,} elements",
                fix="do not use this bundle unless you know who made it",
            )
    return exported


def _item(values: Any, number: int) -> Any:
    return values[number]


def _tensor(data: Any, stored: Stored) -> torch.Tensor:
    if stored.start == stored.stop:
        return torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    flat = torch.from_numpy(data[stored.start : stored.stop])
    return flat.view(getattr(torch, stored.dtype)).reshape(stored.shape)


def _compile(path: Path, weights: Path, file: Path, device: str, threads: int) -> None:
    if device == "cpu":
        _compiler()
    graph = read_aten(path, weights)
    work = cache_folder() / "aoti" / f"{file.name}.work"
    work.mkdir(parents=True)
    from torch._inductor.utils import fresh_inductor_cache

    package = work / "package.pt2"
    try:
        with _errors(path, "compile"), _quiet(), fresh_inductor_cache(dir=str(work)):
            torch._inductor.aoti_compile_and_package(
                program(graph, weights, device),
                package_path=str(package),
                inductor_configs={"cpp.threads": threads},
            )
        package.rename(file)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _flat(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple | list) else [found]


def _device_name() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _processor() -> str:
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def _compiler() -> str:
    """The C++ compiler the CPU's code is made with. Raises BadInput where there is none."""
    found = next((shutil.which(name) for name in COMPILERS if shutil.which(name)), None)
    if found is None:
        raise BadInput(
            "no C++ compiler on this host, and AOTInductor needs one",
            expected=" or ".join(COMPILERS),
            fix="install g++ (Debian: apt install g++), or export for laptop-cpu",
        )
    return str(Path(found).resolve())


@contextmanager
def _errors(path: Path | None, do: str) -> Iterator[None]:
    """torch's errors in our words: what it could not do, with what, and what to try."""
    name = "the network" if path is None else f"{path.parent.name}/{path.name}"
    try:
        yield
    except (FewstepError, KeyboardInterrupt):
        raise
    except torch.OutOfMemoryError as error:
        raise FewstepError(
            f"the GPU has no room to {do} {name} ({_line(error)})",
            fix="close other programs that use it, draw with low_memory=True, or take a smaller bundle",
        ) from error
    except Exception as error:
        kind = FewstepError if path is None else BundleError
        raise kind(
            f"torch {torch.__version__} cannot {do} {name} ({type(error).__name__}: {_line(error)})",
            fix="export the bundle again, or update torch",
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch neither warns nor logs: what matters, we say."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

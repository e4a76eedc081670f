"""Qualcomm's Hexagon NPU through ONNX Runtime and its QNN plug-in, which Qualcomm ships under a licence of its own.

A bundle holds a plain ONNX graph. What the NPU runs, a context binary, is a program: it is compiled on the device at
first use, kept in this user's cache, and never taken from a bundle. Until now this backend has been executed with the
plug-in's emulator on x86_64 and with doubles of its devices, not on a Snapdragon.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime
import onnxruntime_qnn

from ..compiled import compiled, hash_files
from ..errors import BadInput, BundleError
from ..manifest import PartSpec
from .onnxruntime import OnnxRuntimeSession

__all__ = [
    *("SOCS", "OnnxRuntimeSession", "Soc", "compile_context", "devices"),
    *("library_version", "load_context", "open_session", "runs_in"),
]

PROVIDER = "QNNExecutionProvider"
MACHINES = ("aarch64", "arm64", "ARM64")
"""What platform.machine() says where a Hexagon can be: Linux and Android, macOS (never), Windows."""


@dataclass(frozen=True)
class Soc:
    """A system on a chip as QNN numbers it."""

    model: int
    """Qnn_SocModel_t of QNN's QnnTypes.h."""
    arch: int
    """Version of the Hexagon tensor processor."""


SOCS = {"SM8550": Soc(43, 73), "SM8650": Soc(57, 75), "SM8750": Soc(69, 79)}
"""By the name the system gives: Snapdragon 8 Gen 2, 8 Gen 3 and 8 Elite. The numbers are those of QnnTypes.h and of
ExecuTorch's backends/qualcomm/serialization/qc_schema.py."""


def library_version() -> str:
    """Of the plug-in and of the QNN inside it."""
    return f"{onnxruntime_qnn.__version__} (QNN {onnxruntime_qnn.build_and_package_info.qnn_version})"


@cache
def _register() -> None:
    onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())


def devices() -> list[Any]:
    """What the plug-in finds; on x86_64 the one device is its emulator, a CPU."""
    _register()
    return [found for found in onnxruntime.get_ep_devices() if found.ep_name == PROVIDER]


def _npu() -> list[Any]:
    if platform.machine() not in MACHINES:
        return []
    return [found for found in devices() if found.device.type.name == "NPU"][:1]


def runs_in(spec: PartSpec) -> str | None:
    """The graph's own types decide. None without a Hexagon NPU: the emulator of x86_64 is for the gate alone."""
    return spec.precision if spec.device == "npu" and _npu() else None


def open_session(path: Path, spec: PartSpec, *, threads: int | None = None) -> OnnxRuntimeSession:
    """Load what is compiled of a graph, or compile it first, which takes seconds to minutes.

    threads  unused: the NPU has its own
    Raises BadInput without a Hexagon NPU, BundleError where QNN cannot take the whole graph.
    """
    npu = _npu()
    if not npu:
        raise BadInput(
            f"the QNN plug-in finds no Hexagon NPU on this {platform.machine()}",
            expected="a Snapdragon under Android, Linux or Windows",
            fix="export for a CPU instead: android-cpu or laptop-cpu (fewstep targets)",
        )
    name = soc_name()
    key = {
        "graph": hash_files(path, path.with_name("model.onnx_data")),
        "device": name or "a Hexagon of unknown name",
        "what": "context",
        "library": f"onnxruntime {onnxruntime.__version__}, onnxruntime-qnn {library_version()}",
    }
    soc = SOCS.get(name)
    context = compiled("qnn", key, lambda file: compile_context(path, file, npu, soc), "onnx")
    return load_context(path, context, npu, soc)


def compile_context(path: Path, file: Path, found: Sequence[Any], soc: Soc | None) -> None:
    """Write `file`: an ONNX graph of one node that holds the context binary of the graph at `path`.

    found  the device of the plug-in to compile on
    soc    what to compile for; None: the plug-in asks the system
    Raises BundleError where some of the graph would be left to the CPU, naming the operators, or QNN refuses it.
    """
    entries = {
        "ep.context_enable": "1",
        "ep.context_file_path": str(file),
        "ep.context_embed_mode": "1",  # one file, for one seal
        "session.record_ep_graph_assignment_info": "1",
    }
    session = _session(path, path, found, soc, entries)
    left = [
        f"{node.op_type} {node.name}"
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    ]
    if left:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        raise BundleError(
            f"{path.parent.name}: QNN leaves {len(left)} operators to the CPU: {shown}",
            expected="the whole graph as one context of the NPU",
            fix="leave their layers out of the quantization, or export for android-cpu",
        )


def load_context(path: Path, file: Path, found: Sequence[Any], soc: Soc | None) -> OnnxRuntimeSession:
    """What compile_context wrote of the graph at `path`, ready to run."""
    return OnnxRuntimeSession(_session(path, file, found, soc, {}))


def _session(
    path: Path, graph: Path, found: Sequence[Any], soc: Soc | None, entries: Mapping[str, str]
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = (
        4  # fatal alone: what else it says is about graphs, and comes back as an error
    )
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    provider = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "enable_htp_fp16_precision": "1",  # for what the graph leaves in floating point
        "offload_graph_io_quantization": "0",  # the first and the last rounding are the NPU's as well
        "htp_performance_mode": "burst",
    }
    if soc is not None:
        provider |= {"soc_model": str(soc.model), "htp_arch": str(soc.arch)}
    try:
        options.add_provider_for_devices(list(found), provider)
        return onnxruntime.InferenceSession(str(graph), options)
    except Exception as error:  # a dozen unrelated types, some of them straight from pybind
        raise BundleError(
            f"{path.parent.name}/{path.name}: onnxruntime-qnn {library_version()} cannot load it "
            f"({str(error).splitlines()[0][:300]})",
            fix="export the bundle again, or update onnxruntime-qnn",
        ) from None


def soc_name() -> str:
    """The system on a chip as the system names it, SM8650 for instance; empty where it does not say."""
    try:
        return Path("/sys/devices/soc0/machine").read_text(encoding="utf-8").strip().upper()
    except OSError:  # Android may keep it from apps
        pass
    try:
        told = subprocess.run(["getprop", "ro.soc.model"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return told.stdout.strip().upper()

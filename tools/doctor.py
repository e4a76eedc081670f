"""`fewstep doctor`: what this host can do, what is missing and the command that installs it."""

from __future__ import annotations

import argparse
import shutil
import sys
from typing import Any

from .. import __version__
from .console import Answer, human_bytes, table
from .host import fingerprint, version_of

__all__ = ["add", "call", "kernels"]

EXTRAS = {
    "onnx": ("onnxruntime", "tokenizers", "pillow", "rich"),
    "openvino": ("openvino", "tokenizers", "pillow", "rich"),
    "coreml": ("coremltools", "scikit-learn"),
    "litert": ("litert-torch", "ai-edge-litert", "ai-edge-quantizer"),
    "qnn": ("onnxruntime-qnn",),
    "tensorrt": ("tensorrt-rtx",),
    "export": ("torch", "diffusers", "transformers", "accelerate", "safetensors", "onnx", "onnxscript"),
}
"""Extra of fewstep -> the libraries it brings, as pyproject.toml lists them."""

LOW_DISK_BYTES = 2 * 2**30
"""A full-size export in fp32 is some 4 GB, one for a phone about 1: below this it is worth a warning."""


def add(parser: argparse.ArgumentParser) -> None:
    pass


def call(args: argparse.Namespace) -> Answer:
    host = fingerprint()
    fast = kernels(host["flags"])
    missing = {
        extra: [name for name in libraries if version_of(name) is None] for extra, libraries in EXTRAS.items()
    }
    missing = {extra: names for extra, names in missing.items() if names}
    free = shutil.disk_usage(".").free
    advice = [
        f"{', '.join(names)} not installed: pip install 'fewstep[{extra}]'"
        for extra, names in missing.items()
    ]
    if free < LOW_DISK_BYTES:
        advice.append(f"{human_bytes(free)} free on this disk: a full-size export needs more")
    if host["power"]["governor"] == "powersave":
        advice.append("governor powersave: latencies will wander; plug in or select performance")
    if host["threads_env"]:
        advice.append(f"{', '.join(host['threads_env'])} set: the engine may not use every core")
    data = {
        "fewstep": __version__,
        "executable": sys.executable,
        **host,
        "disk_free_bytes": free,
        "kernels": fast,
        "openvino_devices": _openvino_devices(),
        "missing": missing,
        "advice": advice,
    }
    return Answer(data, _text(data))


def kernels(flags: dict[str, bool]) -> dict[str, dict[str, Any]]:
    """Which CPU kernels these instruction sets get: precision -> {fast, why}.

    float32, int8 and float16 are ONNX Runtime's (MLAS), bfloat16 OpenVINO's. Empty where the flags are not known.
    """
    if not flags:
        return {}
    if "neon" in flags:
        dot = flags["asimddp"]
        return {
            "float32": {"fast": True, "why": "NEON"},
            "int8": {
                "fast": dot,
                "why": "i8mm" if flags["i8mm"] else "dot product" if dot else "no dot product",
            },
            "float16": {
                "fast": flags["asimdhp"],
                "why": "half-precision NEON" if flags["asimdhp"] else "no fp16 arithmetic",
            },
        }
    wide = "AVX-512" if flags["avx512f"] else "AVX2 and FMA" if flags["avx2"] and flags["fma"] else ""
    int8 = next(
        (
            name
            for flag, name in (("amx_int8", "AMX"), ("avx512_vnni", "AVX-512 VNNI"), ("avx_vnni", "AVX-VNNI"))
            if flags[flag]
        ),
        "",
    )
    bf16 = "AMX" if flags["amx_bf16"] else "AVX-512 BF16" if flags["avx512_bf16"] else ""
    return {
        "float32": {"fast": bool(wide), "why": wide or "no AVX2: several times slower"},
        "bfloat16": {"fast": bool(bf16), "why": bf16 or "no AMX, no AVX-512 BF16: computed in float32"},
        "int8": {"fast": bool(int8), "why": int8 or "no VNNI: int8 is smaller here, hardly faster"},
        "float16": {"fast": False, "why": "computed in float32 on this processor: smaller, not faster"},
    }


def _openvino_devices() -> list[str]:
    """What OpenVINO could run a bundle on here: CPU, GPU, NPU."""
    if version_of("openvino") is None:
        return []
    try:
        from ..runtime.backends.openvino import devices
    except ImportError:  # installed, but broken: `fewstep run` says how
        return []
    return devices()


def _text(data: dict[str, Any]) -> str:
    flags = [name for name, have in data["flags"].items() if have]
    cores = data["cores"]
    power = ", ".join(f"{k} {v}" for k, v in data["power"].items() if v is not None) or "not readable"
    quota = f", limited to {cores['quota']} cores' time" if cores["quota"] else ""
    memory = f"{human_bytes(data['memory_bytes'])}, {human_bytes(data['memory_available_bytes'])} available"
    rows = [
        ("fewstep", f"{data['fewstep']}, Python {data['python']} ({data['executable']})"),
        ("host", f"{data['os']}, kernel {data['kernel']}, {data['machine']}"),
        ("processor", f"{data['cpu']}, {cores['usable']} of {cores['logical']} cores usable{quota}"),
        ("instructions", " ".join(flags) or "none of those that matter"),
        *(
            (f"{precision} kernels", f"{'fast' if k['fast'] else 'slow'}: {k['why']}")
            for precision, k in data["kernels"].items()
        ),
        ("OpenVINO", ", ".join(data["openvino_devices"]) or "not installed, or no device"),
        ("memory", memory),
        ("disk", f"{human_bytes(data['disk_free_bytes'])} free here"),
        ("power", power),
        ("threads", ", ".join(f"{k}={v}" for k, v in data["threads_env"].items()) or "nothing set"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in data["libraries"].items())),
    ]
    advice = [f"! {line}" for line in data["advice"]] or ["nothing is missing"]
    return "\n".join([table(rows), "", *advice])

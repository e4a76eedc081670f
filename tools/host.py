"""The host a measurement was made on: without it a number cannot be repeated or disbelieved."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["LIBRARIES", "cpu_flags", "fingerprint", "peak_rss_bytes", "version_of"]

X86_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)
ARM_FLAGS = ("neon", "asimddp", "i8mm", "asimdhp", "bf16", "sve")
"""The instruction sets that decide which kernels an engine picks, as Linux names them."""

APPLE = {
    "neon": "",
    "asimddp": "FEAT_DotProd",
    "i8mm": "FEAT_I8MM",
    "asimdhp": "FEAT_FP16",
    "bf16": "FEAT_BF16",
}
"""The same flags as macOS names them."""

LIBRARIES = (
    "numpy",
    "onnxruntime",
    "openvino",
    "tokenizers",
    "pillow",
    "rich",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
)

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_WAIT_POLICY")


def fingerprint() -> dict[str, Any]:
    """What moves a latency on this host and can be read without rights; unknown values are None."""
    return {
        "cpu": cpu_model(),
        "flags": cpu_flags(),
        "cores": {"usable": usable_cores(), "logical": os.cpu_count(), "quota": cpu_quota()},
        "memory_bytes": memory("MemTotal"),
        "memory_available_bytes": memory("MemAvailable"),
        "os": os_name(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := version_of(name))},
        "threads_env": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "power": power(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def version_of(library: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    for key in ("model name", "Hardware", "Model"):
        if value := _cpuinfo().get(key):
            return value
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine()


def cpu_flags() -> dict[str, bool]:
    """Which of its architecture's flags this processor has; empty where nothing tells."""
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return {flag: not name or _sysctl(f"hw.optional.arm.{name}") == "1" for flag, name in APPLE.items()}
    info = _cpuinfo()
    if not info:
        return {}
    have = set((info.get("flags") or info.get("Features") or "").split())
    arm = platform.machine().lower() in ("arm64", "aarch64")
    if arm:
        have |= {"neon"}  # every 64-bit ARM has it; Linux calls it asimd
    return {flag: flag in have for flag in (ARM_FLAGS if arm else X86_FLAGS)}


def usable_cores() -> int:
    """Cores this process may run on, which in a container or under taskset is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores' worth of time a control group grants (cgroup v2 cpu.max); None where there is no limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return round(int(quota) / int(period), 2) if quota.isdigit() and period.strip().isdigit() else None


def memory(key: str) -> int | None:
    """One line of /proc/meminfo in bytes, or the physical memory where there is no such file."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    if key == "MemTotal" and (size := _sysctl("hw.memsize")):
        return int(size)
    return None


def os_name() -> str:
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return platform.platform(terse=True)


def power() -> dict[str, Any]:
    """Governor, turbo and mains, where the kernel shows them: on battery a laptop is another device."""
    supplies = Path("/sys/class/power_supply")
    online = [_read(p / "online") for p in supplies.glob("*")] if supplies.is_dir() else []
    turbo = _read("/sys/devices/system/cpu/intel_pstate/no_turbo")
    return {
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        "turbo": {"0": True, "1": False}.get(turbo),
        "mains": any(value == "1" for value in online) if any(online) else None,
    }


def peak_rss_bytes() -> int | None:
    """The most memory this process ever held: VmHWM, as getrusage's figure survives exec from the parent."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return None


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in _read("/proc/cpuinfo").partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    if sys.platform != "darwin":
        return ""
    done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return done.stdout.strip()

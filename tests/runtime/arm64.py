"""An ARM64 Linux in a folder: qemu's user-mode emulator, Debian's Python for ARM64, and the wheels the runtime needs.

    python tests/runtime/arm64.py     fetch what is missing (110 MB), and say where it is

Nothing is installed and no root is needed: packages are unpacked into ~/.cache/fewstep-arm64, or $FEWSTEP_ARM64. They
come from Debian by apt-get, which checks their signatures, and from PyPI by pip. qemu is 10.0 of bookworm-backports:
the 7.2 of bookworm crashes in ONNX Runtime.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

__all__ = ["CPU", "fetch", "folder", "python", "ready"]

CPU = "cortex-a76"
"""Of a Raspberry Pi 5, and the big core of phones of 2019: no bfloat16 and no matrix products of bytes."""

QEMU = ("bookworm-backports", "amd64", ("qemu-user",))
PYTHON = (
    "bookworm",
    "arm64",
    (
        *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1"),
        *("libstdc++6", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libuuid1"),
    ),
)
WHEELS = ("numpy", "onnxruntime", "tokenizers", "pillow", "protobuf", "flatbuffers", "packaging")
"""In the versions that this Python has, so that nothing but the processor differs."""
TAGS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def folder() -> Path:
    return Path(os.environ.get("FEWSTEP_ARM64") or Path.home() / ".cache" / "fewstep-arm64")


def wanted() -> str:
    """What a folder must hold to be this one."""
    return "\n".join([*QEMU[2], *PYTHON[2], *(f"{name} {version(name)}" for name in WHEELS)])


def ready() -> bool:
    stamp = folder() / "ready.txt"
    return stamp.exists() and stamp.read_text() == wanted()


def python(script: Path, *arguments: str | Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run a script in the emulated Python, this checkout's fewstep.runtime within reach."""
    root = folder()
    command = [root / "qemu/usr/bin/qemu-aarch64", "-L", root / "system", root / "system/usr/bin/python3.11"]
    path = os.pathsep.join(map(str, (root / "wheels", source(root))))
    environment = {"QEMU_CPU": CPU, "PYTHONPATH": path, "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, command), "-B", str(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def source(root: Path) -> Path:
    """A folder from which this checkout's fewstep.runtime, and no more of fewstep, is imported."""
    package, checkout = root / "source" / "fewstep", Path(__file__).resolve().parents[2]
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    shutil.copy(checkout / "src/fewstep/__init__.py", package)
    (package / "runtime").symlink_to(checkout / "runtime")
    return package.parent


def fetch() -> None:
    """Make `folder` what it should be. Raises SystemExit saying what to do where that cannot be."""
    root = folder()
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing; run this on Debian or Ubuntu, or install {package}")
    if not KEYS.exists():
        raise SystemExit(f"{KEYS} is missing; install debian-archive-keyring")
    unpack(root, "qemu", QEMU)
    for other in (root / "qemu/usr/bin").iterdir():
        if other.name != "qemu-aarch64":  # forty other processors, half a gigabyte
            other.unlink()
    unpack(root, "system", PYTHON)
    if not (root / "system/lib/ld-linux-aarch64.so.1").exists():
        raise SystemExit("Debian's libc6 for arm64 has no loader where qemu looks for it; report the version")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    pip += [argument for tag in TAGS for argument in ("--platform", tag)]
    pip += ["--python-version", "3.11", "--implementation", "cp", "--dest", str(root / "downloads")]
    run([*pip, *(f"{name}=={version(name)}" for name in WHEELS)], "PyPI", None)
    for wheel in sorted((root / "downloads").glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(root / "wheels")
    shutil.rmtree(root / "downloads")
    (root / "ready.txt").write_text(wanted())


def unpack(root: Path, name: str, source: tuple[str, str, tuple[str, ...]]) -> None:
    """Debian packages into root/name, by lists of apt's that are nobody else's."""
    suite, machine, packages = source
    lists = root / f"apt-{name}"
    for part in ("lists/partial", "archives/partial", "debs"):
        (lists / part).mkdir(parents=True)
    (lists / "status").touch()
    (lists / "sources.list").write_text(
        f"deb [signed-by={KEYS} arch={machine}] http://deb.debian.org/debian {suite} main\n"
    )
    settings = {
        "Dir::State": lists,
        "Dir::State::status": lists / "status",
        "Dir::Cache": lists,
        "Dir::Etc::sourcelist": lists / "sources.list",
        "Dir::Etc::sourceparts": "-",
        "APT::Architecture": machine,
        "APT::Architectures": machine,
        "Acquire::Languages": "none",
        "APT::Sandbox::User": "",
    }
    (lists / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    environment = {**os.environ, "APT_CONFIG": str(lists / "apt.conf")}
    run(["apt-get", "-q", "update"], "deb.debian.org", environment)
    run(["apt-get", "-q", "download", *packages], "deb.debian.org", environment, lists / "debs")
    for package in sorted((lists / "debs").glob("*.deb")):
        run(["dpkg-deb", "-x", str(package), str(root / name)], "the package", None)
    shutil.rmtree(lists)


def run(
    command: list[str], where: str, environment: dict[str, str] | None, place: Path | None = None
) -> None:
    done = subprocess.run(
        command, env=environment, cwd=place, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command[:4])} failed:\n{(done.stderr or done.stdout).strip()[-800:]}\n"
            f"{where} must be within reach; behind a proxy set http_proxy and https_proxy, then run this again"
        )


if __name__ == "__main__":
    if not ready():
        print(f"fetching ARM64 Linux into {folder()} ...", flush=True)
        fetch()
    print(f"{folder()} is ready: .venv/bin/python -m pytest -m arm64")

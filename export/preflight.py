"""Before any heavy work: will this machine's memory and disk do?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import BadInput, OutputError

__all__ = ["Estimate", "check_room", "estimate", "gib", "memory_available"]

LARGE_BYTES = 512 << 20
"""Parts with more weights are lowered and run in processes of their own, from a file that all of them map."""

BASE_BYTES = 700 << 20
"""torch, diffusers and transformers imported, and the program of a traced network (benchmarks/sd15-export.md)."""

WORKING = 1.6
"""Peak of a process that lowers or runs a part, over the part's weights (benchmarks/sd15-export.md)."""


@dataclass(frozen=True)
class Estimate:
    """What an export will take."""

    memory_bytes: int
    """All its processes together at the worst moment."""
    disk_bytes: int
    """The bundle, and the weights of large parts once more while it is made."""
    bundle_bytes: int


def estimate(weights: Mapping[str, int]) -> Estimate:
    """weights  part -> bytes of its float32 weights"""
    bundle = int(sum(weights.values()) * 1.02) + (8 << 20)  # graphs, tokenizer and side files on top
    large = sum(size for size in weights.values() if size > LARGE_BYTES)
    memory = BASE_BYTES + sum(weights.values()) + int(WORKING * max(weights.values(), default=0))
    return Estimate(memory, bundle + large, bundle)


def check_room(needs: Estimate, out: Path) -> None:
    """Raises BadInput where memory, and OutputError where the disk, is too small for the work."""
    free = memory_available()
    if free is not None and needs.memory_bytes > free:
        raise BadInput(
            f"this export takes about {gib(needs.memory_bytes)} of memory and {gib(free)} are free",
            fix="close other programs, or export on a machine with more memory",
        )
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.is_dir())
    room = shutil.disk_usage(folder).free
    if needs.disk_bytes > room:
        raise OutputError(
            f"{out}: this export writes about {gib(needs.disk_bytes)} and {gib(room)} are free there",
            fix="free some space or write to another disk",
        )


def memory_available() -> int | None:
    """Bytes a new process may take without swapping; None where the system does not say."""
    with suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    with suppress(OSError, ValueError, AttributeError):  # macOS: physical memory is the best there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"

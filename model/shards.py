"""Arrays kept on disk between runs: safetensors files that say by their digest whether they are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.files import atomic_write
from .libraries import library

__all__ = ["read_shard", "write_shard"]

Array = NDArray[Any]


def write_shard(file: Path, arrays: Mapping[str, Array]) -> None:
    """Raises OutputError, and leaves nothing behind, where it cannot be written."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save = library("safetensors.numpy").save
    atomic_write(file, save(whole, metadata={"blake2b": _digest(whole)}))


def read_shard(file: Path) -> dict[str, Array] | None:
    """A shard, or None where there is none or it is damaged: it is made again then."""
    if not file.exists():
        return None
    errors = library("safetensors").SafetensorError
    try:
        with library("safetensors").safe_open(str(file), framework="numpy") as opened:
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            said = (opened.metadata() or {}).get("blake2b")
    except (errors, OSError, ValueError):
        return None
    return arrays if said == _digest(arrays) else None


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(repr((name, arrays[name].dtype.str, arrays[name].shape)).encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()

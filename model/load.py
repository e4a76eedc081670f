"""From whatever names a model to a Model: a folder, a file, a hub id, an architecture."""

from __future__ import annotations

from pathlib import Path

from ..runtime.errors import CheckpointError
from .diffusers_folder import load_folder
from .model import Model

__all__ = ["load"]


def load(source: str | Path, *, allow_download: bool = False) -> Model:
    folder = Path(source)
    if not folder.exists():
        raise CheckpointError(f"{source} does not exist", fix="check the path")
    return load_folder(folder)

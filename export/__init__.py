"""From a checkpoint to a bundle. Needs the `export` extra: torch, diffusers, onnx."""

from __future__ import annotations

from ..runtime.progress import Progress
from .recipe import Exported, export_bundle

__all__ = ["Exported", "Progress", "export_bundle"]

"""Pillow: `PIL.Image` objects for callers who want them, and PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.PngImagePlugin
from numpy.typing import NDArray

from ..files import atomic_write


def to_image(pixels: NDArray[Any]) -> PIL.Image.Image:
    """pixels  uint8 [height, width, 1 or 3]"""
    return PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def write_png(path: Path, pixels: NDArray[Any], text: Mapping[str, str]) -> None:
    """Write a PNG with `text` in it, completely or not at all. Raises OutputError.

    pixels  uint8 [height, width, 1 or 3]
    """
    info, data = PIL.PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in text.items():
        info.add_itxt(key, value)
    to_image(pixels).save(data, "png", pnginfo=info)
    atomic_write(path, data.getvalue())

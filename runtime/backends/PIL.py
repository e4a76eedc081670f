"""Pillow, for callers who want `PIL.Image` objects."""

from __future__ import annotations

from typing import Any

import PIL.Image
from numpy.typing import NDArray


def to_image(pixels: NDArray[Any]) -> PIL.Image.Image:
    """pixels  uint8 [height, width, 1 or 3]"""
    return PIL.Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

"""Writing PNG with zlib alone: lossless, with the run's settings inside, the same bytes for the same pixels.

The format is W3C "Portable Network Graphics (PNG) Specification (Third Edition)"; section numbers refer to it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput
from .files import atomic_write

__all__ = ["encode_png", "write_png"]

COLOURS = {1: 0, 3: 2, 4: 6}
"""Channels -> colour type: grey, RGB, RGBA (11.2.1)."""
LEVEL = 6
"""zlib's own default; 9 takes several times as long for about a percent."""


def write_png(path: Path | str, image: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> None:
    """`encode_png` into a file, completely or not at all. Raises BadInput and OutputError."""
    atomic_write(path, encode_png(image, text))


def encode_png(image: NDArray[np.uint8], text: Mapping[str, str] | None = None) -> bytes:
    """A PNG file.

    image  uint8 [h, w, 1], [h, w, 3] or [h, w, 4]: grey, RGB or RGBA
    text   keyword -> text, kept in order: Latin-1 as tEXt, anything else as iTXt (11.3.3)
    Raises BadInput for another shape or type, a keyword PNG does not allow, and NUL or half a surrogate pair in a text.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3:
        found = (
            f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        )
        raise BadInput(f"an image of {found}", expected="uint8 [height, width, 1, 3 or 4]")
    h, w, channels = image.shape
    if channels not in COLOURS or not 0 < h < 2**31 or not 0 < w < 2**31:
        raise BadInput(f"an image of shape {[h, w, channels]}", expected="[height, width, 1, 3 or 4]")
    header = struct.pack(">IIBBBBB", w, h, 8, COLOURS[channels], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header)]
    parts += [_text(keyword, value) for keyword, value in (text or {}).items()]
    parts += [_chunk(b"IDAT", zlib.compress(filtered(image), LEVEL)), _chunk(b"IEND", b"")]
    return b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    if len(data) >= 2**31:
        raise BadInput(f"{len(data):,} bytes in one part of a PNG file", expected="less than 2 GiB")
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text(keyword: str, value: str) -> bytes:
    key = keyword.encode("latin-1", "replace")
    if (
        not 0 < len(key) < 80
        or not keyword.isprintable()
        or not keyword.isascii()
        or keyword != keyword.strip()
    ):
        raise BadInput(
            f"the PNG keyword {keyword[:80]!r}", expected="1 to 79 letters, digits and spaces between them"
        )
    try:
        if "\0" in value:
            raise ValueError
        encoded = value.encode()
    except ValueError:
        raise BadInput(
            f"the text of {keyword!r}", expected="Unicode without NUL and half surrogate pairs"
        ) from None
    try:
        return _chunk(b"tEXt", key + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        # no compression, no language, no translated keyword
        return _chunk(b"iTXt", key + b"\0\0\0\0\0" + encoded)


def filtered(image: NDArray[np.uint8]) -> bytes:
    """Rows as differences to their neighbours, which deflate packs better; each row begins with its filter's number.

    Of the filters None, Sub, Up, Average and Paeth (9.2) a row takes the one with the least sum of absolute
    differences, the rule of thumb of 12.7.
    """
    h, w, channels = image.shape
    here = image.reshape(h, w * channels)
    left, up, corner = np.zeros_like(here), np.zeros_like(here), np.zeros_like(here)
    left[:, channels:] = here[:, :-channels]
    up[1:] = here[:-1]
    corner[1:, channels:] = here[:-1, :-channels]
    candidates: dict[int, NDArray[Any]] = {
        0: here,
        1: here - left,  # uint8 wraps, as the format wants
        2: here - up,
        3: here - ((left.astype(np.uint16) + up) // 2).astype(np.uint8),
        4: here - paeth(left, up, corner),
    }
    signed = [rows.view(np.int8).astype(np.int16) for rows in candidates.values()]
    cost = [np.abs(rows).sum(axis=1, dtype=np.int64) for rows in signed]
    best = np.argmin(cost, axis=0)
    out = np.empty((h, 1 + w * channels), dtype=np.uint8)
    for i, (number, rows) in enumerate(candidates.items()):
        out[best == i, 0] = number
        out[best == i, 1:] = rows[best == i]
    return out.tobytes()


def paeth(left: NDArray[np.uint8], up: NDArray[np.uint8], corner: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The neighbour nearest to left + up - corner; ties go to left, then up (9.4)."""
    a, b, c = left.astype(np.int16), up.astype(np.int16), corner.astype(np.int16)
    to_left, to_up, to_corner = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    is_left = (to_left <= to_up) & (to_left <= to_corner)
    return np.where(is_left, left, np.where(to_up <= to_corner, up, corner))

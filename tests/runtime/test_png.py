"""PNG files: another program reads back the pixels and the text."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewstep.runtime.errors import BadInput, OutputError
from fewstep.runtime.png import encode_png, write_png

RNG = np.random.default_rng(0)
IMAGES = {
    "noise": RNG.integers(0, 256, (17, 31, 3), dtype=np.uint8),
    "slope": np.add.outer(np.arange(64), np.arange(48)).astype(np.uint8)[..., None].repeat(3, axis=2),
    "one pixel": np.full((1, 1, 3), 255, dtype=np.uint8),
    "one row": RNG.integers(0, 256, (1, 50, 3), dtype=np.uint8),
    "one column": RNG.integers(0, 256, (50, 1, 3), dtype=np.uint8),
    "grey": RNG.integers(0, 256, (9, 8, 1), dtype=np.uint8),
    "with alpha": RNG.integers(0, 256, (9, 8, 4), dtype=np.uint8),
    "a view": RNG.integers(0, 256, (20, 20, 3), dtype=np.uint8)[::2, ::-3],
}


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES)
def test_pillow_reads_the_same_pixels(image: Any) -> None:
    pillow = pytest.importorskip("PIL.Image")
    with pillow.open(io.BytesIO(encode_png(image))) as read:
        pixels = np.asarray(read)
    np.testing.assert_array_equal(pixels.reshape(image.shape), image)


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + size
    return found


def test_the_chunks_are_in_order_with_right_checksums() -> None:
    data = encode_png(IMAGES["noise"], {"a": "b"})
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert [kind for kind, _ in chunks(data)] == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]


def test_every_filter_is_used_where_it_pays() -> None:
    rows = np.zeros((4, 64, 1), dtype=np.uint8)
    rows[1, :, 0] = np.arange(64) * 3  # Sub
    rows[2] = rows[1]  # Up
    rows[3, :, 0] = rows[2, :, 0] // 2 + np.arange(64) * 2
    (_, packed) = next(chunk for chunk in chunks(encode_png(rows)) if chunk[0] == b"IDAT")
    filters = zlib.decompress(packed)[:: 64 + 1]
    assert list(filters[:3]) == [0, 1, 2]


def test_a_slope_packs_small() -> None:
    assert len(encode_png(IMAGES["slope"])) < IMAGES["slope"].size / 20


def test_text_comes_back_in_order() -> None:
    pillow = pytest.importorskip("PIL.Image")
    text = {
        "prompt": "a café\nat night",
        "Software": "fewstep",
        "prompt in Chinese": "一只猫 🐱",
        "empty": "",
    }
    with pillow.open(io.BytesIO(encode_png(IMAGES["grey"], text))) as image:
        image.load()
        assert dict(image.text) == text
        assert list(image.text) == list(text)


def test_the_same_image_gives_the_same_bytes() -> None:
    assert encode_png(IMAGES["noise"], {"a": "b"}) == encode_png(IMAGES["noise"].copy(), {"a": "b"})


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    write_png(tmp_path / "cat.png", IMAGES["noise"], {"seed": "7"})
    assert (tmp_path / "cat.png").read_bytes() == encode_png(IMAGES["noise"], {"seed": "7"})
    assert os.listdir(tmp_path) == ["cat.png"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"none/cat\.png"):
        write_png(tmp_path / "none/cat.png", IMAGES["noise"])


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 4, 4, 3), np.uint8),
        [[[0, 0, 0]]],
    ],
    ids=str,
)
def test_what_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(BadInput, match=r"an image of .*expected .*\[height, width, 1, 3 or 4\]"):
        encode_png(image)


@pytest.mark.parametrize("keyword", ["", "x" * 80, " a", "a ", "a\0", "a\n", "名", "é"])
def test_a_keyword_png_does_not_allow_is_refused(keyword: str) -> None:
    with pytest.raises(BadInput, match="the PNG keyword"):
        encode_png(IMAGES["grey"], {keyword: "x"})


@pytest.mark.parametrize("value", ["a\0b", "\ud83d"])
def test_a_text_png_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(BadInput, match="the text of 'prompt'"):
        encode_png(IMAGES["grey"], {"prompt": value})

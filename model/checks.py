"""Look at a checkpoint before any library parses it: folders, JSON, safetensors headers, NaN and infinity.

Pure Python and numpy. Everything found wrong is a CheckpointError that names the file and the remedy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, CheckpointError

__all__ = ["Tensor", "check_finite", "read_header", "read_json", "weight_files"]

MAX_JSON = 10 << 20
"""Configurations are kilobytes; tokenizer.json, the largest JSON of a checkpoint, is a few megabytes."""

MAX_HEADER = 100 << 20
"""The limit of the format: github.com/huggingface/safetensors, README, "Format"."""

SIZES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1},
    **{"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
"""Bytes of the element types models are published in; FP8 and smaller are not sources to export from."""

AGAIN = "download the file again"


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Position of its first byte in the file."""

    def count(self) -> int:
        return prod(self.shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint."""
    try:
        if file.stat().st_size > MAX_JSON:
            raise CheckpointError(
                f"{file} has {file.stat().st_size:,} bytes", expected=f"at most {MAX_JSON:,}"
            )
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", fix="download the model again, with every file") from None
    except OSError as error:
        raise CheckpointError(
            f"{file} cannot be read ({error.strerror})", fix="check its permissions"
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{file} is not valid JSON", fix=AGAIN) from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} holds {type(data).__name__}", expected="a JSON object", fix=AGAIN)
    return data


def read_prompts(file: Path) -> list[str]:
    """One prompt a line; empty lines do not count. Raises BadInput for a file that is none, or holds none."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} cannot be read ({error})", expected="prompts in UTF-8, one a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise BadInput(f"{file} holds no prompt", expected="one a line")
    return prompts


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one component, shards in order.

    Raises CheckpointError for a folder without any, saying what lies there instead.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing", fix="download the model again, with every component")
    found = sorted(folder.glob("*.safetensors"))
    plain = [file for file in found if ".fp16." not in file.name and ".non_ema." not in file.name]
    if plain or found:
        return plain or [file for file in found if ".fp16." in file.name]
    pickles = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    if pickles:
        raise CheckpointError(
            f"{folder} has its weights as {pickles[0]}, a pickle, which can run code",
            expected="*.safetensors",
            fix="convert it with diffusers: pipe.save_pretrained(folder, safe_serialization=True)",
        )
    raise CheckpointError(f"{folder} has no *.safetensors", fix="download the model again, with its weights")


def read_header(file: Path) -> list[Tensor]:
    """Every tensor of a safetensors file, after checking that the header and the file's length agree.

    Format: 8 bytes little-endian header length, a JSON header, the data; github.com/huggingface/safetensors.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(1024)
            _refuse_lookalikes(file, start, size)
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER or 8 + length > size:
                raise CheckpointError(
                    f"{file} is not a whole safetensors file: it has {size:,} bytes and claims a header of {length:,}",
                    fix=AGAIN,
                )
            stream.seek(8)
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})", fix="check the path") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{file} is not a safetensors file: its header is not JSON", fix=AGAIN
        ) from None
    tensors = (
        [] if not isinstance(header, dict) else [_entry(file, k, v, 8 + length) for k, v in header.items()]
    )
    tensors = [tensor for tensor in tensors if tensor.dtype]
    needed = max((tensor.begin + tensor.count() * SIZES[tensor.dtype] for tensor in tensors), default=0)
    if not tensors or needed != size:
        raise CheckpointError(
            f"{file} is {'truncated' if needed > size else 'damaged'}: it has {size:,} bytes",
            expected=f"{needed:,} for its {len(tensors)} tensors",
            fix=AGAIN,
        )
    return tensors


def _refuse_lookalikes(file: Path, start: bytes, size: int) -> None:
    """What people get instead of weights: nothing, a Git LFS pointer, a web page, a pickle."""
    text = start.lstrip().lower()
    if size == 0:
        raise CheckpointError(f"{file} is empty", expected="a safetensors file", fix=AGAIN)
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the weights", fix="run git lfs pull")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{file} is a web page, not weights", fix=AGAIN + ", logged in where the model asks"
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise CheckpointError(
            f"{file} is a pickle, which can run code", expected="a safetensors file", fix=AGAIN
        )
    if size < 8:
        raise CheckpointError(f"{file} has {size} bytes", expected="a safetensors file", fix=AGAIN)


def _entry(file: Path, name: str, entry: Any, data: int) -> Tensor:
    if name == "__metadata__":
        return Tensor(name, "", (), 0)
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(size) is int and size >= 0 for size in (*shape, begin, end))
        if dtype in SIZES and whole and end - begin == prod(shape) * SIZES[dtype]:
            return Tensor(name, dtype, shape, data + begin)
    except (KeyError, TypeError, ValueError):
        pass
    said = json.dumps(entry)[:100]
    raise CheckpointError(
        f"{file}: tensor {name[:80]!r} is described as {said}",
        expected=f"a shape, a type out of {', '.join(SIZES)}, and offsets that fit",
        fix=AGAIN,
    )


def check_finite(files: Iterator[Path] | list[Path]) -> None:
    """Read every weight once. Raises CheckpointError naming the first tensor with NaN or infinity, and how many."""
    for file in files:
        for tensor in read_header(file):
            bad = _not_finite(file, tensor)
            if bad:
                raise CheckpointError(
                    f"{file}: tensor {tensor.name} has {bad:,} NaN or infinite values out of {tensor.count():,}",
                    expected="finite weights",
                    fix="take an earlier checkpoint of the training, or download the file again",
                )


_EXPONENTS: Mapping[str, tuple[str, int]] = {
    # numpy type of the raw bits, and the exponent bits that are all set in NaN and infinity (IEEE 754; bfloat16)
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def _not_finite(file: Path, tensor: Tensor) -> int:
    if tensor.dtype not in _EXPONENTS or tensor.count() == 0:
        return 0
    kind, mask = _EXPONENTS[tensor.dtype]
    step = 1 << 22  # elements at a time, so that memory stays small whatever the tensor
    bad = 0
    with open(file, "rb") as stream:
        stream.seek(tensor.begin)
        for start in range(0, tensor.count(), step):
            bits = np.fromfile(stream, kind, min(step, tensor.count() - start))
            bad += int(np.count_nonzero((bits & mask) == mask))
    return bad

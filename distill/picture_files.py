"""The files of a folder or of a zip, and pictures from their bytes: never trusted, always whole or an error."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.libraries import library
from ..runtime.errors import BadInput

__all__ = ["KINDS", "Files", "Unreadable", "open_files", "pixels_of"]

Array = NDArray[Any]

KINDS = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_BYTES = 256 * 2**20
"""Of one picture's file: what is larger is no photograph but a bomb, or a mistake."""


class Unreadable(Exception):
    """One picture that cannot be read, and why."""


def pixels_of(data: bytes, size: tuple[int, int]) -> Array:
    """A file's bytes -> uint8 [height, width, 3]. Raises Unreadable saying why."""
    pil = library("PIL.Image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pil.DecompressionBombWarning)  # 89 million pixels, says Pillow
            warnings.filterwarnings(
                "ignore", category=UserWarning
            )  # odd metadata of a picture that reads well
            with pil.open(io.BytesIO(data)) as opened:
                opened.load()  # here it shows whether the file is whole
                image = library("PIL.ImageOps").exif_transpose(opened)
    except (
        Exception
    ) as error:  # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, ...
        raise Unreadable(str(error).splitlines()[0][:160] if str(error) else type(error).__name__) from None
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
        image = pil.fromarray((np.asarray(image).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pil.new("RGBA", image.size, "white")
        image = pil.alpha_composite(white, image)
    height, width = size
    fitted = library("PIL.ImageOps").fit(image.convert("RGB"), (width, height), method=pil.Resampling.LANCZOS)
    return np.asarray(fitted)


@dataclass(frozen=True)
class Files:
    """The files of a folder or of a zip, by their names inside it."""

    source: Path
    members: Mapping[str, Any]
    archive: zipfile.ZipFile | None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *error: object) -> None:
        if self.archive is not None:
            self.archive.close()

    def pictures(self) -> tuple[str, ...]:
        return tuple(name for name in self.members if name.lower().endswith(KINDS))

    def others(self, ends: tuple[str, ...]) -> list[str]:
        return [name for name in self.members if name.endswith(ends)]

    def stamp(self, name: str) -> tuple[int, int]:
        """What changes with the file: its size, and its checksum in a zip or its time in a folder."""
        member = self.members[name]
        if self.archive is not None:
            return member.file_size, member.CRC
        status = member.stat()
        return status.st_size, status.st_mtime_ns

    def read(self, name: str) -> bytes:
        """Raises Unreadable saying why."""
        if (size := self.stamp(name)[0]) > LARGEST_BYTES:
            raise Unreadable(f"{size / 2**20:.0f} MiB, more than {LARGEST_BYTES // 2**20}")
        try:
            data = self.members[name].read_bytes() if self.archive is None else self.archive.read(name)
        except Exception as error:  # a damaged or encrypted member raises zlib's, zipfile's or RuntimeError
            raise Unreadable(str(error)[:160]) from None
        return bytes(data)

    def text(self, name: str) -> str:
        try:
            return self.read(name).decode("utf-8-sig")
        except (Unreadable, UnicodeDecodeError) as error:
            raise BadInput(f"{self.source}: {name} cannot be read ({error})", expected="UTF-8 text") from None


def open_files(source: Path) -> Files:
    """Raises BadInput for what is neither a folder nor a sound zip, and for names that lead out of a zip."""
    source = Path(source)
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file())
        inside = {path.relative_to(source).as_posix(): path for path in paths}
        return Files(source, {name: path for name, path in inside.items() if _shown(name)}, None)
    if not source.is_file():
        raise BadInput(
            f"{source} does not exist", expected="a folder or a .zip of pictures", fix="check the path"
        )
    try:
        archive = zipfile.ZipFile(source)
    except (zipfile.BadZipFile, OSError) as error:
        raise BadInput(
            f"{source} is no zip ({error})",
            expected="a folder or a .zip of pictures",
            fix="pack or fetch it again",
        ) from None
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    if strange := [name for name in members if _leads_out(name)]:
        archive.close()
        raise BadInput(
            f"{source}: {strange[0]!r} leads out of the archive",
            expected="relative names without '..'",
            fix="do not trust this file",
        )
    return Files(source, {name: members[name] for name in sorted(members) if _shown(name)}, archive)


def _shown(name: str) -> bool:
    """Not hidden, and not what macOS puts beside the files of a zip."""
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _leads_out(name: str) -> bool:
    return name.startswith("/") or "\\" in name or ":" in name.split("/")[0] or ".." in name.split("/")

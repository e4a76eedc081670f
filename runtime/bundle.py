"""A bundle on disk: a folder with manifest.json and the files it lists, nothing else.

spec/bundle.md is the format. Reading refuses what is not exactly that; writing leaves a whole bundle or none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from .atenfile import GRAPH as ATEN_GRAPH
from .atenfile import WEIGHTS as ATEN_WEIGHTS
from .atenfile import check_aten
from .coremlfile import check_packages
from .errors import BundleError, OutputError
from .files import (
    folder_size,
    output_error,
    output_errors,
    remove,
    remove_stale,
    rename_folder,
    sync_folder,
    temporary_name,
)
from .graphfile import check_graph
from .irfile import check_ir
from .manifest import NAME, VERSION_KEY, FileSpec, Manifest
from .plainfiles import read_plain, walk
from .strictjson import MAX_BYTES, loads
from .tflitefile import check_tflite

__all__ = ["Bundle", "BundleWriter"]

AGAIN = "download or export the bundle again"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files were checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, check: Literal["hash", "size"] = "hash") -> Bundle:
        """Read and check the bundle in folder `path`.

        check  "hash": every byte is hashed and every graph goes through `check_graphs`, for a bundle that has
               just arrived. "size": only names, kinds and sizes, for one this machine has checked before.
        Raises BundleError naming the file at fault and the remedy.
        """
        path = Path(path)
        folder = Path(os.path.abspath(path))
        if not (folder / NAME).exists():
            raise _not_a_bundle(path)
        raw = b"".join(read_plain(folder, NAME, MAX_BYTES))
        manifest = Manifest.from_json(raw)
        for name in sorted(manifest.files):  # before the walk, which would call the folder it left "empty"
            if not os.path.lexists(folder / name):
                raise BundleError(f"{path}: {name} is missing", fix=AGAIN)
        found = set(walk(folder))
        for name in sorted(found - manifest.files.keys() - {NAME}):
            raise BundleError(f"{path}: {name!r} is not listed in {NAME}", fix="delete it, or " + AGAIN)
        for name, spec in manifest.files.items():
            digest = hashlib.sha256()
            size = 0
            for block in read_plain(folder, name, spec.bytes, exact=True, content=check == "hash"):
                digest.update(block)
                size += len(block)
            if check == "hash" and (size != spec.bytes or digest.hexdigest() != spec.sha256):
                raise BundleError(
                    f"{path}: {name} has been changed or damaged: its sha256 is {digest.hexdigest()}",
                    expected=spec.sha256,
                    fix=AGAIN,
                )
        bundle = cls(folder, manifest)
        if check == "hash":
            bundle.check_graphs()
        return bundle

    def file(self, name: str) -> Path:
        """The full path of a listed file. Raises BundleError for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: {name[:80]!r} is not listed in {NAME}", fix=AGAIN)
        return self.path / name

    def check_graphs(self) -> None:
        """Pass every graph through the gate of its format: the modules *file.py beside this. Raises BundleError."""
        for graph in sorted({part.graph for part in self.manifest.parts.values()}):
            if graph.endswith(".onnx"):
                folder = graph.rpartition("/")[0]
                beside = {
                    name.rpartition("/")[2]
                    for name in self.manifest.files
                    if name.rpartition("/")[0] == folder
                }
                check_graph(self.file(graph), beside - {graph.rpartition("/")[2]})
            elif graph.endswith(".xml"):
                check_ir(self.file(graph), self.file(graph.removesuffix(".xml") + ".bin"))
            elif graph.endswith(".tflite"):
                check_tflite(self.file(graph))
            elif graph.endswith(f"/{ATEN_GRAPH}"):
                check_aten(self.file(graph), self.file(graph.removesuffix(ATEN_GRAPH) + ATEN_WEIGHTS))
            elif graph.endswith(".mlpackage/Manifest.json"):
                check_packages(self.file(graph))


def _not_a_bundle(path: Path) -> BundleError:
    """Say what `path` is instead of a bundle, and what to do with that."""
    if not path.exists():
        return BundleError(f"{path} does not exist", expected="the folder of a bundle", fix="check the path")
    if not path.is_dir():
        return BundleError(
            f"{path} is a file", expected="the folder of a bundle", fix="unpack it, or export it"
        )
    names = sorted(os.listdir(path))
    if "model_index.json" in names:
        fix = f"run fewstep export {path}"
        return BundleError(f"{path} is a diffusers checkpoint, not a bundle: it has no {NAME}", fix=fix)
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return BundleError(
        f"{path} has no {NAME}, only: {shown or 'nothing'}", fix="run fewstep export to make a bundle"
    )


class BundleWriter:
    """Write a bundle completely or not at all.

    with BundleWriter(dest) as writer:
        ...  # put files into writer.folder
        writer.commit(manifest)  # hashes them, lists them and gives the folder its name

    `folder` lies beside `dest`, on the same file system, as .NAME.tmp-PID-RANDOM. Leaving the block in any way
    without a commit removes it; what a killed process left is removed by the next writer to the same place.
    """

    def __init__(self, dest: Path | str, overwrite: bool = False, *, size: int | None = None) -> None:
        """dest       the folder to be: new, empty, or with `overwrite` a fewstep bundle to replace
        size       bytes the bundle will take, where known: checked against the free space before any work
        """
        self.dest = Path(os.path.abspath(dest))
        self.overwrite = overwrite
        self.size = size
        self.folder = self.dest  # until __enter__

    def __enter__(self) -> BundleWriter:
        """Raises OutputError if the bundle could not be put there in the end."""
        remove_stale(self.dest)
        with output_errors(self.dest, size=self.size):
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            self._check_dest()
            if self.size is not None and self.size > shutil.disk_usage(self.dest.parent).free:
                raise OSError(errno.ENOSPC, "not enough space on this disk")
            folder = temporary_name(self.dest)
            folder.mkdir()
        self.folder = folder
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.folder == self.dest:
            return  # committed
        written = folder_size(self.folder)
        remove(self.folder)
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
        if isinstance(error, OSError) and not isinstance(error, OutputError) and error.errno in full:
            # whoever filled the folder ran out of space: say so in our words
            raise output_error(error, self.dest, size=self.size or written) from error

    def commit(self, manifest: Manifest) -> Path:
        """List and hash the files in `folder`, write manifest.json, rename to `dest` and return it.

        `manifest.files` is filled in here. Raises BundleError for what `Bundle.open` would refuse, OutputError
        where the disk refuses; nothing stays behind then.
        """
        assert self.folder != self.dest, "commit once, inside the with block"
        with output_errors(self.dest, size=self.size):
            files = {name: _hashed(self.folder, name) for name in sorted(walk(self.folder))}
            manifest = replace(manifest, files=files)
            text = manifest.to_json().encode()
            Manifest.from_json(text)
            written = sum(file.bytes for file in files.values()) + len(text)
        with output_errors(self.dest, size=written):
            with open(self.folder / NAME, "xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            for folder in {(self.folder / name).parent for name in files} | {self.folder}:
                sync_folder(folder)
            self._check_dest()
            rename_folder(self.folder, self.dest)
            remove(self.folder)  # where the old bundle is now, if there was one
            self.folder = self.dest
            sync_folder(self.dest.parent)
        return self.dest

    def _check_dest(self) -> None:
        """Raise OutputError unless `dest` is free, an empty folder, or a bundle that may be overwritten."""
        if not os.path.lexists(self.dest):
            return
        if self.dest.is_symlink() or not self.dest.is_dir():
            raise OutputError(f"{self.dest} exists and is no folder", fix="pick another path")
        if not os.listdir(self.dest):
            return
        if not _is_bundle(self.dest):
            raise OutputError(
                f"{self.dest} exists and is not a fewstep bundle",
                fix="pick a path that does not exist, or empty it",
            )
        if not self.overwrite:
            raise OutputError(
                f"{self.dest} exists", fix="pick another path, or ask for overwriting (--overwrite)"
            )


def _is_bundle(folder: Path) -> bool:
    """Whether the folder's manifest says it is ours, of whatever version."""
    try:
        data = loads(b"".join(read_plain(folder, NAME, MAX_BYTES)), NAME)
    except BundleError:
        return False
    return isinstance(data, dict) and VERSION_KEY in data


def _hashed(folder: Path, name: str) -> FileSpec:
    """Flush one file of the new bundle to the disk, then hash it as a reader will."""
    path = folder / name
    if name == NAME:
        raise BundleError(f"{path} is in the way", fix=f"leave {NAME} to commit()")
    if path.is_file() and not path.is_symlink():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    size = path.lstat().st_size
    digest = hashlib.sha256()
    for block in read_plain(folder, name, size, exact=True):
        digest.update(block)
    return FileSpec(digest.hexdigest(), size)

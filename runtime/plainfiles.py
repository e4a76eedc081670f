"""Reading the files of a bundle: plain files of their own, and nothing that leads elsewhere."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import BundleError

__all__ = ["plain_size", "read_plain", "walk"]

MAX_FILES = 10_000
"""A bundle has tens of files; beyond this a folder is not walked further."""

AGAIN = "download or export the bundle again"


def walk(folder: Path, prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Names of everything in `folder` that is not a real folder, relative and with forward slashes."""
    count = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            count += 1
            if count > MAX_FILES or depth > 16:  # deeper than any path the manifest could list usefully
                raise BundleError(f"{folder} holds too many files or folders", expected="a bundle", fix=AGAIN)
            if entry.is_symlink():
                raise _link(Path(entry.path))
            if entry.is_dir(follow_symlinks=False):
                inside = list(walk(Path(entry.path), f"{prefix}{entry.name}/", depth + 1))
                if not inside:
                    raise BundleError(f"{prefix}{entry.name} is an empty folder", fix="delete it")
                yield from inside
            else:
                yield prefix + entry.name


def _link(path: Path) -> BundleError:
    return BundleError(f"{path} is a symbolic link", expected="a plain file", fix="put the file itself there")


def read_plain(
    folder: Path, name: str, size: int, *, exact: bool = False, content: bool = True
) -> Iterator[bytes]:
    """The bytes of one file of a bundle, after checking what the opened file, not its name, is.

    size   bytes it must have (`exact`) or may have at most
    Raises BundleError for a link, a hard link, anything that is not a plain file, and another size.
    """
    path = folder / name
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    try:
        if path.is_symlink():  # O_NOFOLLOW says the same, but Windows has none
            raise OSError(errno.ELOOP, "symlink")
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _link(path) from None
        raise BundleError(
            f"{path} cannot be opened ({error.strerror})", fix="check its permissions"
        ) from None
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise BundleError(f"{path} is a folder or a device", expected="a plain file", fix=AGAIN)
        if info.st_nlink > 1:
            raise BundleError(
                f"{path} is a hard link: {info.st_nlink} names lead to this file",
                expected="a file of its own",
                fix="copy the bundle (cp -r) and open the copy",
            )
        if info.st_size != size if exact else info.st_size > size:
            expected = f"{size:,}" if exact else f"at most {size:,}"
            raise BundleError(f"{path} has {info.st_size:,} bytes", expected=expected, fix=AGAIN)
        left = (
            size + 1 if content else 0
        )  # one more than allowed, to notice a file that grows while it is read
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            left -= len(block)
            yield block


def plain_size(path: Path) -> int:
    """Bytes of a file, after the checks of `read_plain`, without opening it."""
    try:
        info = path.lstat()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}", fix=AGAIN) from None
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        raise BundleError(
            f"{path} is a link, a folder or a device", expected="a plain file", fix="copy the file here"
        )
    return info.st_size

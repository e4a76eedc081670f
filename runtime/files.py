"""Writing to disk so that a reader sees the old thing or the new thing, never half of one.

Everything fewstep writes goes through here or through bundle.BundleWriter: a temporary name in the same
folder, fsync, rename, fsync of the folder (Pillai et al., OSDI 2014: rename without fsync is the classic
way to lose both versions).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

__all__ = [
    "atomic_write",
    "folder_size",
    "output_errors",
    "remove_stale",
    "rename_folder",
    "sync_folder",
    "temporary_name",
]

_REMEDIES = {
    errno.ENOSPC: "free some space or write to another disk",
    errno.EDQUOT: "free some of your quota or write to another disk",
    errno.EFBIG: "raise the file size limit (ulimit -f) or write to a file system that takes larger files",
    errno.EROFS: "write to a folder on a writable disk",
    errno.EACCES: "pick a folder you may write to",
    errno.EPERM: "pick a folder you may write to",
    errno.ENOTDIR: "a folder of this path is a file: pick another path",
    errno.EEXIST: "pick a path that does not exist yet",
    errno.EISDIR: "this path is a folder: pick another path",
    errno.ENOENT: "create the folder first",
    errno.ENAMETOOLONG: "pick a shorter name",
}

_live: set[str] = set()
"""Temporary names this process is writing to: in a restarted container the dead may have had our pid."""


def output_error(error: OSError, path: Path, *, size: int | None = None) -> OutputError:
    """Say what an OSError means to the one who asked for `path`. `size`: bytes that had to fit, if known."""
    found = f"cannot write {path}: {(error.strerror or str(error)).lower()}"
    if size is not None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        found += f" (at least {size:,} bytes needed"
        with suppress(OSError):
            folder = next(p for p in (path, *path.parents) if p.is_dir())
            found += f", {shutil.disk_usage(folder).free:,} free"
        found += ")"
    return OutputError(found, fix=_REMEDIES.get(error.errno or 0, "pick another path, or check the disk"))


@contextmanager
def output_errors(path: Path, *, size: int | None = None) -> Iterator[None]:
    """Every OSError inside becomes an OutputError naming `path`, the bytes needed and the remedy."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise output_error(error, path, size=size) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut. Windows has no such call and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(dest: Path) -> Path:
    """A fresh name beside `dest`, on the same file system; it carries our pid so that `remove_stale` can
    judge it.
    """
    temporary = dest.with_name(f".{dest.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    _live.add(temporary.name)
    return temporary


def remove(path: Path) -> None:
    """Remove a file or folder of ours, whatever state it is in."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    _live.discard(path.name)


def remove_stale(dest: Path) -> None:
    """Clear away what processes that died while writing `dest` left beside it.

    `.old-` is the previous version, moved aside in the middle of a swap: it goes back if nothing took its
    place.
    """
    pattern = re.compile(re.escape(f".{dest.name}.") + r"(tmp|old)-(\d{1,10})-[0-9a-f]{8}")
    try:
        names = os.listdir(dest.parent)
    except OSError:
        return  # whoever writes next gets the same error with a remedy
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or name in _live or (int(match[2]) != os.getpid() and _alive(int(match[2]))):
            continue
        if match[1] == "old" and not os.path.lexists(dest):
            with suppress(OSError):
                os.rename(dest.parent / name, dest)
        else:
            remove(dest.parent / name)


def _alive(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill(pid, 0) would send Ctrl-C there
        import ctypes

        handle = ctypes.windll.kernel32.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        ctypes.windll.kernel32.CloseHandle(handle)
        return bool(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # someone else's, or a pid of a larger system: not ours to judge
    return True


def rename_folder(folder: Path, dest: Path) -> None:
    """Give `folder` the name `dest`; what was there ends up as `folder`, in one step where the system can."""
    if not dest.exists() or not os.listdir(dest):
        if os.name == "nt" and dest.exists():
            dest.rmdir()  # POSIX rename replaces an empty folder by itself
        os.rename(folder, dest)
    elif not _exchange(folder, dest):
        aside = folder.with_name(folder.name.replace(".tmp-", ".old-"))
        os.rename(dest, aside)  # killed here: remove_stale puts it back
        try:
            os.rename(folder, dest)
        except OSError:
            os.rename(aside, dest)
            raise
        remove(aside)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux renameat2, macOS renamex_np); False where the system cannot."""
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            at_cwd, exchange = -100, 2  # linux/fcntl.h AT_FDCWD, linux/fs.h RENAME_EXCHANGE
            return bool(library.renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0)
        if sys.platform == "darwin":
            return bool(library.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0)  # sys/stdio.h RENAME_SWAP
    except (OSError, TypeError, AttributeError):  # no such library, or no such call in it
        pass
    return False


def folder_size(folder: Path) -> int:
    """Bytes of all files below `folder`, as far as they can be counted."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def atomic_write(path: Path | str, data: bytes) -> None:
    """Write a file completely or not at all; an existing file is replaced in one step.

    Raises OutputError, and leaves nothing behind, where it cannot be written.
    """
    path = Path(os.path.abspath(path))
    remove_stale(path)
    with output_errors(path, size=len(data)):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        temporary = temporary_name(path)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            remove(temporary)

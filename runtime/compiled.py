"""What an engine compiles on this device from a bundle's graph, kept for the next start: engines, kernels, programs.

Such files are programs, so none is ever taken from elsewhere. An entry is used only when this user's own process wrote
it, for this very graph, device, driver and library; anything else is a miss, and is made again from the graph.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from .errors import OutputError
from .files import atomic_write, output_errors, remove, remove_stale, temporary_name

__all__ = ["cache_folder", "compiled", "find", "hash_files", "keep"]

VARIABLE = "FEWSTEP_CACHE"
"""Environment variable that names another folder for all of it."""

SECRET = "secret"
SECRET_BYTES = 32
"""As long as the hash (RFC 2104, section 3)."""
MAX_RECORD = 1 << 16


def cache_folder() -> Path:
    """Where this user's compiled graphs lie; nothing is made."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fewstep" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fewstep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def hash_files(*files: Path) -> str:
    """sha256 of the sizes and contents of files that exist, in order."""
    digest = hashlib.sha256()
    for file in files:
        if file.exists():
            digest.update(file.stat().st_size.to_bytes(8, "big"))
            with open(file, "rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def compiled(
    engine: str, key: Mapping[str, str], make: Callable[[Path], object], suffix: str = "bin"
) -> Path:
    """The file that `make` makes, from the cache where it is there and ours; see `find` and `keep`."""
    return find(engine, key, suffix) or keep(engine, key, make, suffix)


def find(engine: str, key: Mapping[str, str], suffix: str = "bin") -> Path | None:
    """The file of that key, or None unless all of it is as this user's own process wrote it.

    engine  a folder of its own in the cache
    key     all that the file depends on: `graph` (a hash), `device`, `what` it is, versions of driver and library
    Raises OutputError where others can write to the cache.
    """
    folder = cache_folder() / engine
    file, record = _names(folder, key, suffix)
    return file if _is_ours(file, record, key, _secret(folder)) else None


def keep(engine: str, key: Mapping[str, str], make: Callable[[Path], object], suffix: str = "bin") -> Path:
    """The file that `make` makes, at the path it is given; other versions for that graph and device go.

    Raises OutputError where the cache cannot be written, and what `make` raises; nothing stays behind then.
    """
    folder = cache_folder() / engine
    secret = _secret(folder)
    file, record = _names(folder, key, suffix)
    remove_stale(file)
    temporary = temporary_name(file)
    try:
        make(temporary)
        with output_errors(file):
            with open(temporary, "rb+") as made:
                os.fsync(made.fileno())
            seal = _seal(temporary, key, secret)
            os.replace(temporary, file)
        atomic_write(record, json.dumps({"key": dict(key), "hmac_sha256": seal}).encode())
    finally:
        remove(temporary)
    _drop_older(folder, key, record.stem)
    return file


def _names(folder: Path, key: Mapping[str, str], suffix: str) -> tuple[Path, Path]:
    name = hashlib.sha256(_text(key)).hexdigest()
    return folder / f"{name}.{suffix}", folder / f"{name}.json"


def _is_ours(file: Path, record: Path, key: Mapping[str, str], secret: bytes) -> bool:
    """Whether both files are plain, of this user alone, and say what this user's key seals."""
    try:
        if not (_plain(file) and _plain(record)) or record.stat().st_size > MAX_RECORD:
            return False
        said = json.loads(record.read_text(encoding="utf-8"))
        return (
            isinstance(said, dict)
            and said.get("key") == dict(key)
            and isinstance(said.get("hmac_sha256"), str)
            and hmac.compare_digest(said["hmac_sha256"].encode(), _seal(file, key, secret).encode())
        )
    except (OSError, ValueError):  # ValueError: neither UTF-8 nor JSON
        return False


def _plain(file: Path) -> bool:
    info = file.lstat()
    return stat.S_ISREG(info.st_mode) and info.st_nlink == 1 and _only_ours(info)


def _only_ours(info: os.stat_result) -> bool:
    """Whether no other user can write it. Windows keeps a profile's folders to their user by itself."""
    if os.name == "nt":
        return True
    return info.st_uid == os.geteuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _seal(file: Path, key: Mapping[str, str], secret: bytes) -> str:
    """HMAC-SHA256 of the key and the file: what nobody without this cache's secret can write down."""
    seal = hmac.new(secret, digestmod=hashlib.sha256)
    seal.update(hashlib.sha256(_text(key)).digest())
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            seal.update(block)
    return seal.hexdigest()


def _text(key: Mapping[str, str]) -> bytes:
    return json.dumps(dict(key), sort_keys=True).encode()


def _secret(folder: Path) -> bytes:
    """Of this cache, made at its first use. An entry copied from another machine was sealed with another."""
    path = folder / SECRET
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.is_symlink() or not _only_ours(folder.stat()):
            raise OutputError(
                f"others can write to {folder}, where compiled graphs are kept",
                expected="a folder only you can write to",
                fix=f"chmod go-w {folder}, or set {VARIABLE} to a folder of your own",
            )
        try:
            if _plain(path) and len(found := path.read_bytes()) == SECRET_BYTES:
                return found
        except FileNotFoundError:
            pass
        made = secrets.token_bytes(SECRET_BYTES)
        temporary = temporary_name(path)
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(made)
            os.replace(temporary, path)
        finally:
            remove(temporary)
        return path.read_bytes()  # another process may have been quicker


def _drop_older(folder: Path, key: Mapping[str, str], name: str) -> None:
    """Entries for the same graph on the same device, made by another driver or library."""
    for record in folder.glob("*.json"):
        if record.stem == name:
            continue
        try:
            said = json.loads(record.read_text(encoding="utf-8"))["key"]
            same = all(said[part] == key[part] for part in ("graph", "device", "what"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if same:
            for file in folder.glob(f"{record.stem}.*"):
                remove(file)

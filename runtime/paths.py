"""File names from a manifest: what may be joined to a folder without leaving it, on any system."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

from .errors import BundleError

__all__ = ["check_path", "check_paths"]

NAME = "manifest.json"

MAX_PATH = 200
"""Characters of a path: Windows takes 260 in all, and the bundle's own folder needs some."""

_FORBIDDEN = re.compile(r'[\\:*?"<>|\x00-\x1f\x7f-\x9f\u2028\u2029]')
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])", re.IGNORECASE)


def check_path(path: str) -> None:
    """Raise BundleError unless `path` names a place inside the bundle, and the same one, on every system."""
    reason = ""
    if not 0 < len(path) <= MAX_PATH:
        reason = f"{len(path)} characters"
    elif path.startswith("/"):
        reason = "an absolute path"
    elif match := _FORBIDDEN.search(path):
        reason = f"the character {match[0]!r}"
    elif any(0xD800 <= ord(c) <= 0xDFFF for c in path) or unicodedata.normalize("NFC", path) != path:
        reason = "not Unicode in NFC form"
    else:
        for part in path.split("/"):
            if part in ("", ".", ".."):
                reason = f"the step {part!r}"
            elif part != part.strip(" ").rstrip("."):
                reason = f"{part!r} begins with a space, or ends with a space or a dot"
            elif _DEVICE.fullmatch(part.split(".")[0].rstrip(" ")):
                reason = f"{part!r} is a device on Windows"
    if reason:
        raise BundleError(
            f"{NAME}: file {path[:80]!r}: {reason}",
            expected=f"a relative path of at most {MAX_PATH} characters with forward slashes",
            fix="do not use this bundle unless you know who made it; export it again",
        )


def check_paths(paths: Iterable[str]) -> None:
    """Raise BundleError unless all paths are safe and stay different files where case does not count."""
    seen: dict[str, str] = {NAME: NAME}
    folders: dict[str, str] = {}
    for path in paths:
        check_path(path)
        folded = unicodedata.normalize("NFC", path.casefold())
        if folded in seen:
            raise BundleError(
                f"{NAME}: files {seen[folded]!r} and {path!r} are one file where case does not count",
                fix="rename one and export again",
            )
        seen[folded] = path
        for parent in PurePosixPath(folded).parents:
            folders[str(parent)] = path
    for folded, path in folders.items():
        if folded in seen:
            raise BundleError(
                f"{NAME}: {seen[folded]!r} is both a file and the folder of {path!r}", fix="rename one"
            )

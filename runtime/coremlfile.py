"""A gate for Core ML packages: what a stranger's .mlpackage must be before coremltools or Core ML sees a byte of it.

A package is a folder of three files: Manifest.json, which names the other two, a protobuf with the program, and the
weights. Here every path is one of three known ones; milfile.py looks at the program.
"""

from __future__ import annotations

from pathlib import Path

from .errors import BundleError
from .milfile import check_program
from .plainfiles import plain_size, read_plain, walk
from .strictjson import loads

__all__ = ["MANIFEST", "MODEL", "WEIGHTS", "check_packages", "packages_of"]

MANIFEST = "Manifest.json"
MODEL = "com.apple.CoreML/model.mlmodel"
WEIGHTS = "com.apple.CoreML/weights"
FILES = {MANIFEST, f"Data/{MODEL}", f"Data/{WEIGHTS}/weight.bin"}
AGAIN = "download or export the bundle again"
MAX_MANIFEST = 64 << 10
"""Bytes; coremltools writes 617."""
MAX_MODEL = 256 << 20
"""Bytes of the program. That of SD-1.5's U-Net has 1 MB."""
MAX_CHUNKS = 16
"""Apple's Swift package reads two."""


def packages_of(manifest: Path) -> list[Path]:
    """The packages a graph consists of, in the order they run.

    manifest  Manifest.json of the first; where that is NAMEChunk1.mlpackage, NAMEChunk2.mlpackage beside it follows
    """
    package = manifest.parent
    if not package.name.endswith("Chunk1.mlpackage"):
        return [package]
    stem = package.name.removesuffix("1.mlpackage")
    chunks = [package.with_name(f"{stem}{number}.mlpackage") for number in range(1, MAX_CHUNKS + 1)]
    return [chunk for chunk in chunks if chunk.is_dir()]


def check_packages(manifest: Path) -> None:
    """Refuse packages that are damaged, or would make a parser read, compute or allocate what it must not.

    manifest  Manifest.json of the only or the first package
    Reads structure only: time grows with the number of operators, not with the weights. Raises BundleError naming the
    package and the operator.
    """
    if manifest.name != MANIFEST or manifest.parent.suffix != ".mlpackage":
        raise BundleError(
            f"{manifest.name} is no Core ML package",
            expected="Manifest.json of a folder NAME.mlpackage",
            fix="export the bundle again",
        )
    for package in packages_of(manifest):
        _check_package(package)


def _check_package(package: Path) -> None:
    found = set(walk(package))
    for name in sorted(found ^ FILES):
        what = "is missing" if name in FILES else "does not belong there"
        raise BundleError(
            f"{package.name}: {name[:80]!r} {what}", expected=", ".join(sorted(FILES)), fix=AGAIN
        )
    _check_manifest(package)
    model, weights = package / "Data" / MODEL, package / "Data" / WEIGHTS / "weight.bin"
    size = plain_size(model)
    if not 0 < size <= MAX_MODEL:
        raise BundleError(
            f"{package.name}: a program of {size:,} bytes", expected=f"1 to {MAX_MODEL:,}", fix=AGAIN
        )
    if plain_size(weights) < 64:
        raise BundleError(
            f"{package.name}: its weights are cut short", expected="64 bytes or more", fix=AGAIN
        )
    check_program(package.name, model, weights)


def _check_manifest(package: Path) -> None:
    """Manifest.json: exactly the two items of every package, at exactly their places."""
    where = f"{package.name}/{MANIFEST}"
    raw = b"".join(read_plain(package, MANIFEST, MAX_MANIFEST))
    data = loads(raw, where)

    def refuse(found: str, expected: str = "") -> BundleError:
        return BundleError(f"{where}: {found}", expected=expected, fix=AGAIN)

    known = {"fileFormatVersion", "itemInfoEntries", "rootModelIdentifier"}
    if not isinstance(data, dict) or set(data) != known:
        raise refuse("other keys than a package has", ", ".join(sorted(known)))
    if data["fileFormatVersion"] != "1.0.0":
        raise refuse(f"format version {str(data['fileFormatVersion'])[:40]!r}", "1.0.0")
    entries = data["itemInfoEntries"]
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise refuse("items that are no objects")
    paths = {}
    for name, entry in entries.items():
        if set(entry) != {"author", "description", "name", "path"} or entry["author"] != "com.apple.CoreML":
            raise refuse(
                f"item {name[:40]!r} has other fields", "author com.apple.CoreML, description, name, path"
            )
        if entry["path"] not in (MODEL, WEIGHTS):
            raise refuse(f"the path {str(entry['path'])[:80]!r}", f"{MODEL} or {WEIGHTS}")
        paths[name] = entry["path"]
    if sorted(paths.values()) != sorted((MODEL, WEIGHTS)):
        raise refuse(f"{len(paths)} items", f"two: {MODEL} and {WEIGHTS}")
    if not isinstance(data["rootModelIdentifier"], str) or paths.get(data["rootModelIdentifier"]) != MODEL:
        raise refuse("the root is not the model", f"the item of {MODEL}")

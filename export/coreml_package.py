"""The three files of a Core ML package, equal bytes for equal content."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..runtime.coremlfile import MODEL, WEIGHTS
from .mil_reference import coremltools, silent

__all__ = ["SPECIFICATION", "write", "write_program"]

SPECIFICATION = 9
"""Of Core ML in iOS 18 and macOS 15, the first with palettes by groups of channels, 4-bit blocks, several functions in
a package and attention as one operator."""


def write_program(program: Any, package: Path) -> None:
    """Write a MIL program as the new folder `package`."""
    ct = coremltools()
    convert = coremltools("coremltools.converters.mil.converter").mil_convert
    empty = coremltools("coremltools.converters.mil.mil.passes.pass_pipeline").PassPipeline.EMPTY
    with tempfile.TemporaryDirectory(dir=package.parent, prefix=".") as work, silent():
        model = convert(
            program,
            "milinternal",
            "mlprogram",
            ct.ComputeUnit.CPU_ONLY,
            pass_pipeline=empty,
            specification_version=SPECIFICATION,
            skip_model_load=True,
            package_dir=str(Path(work) / "model.mlpackage"),
        )
        write(model.get_spec(), Path(model.weights_dir) / "weight.bin", package)


def write(spec: Any, weights: Path, package: Path) -> None:
    """Write a package of a protobuf and its file of weights, which is moved; identifiers come from the content."""
    spec.description.metadata.Clear()  # the date of conversion
    data = spec.SerializeToString(deterministic=True)
    (package / "Data" / WEIGHTS).mkdir(parents=True)
    (package / "Data" / MODEL).write_bytes(data)
    target = package / "Data" / WEIGHTS / "weight.bin"
    if weights.exists():
        shutil.move(weights, target)
    else:  # a program of small constants alone: a header that counts none, in version 2 of the format
        target.write_bytes(bytes((0, 0, 0, 0, 2)).ljust(64, b"\0"))
    digest = sha256(data).hexdigest()
    items = {
        str(uuid.uuid5(uuid.NAMESPACE_OID, f"{digest} {path}")): {
            "author": "com.apple.CoreML",
            "description": description,
            "name": path.rpartition("/")[2],
            "path": path,
        }
        for path, description in ((MODEL, "CoreML Model Specification"), (WEIGHTS, "CoreML Model Weights"))
    }
    root = next(name for name, item in items.items() if item["path"] == MODEL)
    manifest = {"fileFormatVersion": "1.0.0", "itemInfoEntries": items, "rootModelIdentifier": root}
    (package / "Manifest.json").write_text(json.dumps(manifest, indent=4) + "\n", encoding="utf-8")

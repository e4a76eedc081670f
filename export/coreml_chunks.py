"""A Core ML package cut in two of about equal size, which run one after the other and are loaded one at a time."""

from __future__ import annotations

from pathlib import Path

from .mil_reference import coremltools, silent

__all__ = ["chunked"]


def chunked(package: Path, work: Path) -> list[Path]:
    """Cut a package where half of its weights are behind; returns the two in order. The first takes some or all inputs.

    Arrays that cross the cut are outputs of the first and inputs of the second, under the same names, in float32.
    """
    from .coreml import tidy_package

    ct = coremltools()
    raw, tidy = work / "raw", work / "chunks"
    with silent():
        ct.models.utils.bisect_model(str(package), str(raw), check_output_correctness=False)
    found = []
    for number in (1, 2):
        one = raw / f"{package.stem}_chunk{number}.mlpackage"
        with silent():
            spec = ct.models.utils.load_spec(str(one))
        target = tidy / f"{package.stem}Chunk{number}.mlpackage"
        tidy_package(spec, one / "Data" / "com.apple.CoreML" / "weights" / "weight.bin", target)
        found.append(target)
    return found

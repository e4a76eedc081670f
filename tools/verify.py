"""`fewstep verify`: did the bundle arrive whole, and does this host's engine compute what the maker's did?"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ..runtime.errors import GateFailed
from .console import Answer, add_threads, bar, human_bytes

__all__ = ["add", "call", "verify"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    add_threads(parser)


def call(args: argparse.Namespace) -> Answer:
    return verify(args.bundle, threads=args.threads)


def verify(path: Path, *, threads: int | None = None) -> Answer:
    """Hash every file, load every graph, draw the golden latent again.

    Raises BundleError for a damaged bundle, GateFailed where the latent differs.
    """
    from ..runtime import Pipeline
    from ..runtime.backends import open_session
    from ..runtime.bundle import Bundle
    from ..runtime.golden import compare_golden

    began = time.perf_counter()
    with bar("verify") as update:
        update(0.0, "hashing every file")
        bundle = Bundle.open(path, check="hash")
        manifest = bundle.manifest
        for i, (name, spec) in enumerate(manifest.parts.items()):
            update(0.3 + 0.4 * i / len(manifest.parts), f"loading {name}")
            open_session(bundle.file(spec.graph), spec, threads=threads).close()
        golden = manifest.quality.get("golden")
        error = None
        if golden:
            update(0.7, "drawing the golden latent")
            error = compare_golden(Pipeline.from_pretrained(path, threads=threads, check="size"), golden)
        update(1.0, "done")

    tolerance = golden["tolerance"] if golden else None
    if error is not None and tolerance is not None and error > tolerance:
        raise GateFailed(
            f"{path}: the golden latent differs by {error:.2g} of its peak on this host",
            expected=f"at most {tolerance:.2g}",
            fix="fewstep doctor, another version of the engine, or export again on this host",
        )
    size = sum(spec.bytes for spec in manifest.files.values())
    data = {
        "bundle": str(path),
        "name": manifest.name,
        "files": len(manifest.files),
        "bytes": size,
        "graphs": list(manifest.parts),
        "golden": None if error is None else {"error": error, "tolerance": tolerance},
        "seconds": time.perf_counter() - began,
    }
    said = "no golden latent to replay" if error is None else f"golden latent within {error:.1g} of its peak"
    counted = (
        f"{len(manifest.files)} files ({human_bytes(size)}) as hashed, {len(manifest.parts)} graphs load"
    )
    return Answer(data, f"{path}: {counted}, {said}")

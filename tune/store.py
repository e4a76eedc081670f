"""Putting a plan into a bundle: a new bundle beside the old one, or the old one's manifest replaced in one step."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle, BundleWriter
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, folder_size
from ..runtime.golden import golden_latent
from ..runtime.manifest import NAME, Manifest
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Plan

__all__ = ["add_plan", "check_name"]


def check_name(manifest: Manifest, name: str, *, overwrite: bool) -> None:
    """Raises BadInput unless a plan may be added under that name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name == "default":
        raise BadInput(
            f"plan name {name[:80]!r}",
            expected="letters, digits, '.', '_' and '-', and not 'default'",
            fix="pass --name learned-6",
        )
    if name in manifest.plans and not overwrite:
        raise BadInput(
            f"the bundle has a plan {name!r}", fix="pass another --name, or --overwrite to replace it"
        )


def add_plan(
    bundle: Bundle,
    name: str,
    plan: Plan,
    record: Mapping[str, Any],
    out: Path | None = None,
    *,
    default: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write the bundle with one more plan, and `record` in its history; returns where it is.

    out        a new bundle; None changes this one, whose manifest is replaced in one step
    default    make it the plan of a run that asks for none
    overwrite  replace a plan of that name, or a bundle at `out`
    """
    check_name(bundle.manifest, name, overwrite=overwrite)
    table = plan.to_json()
    plans = {**bundle.manifest.plans, name: table, **({"default": table} if default else {})}
    manifest = replace(bundle.manifest, plans=plans, history=(*bundle.manifest.history, record))
    if default and "golden" in manifest.quality:  # a run may now take another plan where the golden one did
        with Pipeline(Bundle(bundle.path, manifest)) as pipeline:
            golden = golden_latent(pipeline)
        manifest = replace(manifest, quality={**manifest.quality, "golden": golden})
    if out is None:
        text = manifest.to_json().encode()
        Manifest.from_json(text)
        atomic_write(bundle.path / NAME, text)
        return bundle.path
    with BundleWriter(out, overwrite, size=folder_size(bundle.path)) as writer:
        for file in manifest.files:
            (writer.folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(file), writer.folder / file)
        return writer.commit(manifest)

"""A web site that draws: the built app, ONNX Runtime Web's files and bundles, for any static host.

SITE/index.html, app.js, worker.js, ...   the app, as `make web` builds it
SITE/ort/                                 ONNX Runtime Web
SITE/bundles.json                         which bundles there are
SITE/bundles/NAME/manifest.json, ...      each as it is
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import runtime
from ..model import Model
from ..runtime.bundle import Bundle
from ..runtime.errors import BadInput, OutputError
from ..runtime.files import output_errors, remove, remove_stale, rename_folder, sync_folder, temporary_name
from ..runtime.manifest import Manifest
from ..runtime.progress import Progress
from .recipe import Exported, export_bundle

__all__ = ["CATALOG", "TARGETS", "Site", "app_files", "app_folder", "catalog", "export_site", "names_of"]

CATALOG = "bundles.json"
SITE_KEY = "fewstep_site"
"""The key of the catalog that holds its version, and tells our sites from other folders."""

TARGETS = ("web-wasm", "web-webgpu")
"""What `--target web` exports for: every browser takes the first, those with 16-bit shaders the second."""


@dataclass(frozen=True)
class Site:
    """The last event of `export_site`: the folder stands."""

    path: Path
    bundles: tuple[Exported, ...]
    stage: str = "done"
    fraction: float | None = 1.0
    note: str = ""


def app_folder() -> Path:
    """Where the built app lies: beside the runtime, in a checkout and in a wheel. Raises BadInput without one."""
    folder = Path(runtime.__file__).parent / "web" / "dist" / "site"
    if not (folder / "index.html").is_file():
        raise BadInput(
            f"the web app is not built: {folder} has no index.html",
            fix="run make web (it needs Node 20 and npm)",
        )
    return folder


def app_files(folder: Path) -> dict[str, Path]:
    """Path in the site -> file, of all plain files of the built app."""
    found = {}
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not (Path(base) / name).is_symlink()]
        for name in names:
            file = Path(base) / name
            if file.is_file() and not file.is_symlink():
                found[file.relative_to(folder).as_posix()] = file
    for taken in (CATALOG, "bundles"):
        if any(path.split("/")[0] == taken for path in found):
            raise BadInput(f"{folder} has a {taken} of its own", fix="run make web again")
    return dict(sorted(found.items()))


def names_of(bundles: Iterable[Bundle]) -> dict[str, Bundle]:
    """A name for each bundle in addresses: its folder's, in plain letters, with a number where that is taken."""
    found: dict[str, Bundle] = {}
    for bundle in bundles:
        plain = re.sub(r"[^a-z0-9._-]+", "-", bundle.path.name.lower()).strip("-.") or "bundle"
        number, name = 1, plain
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found[name] = bundle
    return found


def catalog(bundles: Mapping[str, Manifest]) -> dict[str, Any]:
    """bundles.json: what the app offers before it has read a manifest."""
    return {SITE_KEY: 1, "bundles": [_entry(name, manifest) for name, manifest in bundles.items()]}


def _entry(name: str, manifest: Manifest) -> dict[str, Any]:
    denoiser = manifest.parts[manifest.denoiser]
    return {
        "path": f"bundles/{name}/",
        "name": manifest.name,
        "target": manifest.target.get("id", ""),
        "task": manifest.task,
        "device": denoiser.device,
        "precision": denoiser.precision,
        "quantized": any(part.quantization for part in manifest.parts.values()),
        "bytes": sum(file.bytes for file in manifest.files.values()),
    }


def export_site(
    source: str | Path | Model,
    out: Path | str,
    *,
    steps: int | None = None,
    sampler: str | None = None,
    times: str | None = None,
    recipe: Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_download: bool = False,
    config: Path | None = None,
) -> Iterator[Progress | Site]:
    """Export a model for every one of TARGETS and put the app around the bundles; at the end yields Site.

    recipe  of the integers for wasm; the bundle for WebGPU takes the target's own
    Nothing appears at `out` before all of it is there. Raises what `export_bundle` does, and BadInput where the app is
    not built.
    """
    out = Path(os.path.abspath(out))
    app = app_files(app_folder())
    remove_stale(out)
    _check_out(out, overwrite)
    folder = temporary_name(out)
    exported: list[Exported] = []
    try:
        if not dry_run:
            with output_errors(out):
                (folder / "bundles").mkdir(parents=True)
        for number, target in enumerate(TARGETS):
            name = target.removeprefix("web-")
            events = export_bundle(
                source,
                target,
                folder / "bundles" / name if not dry_run else out,
                steps=steps,
                sampler=sampler,
                times=times,
                recipe=recipe if number == 0 else None,
                dry_run=dry_run,
                allow_download=allow_download,
                config=config,
                measure_speed=False,
            )
            for event in events:
                if isinstance(event, Exported):
                    exported.append(event)
                    continue
                begin = None if event.fraction is None else (number + event.fraction) / len(TARGETS)
                yield Progress(f"{target}: {event.stage}", begin, event.note)
        if dry_run:
            return
        with output_errors(out):
            listed = catalog({done.path.name: done.manifest for done in exported})
            _fill(folder, app, listed)
            rename_folder(folder, out)
            sync_folder(out.parent)
    finally:
        remove(folder)
    moved = tuple(replace(done, path=out / "bundles" / done.path.name) for done in exported)
    yield Site(out, moved)


def _fill(folder: Path, app: Mapping[str, Path], listed: Mapping[str, Any]) -> None:
    """The app and the catalog, flushed to the disk."""
    for path, file in app.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / path)
    (folder / CATALOG).write_text(json.dumps(listed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in (*app, CATALOG):
        with open(folder / path, "rb+") as file_:
            os.fsync(file_.fileno())
    for inner in {(folder / path).parent for path in app} | {folder, folder / "bundles"}:
        sync_folder(inner)


def _check_out(out: Path, overwrite: bool) -> None:
    """Raise OutputError unless `out` is free, an empty folder, or a site of ours that may be replaced."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out} exists and is no folder", fix="pick another path")
    if not os.listdir(out):
        return
    ours = False
    with suppress(OSError, ValueError):
        ours = SITE_KEY in json.loads((out / CATALOG).read_text(encoding="utf-8"))
    if not ours:
        raise OutputError(f"{out} exists and is not a fewstep site", fix="pick a path that does not exist")
    if not overwrite:
        raise OutputError(f"{out} exists", fix="pick another path, or ask for overwriting (--overwrite)")

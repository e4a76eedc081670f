"""From a model to a student: the pruning and distilling passes of a recipe, and a diffusers folder at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..model import Context, Model, load
from ..model.save import save_folder
from ..model.training import Processes
from ..runtime.errors import BadInput
from ..runtime.files import remove, temporary_name
from ..runtime.progress import Progress
from ..targets import load_target
from .passes import configured, run_passes, steps_of
from .plans import plan_of

__all__ = ["AT_EXPORT", "Student", "make_student"]

AT_EXPORT = ("tiny_decoder", "split_upsampling", "quantize")
"""Passes whose results no diffusers folder can hold: export runs them, of the same recipe."""
LOGS = "training"
"""Folder of the student with the log of every training, JSON lines."""


@dataclass(frozen=True)
class Student:
    """The last event: the folder stands."""

    path: Path
    model: Model
    passes: tuple[str, ...]
    left: tuple[str, ...]
    """Passes of the recipe that are export's."""
    history: tuple[Mapping[str, Any], ...] = field(default=())
    stage: str = "done"
    fraction: float | None = 1.0
    note: str = ""


def make_student(
    source: str | Path | Model,
    out: Path | str,
    recipe: Path | str,
    *,
    teacher: str | Path | Model | None = None,
    target: str = "laptop-cpu",
    precision: str = "float16",
    store: Path | str | None = None,
    overwrite: bool = False,
    allow_download: bool = False,
    seed: int = 0,
) -> Iterator[Progress | Student]:
    """Run what a recipe prunes and distills; yields what it does and, at the end, Student.

    source   what `model.load` takes, or a Model
    recipe   a TOML file as export takes it; passes that only a bundle can hold are left to export
    teacher  whom passes learn from; the source itself where None
    target   whose limits passes may ask for
    store    a folder that keeps what took long, the teacher's latents for instance, for other runs too; None: `out` +
             ".work", which goes away when `out` stands
    The training goes on where an interrupted run stopped.
    Started by `accelerate launch`, every process trains and the first one writes. Raises BadInput and its kinds.
    """
    out, processes = Path(out), Processes.found()
    device = load_target(target).with_recipe(Path(recipe))
    names = tuple(name for name, _ in configured(device))
    mine, left = (tuple(n for n in names if (n in AT_EXPORT) is at_export) for at_export in (False, True))
    if not mine:
        raise BadInput(
            f"{recipe}: nothing to prune or distill in passes = {list(names)}",
            expected="one pass at least that is not export's",
            fix="see docs/how-to-distill.md, or run `fewstep export --recipe`",
        )
    options = {name: table for name, table in device.recipe.options.items() if name in mine}
    device = replace(device, recipe=replace(device.recipe, passes=mine, options=options))
    if out.exists() and not overwrite:
        raise BadInput(f"{out} exists", expected="a new folder", fix="pass --overwrite, or another name")
    kept, work = Path(store or out.with_name(f"{out.name}.work")), temporary_name(out)
    yield Progress("load", 0.0, str(source) if not isinstance(source, Model) else source.name)
    model = source if isinstance(source, Model) else load(source, allow_download=allow_download)
    other = teacher
    if other is not None and not isinstance(other, Model):
        other = load(other, allow_download=allow_download)
    sampler = device.recipe.sampler
    first = plan_of(model, sampler, steps_of(model, device, None))
    context = Context(device, first, work, kept, seed, other)
    try:
        student = yield from run_passes(model, context, sampler, None, 0.02, 0.98)
        if processes.first:
            yield Progress("save", 0.98, str(out))
            path = save_folder(student, out, precision=precision, overwrite=overwrite)
            for log in {record["log"] for record in student.history if record.get("log")}:
                if (kept / log).exists():
                    (path / LOGS).mkdir(exist_ok=True)
                    shutil.copy(kept / log, path / LOGS / log)
            if store is None:
                remove(kept)
        processes.meet()
    finally:
        if processes.first:
            remove(work)
    yield Student(out, student, mine, left, tuple(student.history[len(model.history) :]))

"""`fewstep distill`: prune, recover and distill a model by a recipe, into a diffusers folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .console import Answer, needs, watch
from .export import describe

__all__ = ["add", "call"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument("--recipe", required=True, metavar="FILE", type=Path, help="a TOML file: what to do")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="the folder to write")
    parser.add_argument(
        "--teacher", metavar="MODEL", help="whom the student learns from, where it is not MODEL itself"
    )
    parser.add_argument(
        "--target", default="laptop-cpu", metavar="NAME", help="a device: see `fewstep targets`"
    )
    parser.add_argument(
        "--precision", default="float16", choices=("float16", "float32"), help="of the weights written"
    )
    parser.add_argument(
        "--store", metavar="DIR", type=Path, help="keep what takes long here, for other runs too"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is already there")
    parser.add_argument("--download", action="store_true", help="allow fetching a hub id")


def call(args: argparse.Namespace) -> Answer:
    with needs("export"):
        from ..export.students import Student, make_student
        from ..model.training import Processes

    events = make_student(
        args.model,
        args.output,
        args.recipe,
        teacher=args.teacher,
        target=args.target,
        precision=args.precision,
        store=args.store,
        overwrite=args.overwrite,
        allow_download=args.download,
        seed=args.seed,
    )
    if not Processes.found().first:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - to the end of the process
        done = [*events][-1]
    else:
        done = watch(events, "distill", describe)[-1]
    assert isinstance(done, Student)
    data = {
        "folder": str(done.path),
        "name": done.model.name,
        "passes": list(done.passes),
        "left": list(done.left),
        "steps": done.model.steps,
        "history": [dict(record) for record in done.history],
    }
    lines = [f"{done.path}: {done.model.name} after {', '.join(done.passes)}"]
    if done.model.steps is not None:
        lines.append(f"made for {done.model.steps} steps")
    if done.left:
        lines.append(f"left to `fewstep export --recipe`: {', '.join(done.left)}")
    return Answer(data, "\n".join(lines))

"""`fewstep run`: draw images and write them as PNG files that say how they were made."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..runtime.errors import BadInput, OutputError
from ..runtime.png import write_png
from .console import Answer, add_threads, bar, human_seconds

__all__ = ["add", "call", "metadata"]

MAX_COUNT = 1000
GRID_GAP = 4
"""Pixels between the pictures of a grid."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("-p", "--prompt", metavar="TEXT")
    parser.add_argument("-n", "--negative-prompt", metavar="TEXT")
    parser.add_argument("--class-label", type=int, metavar="N", help="of a class-conditional model")
    parser.add_argument("--steps", type=int, help="default: the bundle's own plan")
    parser.add_argument("--sampler", metavar="NAME", help="ddim, euler, heun, dpmpp_2m, lcm")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="1 switches guidance off")
    parser.add_argument("-s", "--seed", type=int, default=0, help="of the first image; the next has seed + 1")
    parser.add_argument("--count", type=int, default=1, help="how many images")
    parser.add_argument("-H", "--height", type=int, metavar="PIXELS")
    parser.add_argument("-W", "--width", type=int, metavar="PIXELS")
    parser.add_argument("--low-memory", action="store_true", help="free each network before the next; slower")
    add_threads(parser)
    parser.add_argument("--grid", action="store_true", help="with --count: also one picture of all")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png", type=Path)


def call(args: argparse.Namespace) -> Answer:
    _check(args)
    from ..runtime import Pipeline

    pipeline = Pipeline.from_pretrained(args.bundle, low_memory=args.low_memory, threads=args.threads)
    digest = hashlib.sha256((args.bundle / "manifest.json").read_bytes()).hexdigest()
    written: list[dict[str, Any]] = []
    pictures = []
    with bar("run") as update:
        # one at a time: memory stays that of one image, and what is finished before a Ctrl-C is on disk
        for i in range(args.count):
            drawing = pipeline.generate(
                args.prompt,
                args.negative_prompt,
                class_labels=args.class_label,
                num_inference_steps=args.steps,
                guidance_scale=args.guidance,
                height=args.height,
                width=args.width,
                seed=args.seed + i,
                sampler=args.sampler,
                output_type="np",
            )
            output = _drawn(drawing, partial(_share, update, i, args.count))
            picture = np.round(np.asarray(output.images[0]) * 255).clip(0, 255).astype(np.uint8)
            path = args.output if args.count == 1 else _numbered(args.output, i)
            text = metadata(args, pipeline.manifest, output.plan, args.seed + i, picture.shape, digest)
            write_png(path, picture, text)
            pictures.append(picture)
            written.append({"file": str(path), "seed": args.seed + i, "seconds": dict(output.timings)})
        update(1.0, "done")
    data: dict[str, Any] = {"images": written, **json.loads(text["fewstep"])}
    if args.grid and args.count > 1:
        path = args.output.with_stem(f"{args.output.stem}-grid")
        write_png(path, grid(pictures), {"Software": f"fewstep {__version__}"})
        data["grid"] = str(path)
    return Answer(data, _text(written, data))


def metadata(
    args: argparse.Namespace, manifest: Any, plan: Any, seed: int, shape: tuple[int, ...], digest: str
) -> dict[str, str]:
    """PNG text: `parameters` as AUTOMATIC1111's web UI writes it and others read it; `fewstep`: JSON."""
    guidance = args.guidance if args.guidance is not None else manifest.guidance.scale
    record = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "class_label": args.class_label,
        "seed": seed,
        "steps": plan.steps,
        "sampler": plan.sampler,
        "plan": "default" if args.steps is None and args.sampler is None else "traced",
        "guidance": guidance,
        "height": shape[0],
        "width": shape[1],
        "bundle": {"name": manifest.name, "sha256": digest},
        "fewstep": __version__,
    }
    fields = {
        "Steps": plan.steps,
        "Sampler": plan.sampler,
        "CFG scale": f"{guidance:g}",
        "Seed": seed,
        "Size": f"{shape[1]}x{shape[0]}",
        "Model hash": digest[:10],
        "Model": manifest.name,
        "Version": f"fewstep {__version__}",
    }
    lines = [args.prompt or ""]
    if args.negative_prompt:
        lines.append(f"Negative prompt: {args.negative_prompt}")
    lines.append(", ".join(f"{key}: {value}" for key, value in fields.items()))
    return {"parameters": "\n".join(lines), "fewstep": json.dumps(record, ensure_ascii=False)}


def _share(update: Callable[[float, str], None], i: int, count: int, part: float) -> None:
    update((i + part) / count, f"image {i + 1} of {count}")


def _drawn(steps: Any, update: Callable[[float], None]) -> Any:
    """Run `Pipeline.generate` to its end and return what it returns."""
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        update((done.index + 1) / done.steps)


def grid(pictures: list[Any]) -> Any:
    """uint8 [h, w, c] each -> one picture with as many columns as rows or one more."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    h, w, c = pictures[0].shape
    sheet = np.full((rows * (h + GRID_GAP) - GRID_GAP, columns * (w + GRID_GAP) - GRID_GAP, c), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (h + GRID_GAP), i % columns * (w + GRID_GAP)
        sheet[y : y + h, x : x + w] = picture
    return sheet


def _check(args: argparse.Namespace) -> None:
    """What the pipeline cannot know; before the model is loaded."""
    if not 1 <= args.count <= MAX_COUNT:
        raise BadInput(f"--count {args.count}", expected=f"1 to {MAX_COUNT}")
    if args.output.suffix.lower() != ".png":
        raise BadInput(f"output {args.output}", expected="a name that ends in .png")
    folder = args.output.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder", fix=f"mkdir -p '{folder}'")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is not writable", fix="pick a folder you may write to")


def _numbered(path: Path, i: int) -> Path:
    return path.with_stem(f"{path.stem}-{i + 1:03d}")


def _text(written: list[dict[str, Any]], data: dict[str, Any]) -> str:
    lines = []
    for image in written:
        seconds = image["seconds"]
        stages = ", ".join(
            f"{name} {human_seconds(seconds[name])}"
            for name in ("text", "denoise", "decode")
            if name in seconds
        )
        total = human_seconds(seconds.get("total"))
        lines.append(f"{image['file']}: seed {image['seed']}, {data['steps']} steps, {total} ({stages})")
    return "\n".join([*lines, *([f"{data['grid']}: all of them"] if "grid" in data else [])])

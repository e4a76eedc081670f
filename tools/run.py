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
from ..runtime.pipeline import Pipeline
from .console import Answer, add_threads, bar, human_seconds, needs
from .subjects import read_picture

__all__ = ["add", "call", "describe", "grid", "parameters"]

MAX_COUNT = 1000
GRID_GAP = 4
"""Pixels between the pictures of a grid."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    parser.add_argument("-p", "--prompt", metavar="TEXT")
    parser.add_argument("-n", "--negative-prompt", metavar="TEXT")
    parser.add_argument("--class-label", type=int, metavar="N", help="of a class-conditional model")
    parser.add_argument("--steps", type=int, help="default: the bundle's own plan")
    parser.add_argument("--sampler", metavar="NAME", help="see `fewstep samplers`")
    parser.add_argument(
        "--times", metavar="GRID", help="time grid, for instance karras: see `fewstep samplers`"
    )
    parser.add_argument("--plan", metavar="NAME", help="a plan of the bundle: see `fewstep show`")
    parser.add_argument(
        "--image", metavar="FILE", help="start from this picture (needs a bundle that takes one)"
    )
    parser.add_argument(
        "--strength", type=float, metavar="S", help="with --image: how much of the grid is run"
    )
    parser.add_argument("--mask", metavar="FILE", help="with --image: light where to paint anew")
    parser.add_argument(
        "--observation", metavar="FILE", help="the picture to restore, of a restoration model"
    )
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="1 switches guidance off")
    parser.add_argument("-s", "--seed", type=int, default=0, help="of the first image; the next has seed + 1")
    parser.add_argument("--count", type=int, default=1, help="how many images")
    parser.add_argument("-H", "--height", type=int, metavar="PIXELS")
    parser.add_argument("-W", "--width", type=int, metavar="PIXELS")
    parser.add_argument(
        "--tile",
        type=int,
        metavar="PIXELS",
        help="decode in windows of this size: less memory, large pictures",
    )
    parser.add_argument("--low-memory", action="store_true", help="free each network before the next; slower")
    add_threads(parser)
    parser.add_argument("--grid", action="store_true", help="with --count: also one picture of all")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png", type=Path)


def call(args: argparse.Namespace) -> Answer:
    _check(args)
    with needs("onnx"):
        from ..runtime.backends.PIL import write_png
    pipeline = Pipeline.from_pretrained(args.bundle, low_memory=args.low_memory, threads=args.threads)
    digest = hashlib.sha256((args.bundle / "manifest.json").read_bytes()).hexdigest()
    image, mask, observation = (
        None if path is None else read_picture(path, option)
        for path, option in (
            (args.image, "--image"),
            (args.mask, "--mask"),
            (args.observation, "--observation"),
        )
    )
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
                times=args.times,
                plan=args.plan,
                image=image,
                strength=args.strength,
                mask_image=mask if mask is None or mask.ndim == 2 else mask[..., 0],
                observation=observation,
                tile=args.tile,
                output_type="np",
            )
            output = _drawn(drawing, partial(_share, update, i, args.count))
            picture = np.rint(output.images[0] * 255).astype(np.uint8)
            path = args.output if args.count == 1 else _numbered(args.output, i)
            record = describe(pipeline, output, args, digest)
            text = {"parameters": parameters(record), "fewstep": json.dumps(record, ensure_ascii=False)}
            write_png(path, picture, text)
            pictures.append(picture)
            written.append({"file": str(path), "seed": args.seed + i, "seconds": dict(output.timings)})
        update(1.0, "done")
    data: dict[str, Any] = {"images": written, **record}
    if args.grid and args.count > 1:
        path = args.output.with_stem(f"{args.output.stem}-grid")
        write_png(path, grid(pictures), {"Software": f"fewstep {__version__}"})
        data["grid"] = str(path)
    return Answer(data, _text(written, data))


def describe(pipeline: Pipeline, output: Any, args: argparse.Namespace, digest: str) -> dict[str, Any]:
    """How one image was made: everything needed to draw it again."""
    manifest = pipeline.manifest
    height, width = output.images.shape[1:3]
    return {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "class_label": args.class_label,
        "seed": output.seeds[0],
        "steps": output.plan.steps,
        "sampler": output.plan.sampler,
        "times": args.times or "auto",
        "plan": args.plan or ("default" if output.plan == pipeline.plan() else "traced"),
        "guidance": manifest.guidance.scale if args.guidance is None else args.guidance,
        "height": height,
        "width": width,
        "tile": args.tile,
        "bundle": {"name": manifest.name, "sha256": digest},
        "fewstep": __version__,
    }


def parameters(record: dict[str, Any]) -> str:
    """The same in the form of AUTOMATIC1111's web UI, which other programs read."""
    fields = {
        "Steps": record["steps"],
        "Sampler": record["sampler"],
        **({"Schedule type": record["times"]} if record["times"] != "auto" else {}),
        "CFG scale": f"{record['guidance']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record["bundle"]["sha256"][:10],
        "Model": record["bundle"]["name"],
        "Version": f"fewstep {record['fewstep']}",
    }
    lines = [record["prompt"] or ""]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in fields.items())])


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

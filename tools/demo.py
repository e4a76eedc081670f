"""`fewstep demo`: from a checkpoint to a picture and a report, with the commands a user would type."""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.files import atomic_write, output_errors
from .bench import bench
from .console import Answer, bar, needs, note, positive, watch
from .export import describe
from .verify import verify

__all__ = ["add", "call", "contact_sheet"]

PROMPTS = (
    "a rooster",
    "a red apple on a light blue background",
    "an octopus",
    "a hamburger",
    "a rocket on a yellow background",
    "a panda",
    "a snail on a green background",
    "a rooster and a tooth on a blue background",
)

SEED = 7
CELL = 224
"""Pixels of a picture on the sheet: 64 pixels times 3.5, drawn with smooth edges."""
MARGIN, CAPTION = 24, 54
RUNS, COLD_RUNS = 10, 6
"""Enough for a 95 % interval of each (tools/stats.py: at least 6), few enough for a coffee's patience."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="models/emoji-64", metavar="MODEL")
    parser.add_argument("-o", "--output", default="demo-output", metavar="DIR", type=Path)
    parser.add_argument("--target", default="laptop-cpu", metavar="NAME")
    parser.add_argument("--runs", type=positive, default=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--cold-runs", type=positive, default=COLD_RUNS, help=argparse.SUPPRESS)


def call(args: argparse.Namespace) -> Answer:
    output: Path = args.output
    with output_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    name = Path(args.model).name
    bundle, plain = output / name, output / f"{name}-plain"
    _export(args.model, args.target, bundle, optimize=True)
    _export(args.model, args.target, plain, optimize=False)
    checked = verify(bundle)
    note(checked.text)
    picture = output / "picture.png"
    atomic_write(picture, contact_sheet(_draw(bundle), PROMPTS, title=name))
    measured = bench(
        [bundle],
        plain,
        output=output,
        prompts=PROMPTS,
        runs=args.runs,
        cold_runs=args.cold_runs,
        command=["fewstep", "bench", str(bundle), "--baseline", str(plain), "-o", str(output)],
    )
    note(measured.text)
    report = output / "report.html"
    data = {
        "bundle": str(bundle),
        "picture": str(picture),
        "report": str(report),
        "verify": checked.data,
        "comparisons": measured.data["comparisons"],
    }
    return Answer(data, f"picture: {picture}\nreport:  {report}")


def _export(model: str, target: str, output: Path, *, optimize: bool) -> None:
    with needs("export"):
        from ..export import export_bundle
    # the bench that follows compares the two, at greater length than the export would
    events = export_bundle(model, target, output, overwrite=True, optimize=optimize, measure_speed=False)
    watch(events, f"export {output.name}", describe)


def _draw(bundle: Path) -> list[Any]:
    from ..runtime import Pipeline

    pipeline = Pipeline.from_pretrained(bundle)
    drawn = []
    with bar("draw") as update:
        for i, prompt in enumerate(PROMPTS):
            update(i / len(PROMPTS), prompt)
            given = prompt if pipeline.manifest.tokenizer else None
            classes = pipeline.manifest.classes
            output = pipeline(
                given, class_labels=i % classes if classes else None, seed=SEED + i, output_type="np"
            )
            drawn.append(np.asarray(output.images[0]))
        update(1.0, "done")
    return drawn


def contact_sheet(pictures: Sequence[Any], captions: Sequence[str], *, title: str) -> bytes:
    """Pictures [h, w, c] in 0..1 in rows of four with their captions below, as PNG bytes."""
    from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    width = MARGIN + columns * (CELL + MARGIN)
    sheet = Image.new("RGB", (width, MARGIN + rows * (CELL + CAPTION + MARGIN)), "#f6f5f2")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = MARGIN + i % columns * (CELL + MARGIN), MARGIN + i // columns * (CELL + CAPTION + MARGIN)
        pixels = (np.asarray(picture) * 255).round().clip(0, 255).astype(np.uint8)
        pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
        image = Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(image, (x, y))
        text = "\n".join(textwrap.wrap(caption, 30)[:2])
        draw.text((x + CELL / 2, y + CELL + 8), text, fill="#3a3835", font=font, anchor="ma", align="center")
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", title)
    info.add_text("Description", "\n".join(captions))
    data = io.BytesIO()
    sheet.save(data, "png", pnginfo=info)
    return data.getvalue()

"""`fewstep samplers`: what there is, and a gallery of what each makes of a prompt at a few numbers of network calls."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, PlanError
from ..runtime.pipeline import Pipeline
from ..runtime.plan import Plan, plan
from ..runtime.process import EDM, DiscreteVP, RectifiedFlow, process_from_json
from ..runtime.samplers import SAMPLERS
from ..runtime.times import GRIDS, find_grid
from .console import Answer, add_threads, needs, table, watch

__all__ = ["add", "call", "within"]

STEPS = 10
"""Of the plans that are traced to say what a sampler costs."""
DEFAULT_CALLS = (4, 6, 10, 20)
DEFAULT_SAMPLERS = ("ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m_exact", "unipc", "deis")
REFERENCE_STEPS = 200
"""Of dpmpp_2m: its error is then far below what any cell of the gallery shows."""
LABEL = 26
"""Pixels of the line of text above a picture."""
SMALLEST_CELL = 96
"""Pixels; smaller pictures are enlarged by whole factors, so that the text fits."""

EXAMPLES = (
    DiscreteVP.from_schedule("scaled_linear", 0.00085, 0.012, 1000),  # Stable Diffusion 1.x
    RectifiedFlow(),
    EDM(),
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", type=Path, help="draw a gallery with it")
    parser.add_argument("-p", "--prompt", metavar="TEXT")
    parser.add_argument("--class-label", type=int, metavar="N", help="of a class-conditional model")
    parser.add_argument(
        "--sampler", action="append", metavar="NAME", help="repeat for several (default: the usual)"
    )
    parser.add_argument(
        "--times", default="auto", metavar="GRID", help="time grid of every picture (default auto)"
    )
    parser.add_argument(
        "--calls", type=int, nargs="+", default=list(DEFAULT_CALLS), help="network calls a picture"
    )
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="1 switches guidance off")
    parser.add_argument("-s", "--seed", type=int, default=0)
    add_threads(parser)
    parser.add_argument("-o", "--output", metavar="FILE.png", type=Path)


def call(args: argparse.Namespace) -> Answer:
    if args.bundle is None:
        return _listing()
    if args.output is None or args.output.suffix.lower() != ".png":
        raise BadInput("a gallery without a PNG file to go to", fix="pass -o gallery.png")
    with needs("onnx"):
        from ..runtime.backends.PIL import write_png
    names = args.sampler or [name for name in DEFAULT_SAMPLERS if name in SAMPLERS]
    with Pipeline.from_pretrained(args.bundle, threads=args.threads) as pipeline:
        drawn = watch(_draw(pipeline, names, args), "samplers", lambda event: (event["share"], event["note"]))
    cells = [event["cell"] for event in drawn if "cell" in event]
    write_png(args.output, _sheet(cells, args.calls, names), {"prompt": args.prompt or ""})
    rows = [{key: value for key, value in cell.items() if key != "picture"} for cell in cells]
    shown = [(r["sampler"], r["calls"], r["steps"], _decibels(r["psnr_db"])) for r in rows]
    text = table(shown, ("sampler", "calls", "steps", "PSNR to the long run"))
    data = {"output": str(args.output), "reference": f"dpmpp_2m, {REFERENCE_STEPS} steps", "pictures": rows}
    return Answer(data, f"{text}\n\n{args.output}: one row a sampler")


def within(calls: int, sampler: str, make: Any) -> Plan | None:
    """The plan with the most steps that fits in this many network calls; None when not even one step does.

    make  (sampler, steps) -> Plan, raising PlanError where there is none
    """
    for steps in range(calls, 0, -1):
        try:
            made: Plan = make(sampler, steps)
        except PlanError:
            continue
        if len(made.calls) <= calls:
            return made
    return None


def _listing() -> Answer:
    rows = []
    for name, sampler in SAMPLERS.items():
        function = sampler.func if isinstance(sampler, partial) else sampler
        traced = [p for p in (_traced(name, process) for process in EXAMPLES) if p is not None]
        line = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        rows.append(
            {
                "name": name,
                "calls": len(traced[0].calls) if traced else None,
                "noise": bool(traced and traced[0].noises),
                "what": line,
            }
        )
    grids = [
        {"name": n, "what": (inspect.getdoc(getattr(g, "func", g)) or "").split("\n\n")[0].replace("\n", " ")}
        for n, g in GRIDS.items()
    ]
    first = table(
        [
            (
                r["name"],
                r["calls"] or "-",
                "fresh noise" if r["noise"] else "",
                _first_sentence(str(r["what"])),
            )
            for r in rows
        ],
        ("sampler", f"calls for {STEPS} steps", "", "what it is"),
    )
    second = table([(g["name"], _first_sentence(g["what"])) for g in grids], ("time grid", "what it is"))
    return Answer(
        {"samplers": rows, "grids": grids},
        f"{first}\n\n{second}\n\nWhich to take: docs/how-to-choose-a-sampler.md",
    )


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".")


def _traced(name: str, process: Any) -> Plan | None:
    try:
        return plan(name, STEPS, process)
    except PlanError:
        return None


Cell = dict[str, Any]
"""sampler, calls, steps, psnr_db, picture (float32 [h, w, channels] in 0..1)."""


def _draw(pipeline: Pipeline, names: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every picture of the gallery as an event {share, note, cell}, with its distance to a long run from its noise."""
    process = process_from_json(pipeline.manifest.process)

    def traced(sampler: str, steps: int) -> Plan:
        return plan(
            sampler,
            steps,
            process,
            args.times,
            prediction=pipeline.manifest.prediction,
            grid=pipeline.manifest.grid,
        )

    def picture(table: Plan) -> Any:
        return pipeline(
            args.prompt,
            class_labels=args.class_label,
            guidance_scale=args.guidance,
            seed=args.seed,
            plan=table,
            output_type="np",
        ).images[0]

    if args.times != "auto":
        find_grid(args.times)  # an unknown name, before `within` takes it for a plan that does not fit
    jobs: list[tuple[str, int, Plan]] = []
    for name in names:
        if name not in SAMPLERS:
            raise PlanError.unknown("sampler", name, SAMPLERS)
        for calls in args.calls:
            fitted = within(calls, name, traced)
            if fitted is None:
                raise PlanError(
                    f"{name} with {calls} network calls", fix="pass more --calls, or leave it out"
                )
            jobs.append((name, calls, fitted))
    total = REFERENCE_STEPS + sum(len(fitted.calls) for _, _, fitted in jobs)
    yield {"share": 0.0, "note": f"reference, {REFERENCE_STEPS} steps"}
    reference = picture(plan("dpmpp_2m", REFERENCE_STEPS, process, prediction=pipeline.manifest.prediction))
    done = REFERENCE_STEPS
    for name, calls, fitted in jobs:
        image = picture(fitted)
        error = float(np.mean((image - reference) ** 2))
        psnr = 10 * math.log10(1 / error) if error > 0 else None
        done += len(fitted.calls)
        cell = {"sampler": name, "calls": calls, "steps": fitted.steps, "psnr_db": psnr, "picture": image}
        yield {"share": done / total, "note": f"{name}, {calls} calls", "cell": cell}


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"


def _sheet(cells: Sequence[Cell], calls: Sequence[int], names: Sequence[str]) -> Any:
    """uint8 [h, w, 3]: one row a sampler, one column a number of calls, a line of text above each picture."""
    with needs("onnx"):
        from PIL import Image, ImageDraw
    height, width = cells[0]["picture"].shape[:2]
    scale = max(1, -(-SMALLEST_CELL * 2 // width)) if width < 2 * SMALLEST_CELL else 1
    cell_w, cell_h = width * scale + 8, height * scale + LABEL
    sheet = Image.new("RGB", (cell_w * len(calls), cell_h * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, cell in enumerate(cells):
        x, y = cell_w * (i % len(calls)) + 4, cell_h * (i // len(calls))
        pixels = np.rint(np.repeat(np.repeat(cell["picture"], scale, 0), scale, 1) * 255).astype(np.uint8)
        sheet.paste(
            Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]).convert("RGB"), (x, y + LABEL)
        )
        draw.text(
            (x, y + 2),
            f"{cell['sampler']}\n{cell['calls']} calls, {_decibels(cell['psnr_db'])}",
            fill="black",
        )
    return np.asarray(sheet)

"""`fewstep sensitivity`: how much each layer of the denoiser suffers from how few bits, and the best mix for a size."""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, output_errors
from ..runtime.progress import Progress
from ..runtime.times import check_steps
from .console import Answer, needs, positive, table, watch
from .subjects import read_prompts

__all__ = ["add", "call"]

WORST = 10
"""Layers named on the screen; the page has them all."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", type=Path, help="sensitivity.html and tables"
    )
    parser.add_argument(
        "--bits", type=float, default=4.0, metavar="N", help="a weight, on average (default 4)"
    )
    parser.add_argument(
        "--options", nargs="+", metavar="OPTION", default=["w8", "w6", "w5", "w4", "w3", "w2"],
        help="what is tried on every layer: bits of weights (w4) or of inputs (a8)",
    )  # fmt: skip
    parser.add_argument(
        "--group", type=int, default=64, metavar="N", help="weights that share a scale (default 64)"
    )
    parser.add_argument(
        "--steps", type=positive, default=8, help="of the plan it is measured along (default 8)"
    )
    parser.add_argument(
        "--samples", type=positive, help="trajectories to record (default: by the model's size)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="one a line; default: the model's own")


def call(args: argparse.Namespace) -> Answer:
    check_steps(args.steps)
    prompts = tuple(read_prompts(args.prompts)) if args.prompts else ()
    with needs("export"):
        from ..quant.table import FLOAT, decibels
        from .sensitivity_page import render

    seen = watch(
        _measure(args, prompts), "sensitivity", lambda e: (e[0].fraction, f"{e[0].stage} {e[0].note}")
    )
    measured, chosen = seen[-1][1]
    with output_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    files = {
        "sensitivity.html": render(measured, chosen),
        "sensitivity.json": json.dumps({"table": measured.to_json(), "chosen": chosen}, indent=1),
        "sensitivity.csv": measured.csv(),
    }
    for name, text in files.items():
        atomic_write(args.output / name, text.encode())
    rows = sorted(chosen.items(), key=lambda item: -measured.error(*item))
    bits, final_db = measured.average_bits(chosen), decibels(measured.predicted(chosen))
    data = {
        "part": measured.part,
        "mode": measured.mode,
        "bits_per_weight": bits,
        "predicted_final_db": final_db,
        "chosen": chosen,
        "files": [str(args.output / name) for name in files],
    }
    cells = [
        (layer, option, f"{decibels(measured.error(layer, option)):.1f} dB")
        for layer, option in rows[:WORST]
        if option != FLOAT
    ]
    text = f"{measured.part} at {bits:.2f} bits a weight: {final_db:.1f} dB of signal over noise predicted at the end"
    page = f"every layer and step: {args.output / 'sensitivity.html'}"
    return Answer(data, f"{text}\n\n{table(cells, ('layer', 'as', 'alone'))}\n\n{page}")


def _measure(
    args: argparse.Namespace, prompts: tuple[str, ...]
) -> Generator[tuple[Progress, Any], None, None]:
    """Events beside None; the last beside (table, layer -> option)."""
    from ..export.plans import plan_of
    from ..model import load
    from ..quant.budget import average_bits, choose
    from ..quant.calibrate import Calibration
    from ..quant.compose import weight_pins
    from ..quant.study import study
    from ..quant.table import bits_of

    weights = [option for option in args.options if bits_of(option)[0] is not None]
    if not weights:
        raise BadInput(
            f"options {' '.join(args.options)}", expected="some bits of weights to choose from, such as w4"
        )
    yield Progress("load", 0.0, args.model), None
    model = load(args.model)
    plan = plan_of(model, "model", args.steps)
    how = Calibration(samples=args.samples, prompts=prompts)
    work = study(model, plan, how, tuple(args.options), args.group, args.output / "work")
    while True:
        try:
            yield next(work), None
        except StopIteration as stop:
            measured = stop.value
            break
    chosen = choose(measured, average_bits(measured, args.bits), weights, pins=weight_pins())
    yield Progress("choose", 1.0, f"{len(chosen)} layers"), (measured, chosen)

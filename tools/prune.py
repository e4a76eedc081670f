"""`fewstep prune`: a smaller denoiser, by what its blocks are worth, as a diffusers folder."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput, OutputError
from ..runtime.files import atomic_write, output_errors, remove, temporary_name
from ..runtime.progress import Progress, within
from ..runtime.times import check_steps
from .console import Answer, human_bytes, needs, positive, table, watch

__all__ = ["add", "call"]

CURVE_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
CURVE_CRITERIA = ("laptop", "ld_pruner", "by_hand", "magnitude", "random")
HELD_OUT = 3_000_000
"""The first seed that cuts are judged on; criteria look at others."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="the folder to write")
    parser.add_argument(
        "--criterion", default="laptop", metavar="NAME",
        help="laptop (default), ld_pruner, ld_pruner_paired, magnitude, random, by_hand, "
        "bk_sdm_base, bk_sdm_small or bk_sdm_tiny",
    )  # fmt: skip
    parser.add_argument(
        "--ratio", type=float, default=0.5, help="share of the denoiser that goes (default 0.5)"
    )
    parser.add_argument(
        "--by", default="parameters", choices=("parameters", "multiplications"), help="what the ratio counts"
    )
    parser.add_argument(
        "--steps", type=positive, default=8, help="of the plan that blocks are judged along (default 8)"
    )
    parser.add_argument("--samples", type=positive, default=8, help="trajectories to judge on (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", metavar="NAME", help="measure the time on this device's engine: see `fewstep targets`"
    )
    parser.add_argument("--no-speed", action="store_true", help="do not measure the time")
    parser.add_argument(
        "--precision",
        default="float16",
        choices=("float16", "bfloat16", "float32"),
        help="of the weights written",
    )
    parser.add_argument(
        "--curve",
        action="store_true",
        help="error against size for several ratios and criteria; writes no model",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already there")
    parser.add_argument("--download", action="store_true", help="allow fetching a hub id")


def call(args: argparse.Namespace) -> Answer:
    check_steps(args.steps)
    with needs("export"):
        from ..prune.cut_blocks import CutBlocks
        from ..targets import load_target

    job = CutBlocks(args.criterion, args.ratio, args.by, args.samples, seed=args.seed)
    if args.target is not None:
        load_target(args.target)
    if (
        args.output.exists()
        and any(args.output.iterdir() if args.output.is_dir() else (1,))
        and not args.overwrite
    ):
        raise OutputError(f"{args.output} exists already", fix="pick another path, or pass --overwrite")
    work = _curve(args, job) if args.curve else _prune(args, job)
    seen = watch(
        work, "prune", lambda event: (event[0].fraction, f"{event[0].stage} {event[0].note}".strip())
    )
    return _curve_answer(args, seen[-1][1]) if args.curve else _answer(args, seen[-1][1])


def _prune(args: argparse.Namespace, job: Any) -> Generator[tuple[Progress, Any], None, None]:
    """Events beside None; the last beside what is to be said."""
    from ..export.latency import side_by_side
    from ..model.save import save_folder
    from ..targets import load_target

    store, scratch = args.output.with_name(f"{args.output.name}.work"), temporary_name(args.output)
    yield Progress("load", 0.0, args.model), None
    model, context = _loaded(args, store, scratch)
    part = model.parts[model.denoiser]
    try:
        smaller = yield from _shown(within(job(model, context), 0.05, 0.8))
        found: dict[str, Any] = {"history": dict(smaller.history[-1])}
        if not args.no_speed:
            yield Progress("speed", 0.8, "before and after, in turns"), None
            target = None if args.target is None else load_target(args.target)
            both = {"before": part, "after": smaller.parts[part.name]}
            found["speed"] = side_by_side(both, target, scratch)
        yield Progress("write", 0.95, str(args.output)), None
        save_folder(smaller, args.output, args.precision, args.overwrite)
        remove(store)
    finally:
        remove(scratch)
    yield Progress("done", 1.0, str(args.output)), found


def _answer(args: argparse.Namespace, found: dict[str, Any]) -> Answer:
    record = found["history"]
    rows = [
        (
            what,
            *(f"{count / 1e6:,.2f} M" for count in record[what]),
            f"{record[what][1] / record[what][0]:.3f}",
        )
        for what in ("parameters", "multiplications")
    ]
    if speed := found.get("speed"):
        for what, name in (
            ("wall_ms", "wall ms, median (quartiles)"),
            ("core_ms", "core ms, median (quartiles)"),
        ):
            sides = [speed[side][what] for side in ("before", "after")]
            cells = [f"{median:.4g} ({low:.4g} to {high:.4g})" for low, median, high in sides]
            rows.append((name, *cells, f"{sides[1][1] / sides[0][1]:.3f}"))
        sizes = [speed[side]["bytes"] for side in ("before", "after")]
        rows.append(("size", *(human_bytes(size) for size in sizes), f"{sizes[1] / sizes[0]:.3f}"))
    lines = [table(rows, ("denoiser", "before", "after", "ratio"))]
    if record.get("measured") is not None:
        lines.append(
            f"error without training: {record['measured']:.4g} of the power ({record['predicted']:.4g} by adding up)"
        )
    lines.append(f"{args.output}: recover it with `fewstep distill`")
    return Answer({"folder": str(args.output), **found}, "\n\n".join(lines))


def _curve(args: argparse.Namespace, job: Any) -> Generator[tuple[Progress, Any], None, None]:
    """Error of final latents, without training, by criterion and ratio; the last event beside the rows."""
    from ..prune.criteria import final_latents, paired_distance

    store, scratch = args.output / "work", temporary_name(args.output)
    yield Progress("load", 0.0, args.model), None
    model, context = _loaded(args, store, scratch)
    seeds = range(HELD_OUT, HELD_OUT + args.samples)
    right = final_latents(model, context.plan, seeds)
    cuts = [(criterion, ratio) for criterion in CURVE_CRITERIA for ratio in CURVE_RATIOS]
    rows = []
    for number, (criterion, ratio) in enumerate(cuts):
        begin, end = (0.05 + 0.95 * n / len(cuts) for n in (number, number + 1))
        try:
            cut = replace(job, criterion=criterion, ratio=ratio)
            smaller = yield from _shown(within(cut(model, context), begin, end, f"{criterion} "))
        except BadInput as error:  # more than there is to cut, or no order by hand: a point less
            yield Progress(criterion, end, error.found), None
            continue
        power = paired_distance(right, final_latents(smaller, context.plan, seeds))
        record = smaller.history[-1]
        rows.append(
            {
                "criterion": criterion,
                "asked": ratio,
                "parameters": record["parameters"][1],
                "multiplications": record["multiplications"][1],
                "parameters_left": round(record["parameters"][1] / record["parameters"][0], 4),
                "multiplications_left": round(record["multiplications"][1] / record["multiplications"][0], 4),
                "final_db": round(-10 * math.log10(max(power, 1e-12)), 3),  # 120 dB where nothing differs
            }
        )
    yield Progress("done", 1.0, ""), rows


def _curve_answer(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Answer:
    from .plots import curves
    from .report import page

    names = list(dict.fromkeys(row["criterion"] for row in rows))
    by = {(row["criterion"], row["asked"]): row["final_db"] for row in rows}
    lines = [(name, [by.get((name, ratio)) for ratio in CURVE_RATIOS]) for name in names]
    plot = curves(lines, "dB", "tenths gone:")
    text = (
        f"<h1>What cutting costs before recovery</h1><p>Error of final latents of {args.model}, against the whole "
        f"model's, by the share of {args.by} that is gone. More decibels are better; below 0 is drawn at 0.</p>"
    )
    header = list(rows[0]) if rows else []
    listing = (
        "\n".join([",".join(header), *(",".join(str(row[key]) for key in header) for row in rows)]) + "\n"
    )
    with output_errors(args.output):
        args.output.mkdir(parents=True, exist_ok=True)
    files = {
        "curve.csv": listing,
        "curve.json": json.dumps(rows, indent=1),
        "curve.html": page("fewstep prune", [text, plot]),
    }
    for name, content in files.items():
        atomic_write(args.output / name, content.encode())
    cells = [(name, *("" if value is None else f"{value:.1f}" for value in values)) for name, values in lines]
    shown = table(cells, ("dB at", *(f"-{ratio:.0%}" for ratio in CURVE_RATIOS)))
    return Answer({"rows": rows, "files": [str(args.output / name) for name in files]}, shown)


def _loaded(args: argparse.Namespace, store: Path, scratch: Path) -> tuple[Any, Any]:
    from ..export.plans import plan_of
    from ..model import Context, load
    from ..targets import load_target

    model = load(args.model, allow_download=args.download)
    plan = plan_of(model, "model", args.steps)
    return model, Context(load_target(args.target or "laptop-cpu"), plan, scratch, store, args.seed)


def _shown(work: Generator[Progress, None, Any]) -> Generator[tuple[Progress, Any], None, Any]:
    """The same events beside None."""
    while True:
        try:
            yield next(work), None
        except StopIteration as stop:
            return stop.value

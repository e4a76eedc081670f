"""`fewstep compare`: what a bundle draws against what another, or the model it came from, draws.

The JSON document (schema 1) keeps every picture's numbers:

    schema, kind, created, command   what this file is and the line that made it
    reference, subjects, how         what was drawn by whom: prompts, labels, seeds, size, plan options
    metrics                          name -> title, unit, whether more is better
    candidates[]                     label and plan; `metrics`: name -> value, 95 % interval, quartiles, worst; `own`
                                     and `led`: quartiles of the SQNR a step and a call; `pairs`: the numbers of each;
                                     `shortfalls`: floors that were missed
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..export.quality import SSIM_WINDOW
from ..runtime.bundle import Bundle
from ..runtime.errors import BadInput, GateFailed
from ..runtime.files import atomic_write, output_errors
from ..runtime.manifest import NAME
from .bench import label_paths
from .comparison import METRICS, Measured, Shortfall, judge, measure, parse_floor, shown, span, summarize
from .comparison_page import render
from .console import Answer, add_threads, note, positive, table, watch
from .features import open_image_graph, open_scorer
from .pairs import Artist, How, check_alike, open_artist, same_path
from .subjects import PICTURES, make_subjects, read_prompts

__all__ = ["SCHEMA", "add", "call", "compare"]

SCHEMA = 1


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "reference", metavar="REFERENCE", type=Path, help="a bundle, or the model the candidates came from"
    )
    parser.add_argument("candidates", metavar="CANDIDATE", nargs="+", type=Path, help="bundles")
    parser.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="repeat for several")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="one prompt a line")
    parser.add_argument("--class-label", action="append", type=int, metavar="N", help="repeat for several")
    parser.add_argument(
        "--observation", action="append", metavar="FILE", help="a picture to restore; repeat for several"
    )
    parser.add_argument(
        "--count", type=positive, help=f"pictures a prompt (default: enough for {PICTURES} in all)"
    )
    parser.add_argument(
        "-s", "--seed", type=int, default=0, help="of the first picture; the next has seed + 1"
    )
    parser.add_argument("--steps", type=int, help="default: each bundle's own plan")
    parser.add_argument("--sampler", metavar="NAME")
    parser.add_argument("--times", metavar="GRID", help="a time grid: see `fewstep samplers`")
    parser.add_argument("--plan", metavar="NAME", help="one of the bundles' plans")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="default: each bundle's own")
    parser.add_argument("-H", "--height", type=int, metavar="PIXELS")
    parser.add_argument("-W", "--width", type=int, metavar="PIXELS")
    parser.add_argument(
        "--features", metavar="FILE.onnx", type=Path, help="pictures to vectors, for distances of features"
    )
    parser.add_argument(
        "--scorer", metavar="DIR", type=Path, help="judges whether pictures show their prompt"
    )
    parser.add_argument(
        "--floor",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="exit with 5 where a candidate is worse; repeat for several: " + ", ".join(METRICS),
    )
    add_threads(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="where compare.html and compare.json go"
    )


def call(args: argparse.Namespace) -> Answer:
    prompts = list(args.prompt or [])
    if args.prompts:
        prompts += read_prompts(args.prompts)
    how = How(args.steps, args.sampler, args.times, args.plan, args.guidance, args.height, args.width)
    return compare(
        args.reference,
        args.candidates,
        how,
        prompts=prompts,
        labels=args.class_label or [],
        observations=args.observation or [],
        count=args.count,
        seed=args.seed,
        features=args.features,
        scorer=args.scorer,
        floors=dict(parse_floor(text) for text in args.floor),
        output=args.output,
        threads=args.threads,
        command=["fewstep", *sys.argv[1:]],
    )


def compare(
    reference: Path,
    candidates: Sequence[Path],
    how: How,
    *,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    observations: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    features: Path | None = None,
    scorer: Path | None = None,
    floors: Mapping[str, float] | None = None,
    output: Path | None = None,
    threads: int | None = None,
    command: Sequence[str] = (),
) -> Answer:
    """Draw the same pictures by all and measure how far the candidates' are from the reference's.

    Exit code 5 where a candidate falls short of a floor; the answer holds every number all the same.
    """
    floors = floors or {}
    graph = open_image_graph(features, threads) if features else None
    judge_of_prompts = open_scorer(scorer, threads) if scorer else None
    _check_floors(floors, features=graph is not None, scorer=judge_of_prompts is not None)
    paths = label_paths([reference, *candidates])
    checkpoint = reference if _is_checkpoint(reference) else None
    first, *rest = paths
    bundles = {name: Bundle.open(paths[name]) for name in (rest if checkpoint else paths)}
    stand_in = bundles[rest[0]] if checkpoint else bundles[first]
    subjects = make_subjects(stand_in.manifest, prompts, labels, count, seed, judge_of_prompts, observations)
    if output is not None:
        with output_errors(output):  # before minutes of drawing, not after
            output.mkdir(parents=True, exist_ok=True)
    # artists load their graphs: only now, when all that is cheap to check is right
    right = open_artist(first, stand_in, how, checkpoint=checkpoint, threads=threads)
    others = [open_artist(name, bundles[name], how, threads=threads) for name in rest]
    for other in others:
        check_alike(right, other, how)
        _check_measurable(floors, right, other, how, len(subjects))

    found = {name: Measured() for name in rest}
    events = measure(right, others, subjects, how, found, graph, judge_of_prompts)
    watch(events, "compare", lambda tick: (tick.fraction, tick.note))

    rows = [summarize(found[other.label]) for other in others]
    missed = [judge(row["metrics"], floors, other.label) for row, other in zip(rows, others, strict=True)]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "fewstep-compare",
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": [shlex.quote(word) for word in command],
        "reference": {**_describe(right), "checkpoint": checkpoint is not None},
        "how": asdict(how),
        "subjects": [asdict(subject) for subject in subjects],
        "floors": dict(floors),
        "metrics": {name: asdict(metric) for name, metric in METRICS.items()},
        "candidates": [
            {**_describe(other), **row, "shortfalls": [asdict(short) for short in shorts]}
            for other, row, shorts in zip(others, rows, missed, strict=True)
        ],
    }
    short = [s for shorts in missed for s in shorts]
    if short:
        report["error"] = _failure(short)
    text = _text(report)
    if output is not None:
        document = json.dumps(report, indent=1, allow_nan=False)
        page = render(report, {name: measured.worst for name, measured in found.items()})
        atomic_write(output / "compare.json", document.encode())
        atomic_write(output / "compare.html", page.encode())
        report = {**report, "report": str(output / "compare.html")}
        text += f"\nreport: {output / 'compare.html'}"
    if short:
        note(f"fewstep: error: {report['error']['message']}")
    return Answer(report, text, GateFailed.exit_code if short else 0)


def _is_checkpoint(path: Path) -> bool:
    """By the rule of `fewstep show`: a bundle's folder goes to the bundle reader, whose errors know bundles."""
    if str(path).startswith("arch:") or path.is_file():
        return True
    return (path / "model_index.json").exists() and not (path / NAME).exists()


def _check_floors(floors: Mapping[str, float], *, features: bool, scorer: bool) -> None:
    for name in floors:
        if METRICS[name].needs == "features" and not features:
            raise BadInput(f"--floor {name} without --features", fix="pass --features FILE.onnx")
        if METRICS[name].needs == "scorer" and not scorer:
            raise BadInput(f"--floor {name} without --scorer", fix="pass --scorer DIR")


def _check_measurable(
    floors: Mapping[str, float], reference: Artist, candidate: Artist, how: How, pictures: int
) -> None:
    """Raises BadInput for a floor on what these two and so many pictures will not give, before any is drawn."""
    sample = reference.manifest.sample
    side = min(how.height or sample.height, how.width or sample.width)
    if "network_sqnr_db" in floors and not same_path(reference, candidate):
        raise BadInput(
            f"--floor network_sqnr_db: {candidate.label} and {reference.label} differ in plan or guidance",
            expected="networks that can be asked the same",
            fix="pass --steps, --sampler or --guidance, or take the floor away",
        )
    if "ssim" in floors and side < SSIM_WINDOW:
        raise BadInput(f"--floor ssim for pictures of {side} pixels", expected=f"{SSIM_WINDOW} or more")
    if "frechet_distance" in floors and pictures < 2:
        raise BadInput("--floor frechet_distance for one picture", expected="2 or more", fix="pass --count")


def _describe(artist: Artist) -> dict[str, Any]:
    return {
        "label": artist.label,
        "name": artist.manifest.name,
        "target": artist.manifest.target.get("id"),
        "sampler": artist.plan.sampler,
        "steps": artist.plan.steps,
        "calls": len(artist.plan.calls),
        "guidance": artist.guidance,
    }


def _failure(short: Sequence[Shortfall]) -> dict[str, Any]:
    """What `--json` readers look for in any failure."""
    error = GateFailed("; ".join(map(str, short)), fix="relax the floor, or the passes that made the bundle")
    parts = {"found": error.found, "expected": error.expected, "fix": error.fix}
    return {"type": "GateFailed", "message": str(error), **parts, "exit_code": error.exit_code}


def _text(report: Mapping[str, Any]) -> str:
    reference, pictures = report["reference"], len(report["subjects"])
    blocks = []
    for candidate in report["candidates"]:
        rows = []
        for name, got in candidate["metrics"].items():
            interval = span(name, got["low"], got["high"])
            worst = shown(name, got["worst"]) if "worst" in got else ""
            rows.append((METRICS[name].title, shown(name, got["value"], unit=True), interval, worst))
        head = f"{candidate['label']} against {reference['label']}, {pictures} pictures"
        lines = [head, table(rows, ("", "median or value", "95 % interval", "worst"))]
        if candidate["apart"]:
            lines.append(candidate["apart"])
        lines += [f"short of a floor: {Shortfall(**s)}" for s in candidate["shortfalls"]]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)

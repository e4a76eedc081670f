"""`fewstep bench`: measure bundles in turn, compare them, and leave report.json and report.html.

The JSON document (schema 1) keeps every raw sample: whoever doubts a percentile can compute another.

    schema, kind, created, command   what this file is and the line that made it
    job, host                        prompts, steps, runs, threads; what is known of the host (tools/host.py)
    bundles[]                        label, sha256 of the manifest, sizes, the gate's numbers, and of each series
                                     `samples` (raw, seconds and bytes) and `summary` (n, p50, p90, p99, min, max)
    comparisons[]                    a, b, metric, ratio with its 95 % interval, verdict (tools/stats.py)
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, output_errors
from ..runtime.plan import Plan
from .console import Answer, add_threads, human_bytes, human_rate, human_seconds, positive, table, watch
from .host import fingerprint, usable_cores
from .measure import STAGES, Job, Samples, measure
from .profile import Measured, host_profile, write_profile
from .report import render
from .stats import compare, summary

__all__ = ["SCHEMA", "add", "bench", "call"]

SCHEMA = 1

PROMPTS = ("a red apple", "a cat and a dog", "a sailboat on a blue background", "a house")

COMPARED = ("image", "step", "text", "decode", "core", "cold")
"""core: processor time an image; cold: a fresh process up to its first image."""

MARGIN = 0.01
"""Smaller differences get no name: two processes of one program can differ so much by the luck of their memory
layout alone (Mytkowicz et al., Producing Wrong Data Without Doing Anything Obviously Wrong!, ASPLOS 2009)."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", type=Path)
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), type=Path, help="measure A against B")
    parser.add_argument("--baseline", metavar="DIR", help="measure all others against this bundle")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="repeat for several")
    parser.add_argument("--steps", type=int, help="network steps an image (default: each bundle's own plan)")
    parser.add_argument(
        "--sampler", metavar="NAME", help="default: each bundle's own; see `fewstep samplers`"
    )
    parser.add_argument("--times", metavar="GRID", help="time grid (default: each bundle's own)")
    parser.add_argument("--runs", type=positive, default=12, help="warm images a bundle (default 12)")
    parser.add_argument("--cold-runs", type=positive, default=6, help="fresh processes a bundle (default 6)")
    add_threads(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="where report.html and report.json go"
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        type=Path,
        help="write this host's rates as TOML, for fewstep export --dry-run --profile FILE",
    )


def call(args: argparse.Namespace) -> Answer:
    paths = [*args.bundles, *(args.compare or ())]
    baseline = Path(args.baseline) if args.baseline and args.baseline != "none" else None
    if args.compare and baseline is None:
        baseline = paths.pop()
    if not paths:
        raise BadInput("no bundle to measure", fix="fewstep bench BUNDLE [BUNDLE...] -o DIR")
    return bench(
        paths,
        baseline,
        output=args.output,
        prompts=tuple(args.prompt or PROMPTS),
        steps=args.steps,
        sampler=args.sampler,
        times=args.times,
        runs=args.runs,
        cold_runs=args.cold_runs,
        threads=args.threads,
        profile=args.profile,
        command=["fewstep", *sys.argv[1:]],
    )


def bench(
    paths: Sequence[Path],
    baseline: Path | None = None,
    *,
    output: Path | None,
    prompts: tuple[str, ...] = PROMPTS,
    steps: int | None = None,
    sampler: str | None = None,
    times: str | None = None,
    runs: int = 12,
    cold_runs: int = 6,
    threads: int | None = None,
    profile: Path | None = None,
    command: Sequence[str] = (),
) -> Answer:
    """Measure `paths` and, in the same rounds, `baseline`; the report goes into `output` where given.

    profile  where this host's rates go, found from the bundles' own plans
    """
    if profile is not None and (steps or sampler or times):
        raise BadInput(
            "--profile with --steps, --sampler or --times",
            expected="the bundles' own plans, whose calls they count",
            fix="leave them out, or measure twice",
        )
    labelled = label_paths([*paths, *([baseline] if baseline else [])])
    bundles = {label: Bundle.open(path, check="size") for label, path in labelled.items()}
    if output is not None:
        with output_errors(output):  # before minutes of measuring, not after
            output.mkdir(parents=True, exist_ok=True)
    job = Job(labelled, prompts, steps, sampler, times, runs, cold_runs, threads)
    host = fingerprint()
    samples: dict[str, Samples] = {}
    watch(measure(job, samples), "bench", lambda tick: (tick.fraction, tick.note))

    reference = list(labelled)[-1 if baseline else 0]
    others = [label for label in labelled if label != reference]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "fewstep-bench",
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": [shlex.quote(word) for word in command],
        "job": {k: v for k, v in asdict(job).items() if k != "bundles"},
        "host": host,
        "baseline": reference if baseline else None,
        "bundles": [_describe(label, bundles[label], samples[label], job) for label in labelled],
        "comparisons": [c for label in others for c in _compare(label, reference, samples)],
    }
    for entry in report["bundles"]:
        if entry["label"] != reference:
            shown = samples[entry["label"]].pictures, samples[reference].pictures
            entry |= {"psnr_db": _psnr(*shown), "psnr_against": reference}

    text = _text(report)
    if output is not None:
        page = render(report, {label: samples[label].pictures for label in labelled})
        document = json.dumps(report, indent=1, allow_nan=False)
        atomic_write(output / "report.json", document.encode())
        atomic_write(output / "report.html", page.encode())
        text += f"\nreport: {output / 'report.html'}"
        report = {**report, "report": str(output / "report.html")}
    if profile is not None:
        measured = [
            Measured(bundles[label].manifest, _stages(seen), max(seen.peak_rss_bytes, default=None))
            for label, seen in samples.items()
        ]
        found = host_profile(measured, threads or usable_cores())
        about = [
            f"Measured on {host['cpu']}, {host['os']}, {report['created']}",
            f"by {' '.join(report['command'])}",
        ]
        with output_errors(profile):
            write_profile(found, profile, about)
        report = {**report, "profile": str(profile)}
        text += f"\nprofile: {profile}"
    return Answer(report, text)


def _stages(samples: Samples) -> dict[str, float]:
    """Medians over warm pictures."""
    return {name: summary(samples.warm[name])["p50"] for name in STAGES if samples.warm.get(name)}


def label_paths(paths: Sequence[Path]) -> dict[str, Path]:
    """Folder names as labels; the parent's name too where two bundles share one."""
    names = [path.resolve().name for path in paths]
    twice = {name for name, count in Counter(names).items() if count > 1}
    full = [f"{p.resolve().parent.name}/{n}" if n in twice else n for p, n in zip(paths, names, strict=True)]
    labelled: dict[str, Path] = {}
    for label, path in zip(full, paths, strict=True):
        labelled[label if label not in labelled else f"{label} ({len(labelled) + 1})"] = path
    return labelled


def _describe(label: str, bundle: Any, samples: Samples, job: Job) -> dict[str, Any]:
    manifest = bundle.manifest
    parts: Counter[str] = Counter()
    for name, spec in manifest.files.items():
        parts[name.split("/")[0]] += spec.bytes
    own = (bundle.path / "manifest.json").read_bytes()
    parts["manifest.json"] = len(own)
    return {
        "label": label,
        "name": manifest.name,
        "sha256": hashlib.sha256(own).hexdigest(),
        "target": manifest.target.get("id"),
        "steps": job.steps or Plan.from_json(manifest.plans["default"]).steps,
        "sampler": job.sampler or manifest.sampler,
        "times": job.times or "auto",
        "width": manifest.sample.width,
        "height": manifest.sample.height,
        "captions": list(job.prompts)
        if manifest.tokenizer
        else [f"seed {i}" for i in range(len(job.prompts))],
        "size": {"total": sum(parts.values()), "parts": dict(parts)},
        "quality": {k: v for k, v in manifest.quality.items() if k != "golden"},
        "summary": _summary(samples),
        "samples": {k: v for k, v in asdict(samples).items() if k != "pictures"},
    }


def _summary(samples: Samples) -> dict[str, Any]:
    warm = {name: summary(values) for name, values in samples.warm.items()}
    cold = {
        key: summary([run[key] for run in samples.cold]) for key in ("process", "import", "open", "image")
    }
    cold["start"] = summary([r["process"] - r["import"] - r["open"] - r["image"] for r in samples.cold])
    step = warm.get("step", {}).get("p50")
    return {
        **warm,
        "cold": cold,
        "load": samples.load,
        "it_per_s": 1 / step if step else None,
        "peak_rss_bytes": max(samples.peak_rss_bytes, default=None),
    }


def _compare(a: str, b: str, samples: dict[str, Samples]) -> list[dict[str, Any]]:
    rows = []
    for metric in COMPARED:
        mine, other = _series(samples[a], metric), _series(samples[b], metric)
        if mine and len(mine) == len(other) and min(*mine, *other) > 0:
            got = compare(mine, other, margin=MARGIN)
            rows.append({"a": a, "b": b, "metric": metric, **got.to_json(), "text": str(got)})
    return rows


def _series(samples: Samples, metric: str) -> list[float]:
    """One value a round. The steps of an image count once, by their mean: they are not independent."""
    if metric == "cold":
        return [run["process"] for run in samples.cold]
    values = samples.warm.get(metric, [])
    images = len(samples.warm.get("image", []))
    if metric == "step" and images and len(values) % images == 0:
        return [float(v) for v in np.reshape(values, (images, -1)).mean(axis=1)] if values else []
    return values


def _psnr(a: Sequence[str], b: Sequence[str]) -> float | None:
    """In dB over all prompts, 8 bits a channel; None where the pictures are identical or differ in size."""
    from PIL import Image

    error, count = 0.0, 0
    for mine, other in zip(a, b, strict=True):
        x, y = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(p))), dtype=np.float64) for p in (mine, other)
        )
        if x.shape != y.shape:
            return None
        error, count = error + float(np.square(x - y).sum()), count + x.size
    return float(10 * np.log10(255**2 * count / error)) if error else None


def _text(report: dict[str, Any]) -> str:
    rows = []
    for b in report["bundles"]:
        s = b["summary"]
        warm = "  ".join(human_seconds(s["image"][p]) for p in ("p50", "p90", "p99"))
        rate = human_rate(s["it_per_s"])
        first = human_seconds(s["cold"]["process"]["p50"])
        row = (
            b["label"],
            warm,
            rate,
            first,
            human_bytes(s["peak_rss_bytes"]),
            human_bytes(b["size"]["total"]),
        )
        rows.append(row)
    header = ("bundle", "image p50  p90  p99", "it/s", "first image", "peak memory", "on disk")
    lines = [table(rows, header), ""]
    for c in report["comparisons"]:
        lines.append(f"{c['a']} against {c['b']}, {c['metric']}: {c['text']}")
    if not report["comparisons"]:
        lines.append("no baseline measured: nothing is claimed about speed-ups (see --baseline)")
    return "\n".join(lines)

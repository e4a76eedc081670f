"""`fewstep export`: a model becomes a bundle for a target."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from ..runtime.two_graphs import SHARE
from .console import Answer, human_bytes, human_seconds, needs, table, watch

__all__ = ["add", "call", "describe"]

WEB = "web"
"""Not a device: a site with the app and a bundle for every kind of browser."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a diffusers folder, a .safetensors file or a hub id")
    parser.add_argument(
        "--target", required=True, metavar="NAME", help="a device: see `fewstep targets`; or web: a site"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="the bundle to write")
    parser.add_argument("--steps", type=int, help="steps of the default plan")
    parser.add_argument(
        "--sampler", metavar="NAME", help="instead of the model's own: see `fewstep samplers`"
    )
    parser.add_argument(
        "--times", metavar="GRID", help="time grid instead of the model's own, such as karras"
    )
    parser.add_argument(
        "--recipe", metavar="FILE", type=Path, help="a TOML file instead of the target's recipe"
    )
    parser.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="bits of weights and of inputs: w8a8, w4a8, w4a4, or of weights alone: w8, w4, w3.5",
    )
    parser.add_argument(
        "--config",
        metavar="DIR",
        type=Path,
        help="for a single .safetensors file: a diffusers folder of its family",
    )
    parser.add_argument(
        "--image-input", action="store_true", help="with the VAE's encoder: start from pictures"
    )
    parser.add_argument(
        "--stitch",
        metavar="MODEL[:SHARE]",
        help="a smaller model of the same latents draws the first share of the calls (0.4)",
    )
    parser.add_argument(
        "--student", metavar="MODEL", help="a few-step model of the same latents draws, and MODEL can refine"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is already there")
    parser.add_argument("--download", action="store_true", help="allow fetching a hub id")
    parser.add_argument("--no-speed", action="store_true", help="do not compare with the un-optimized export")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would come of it and whether it fits; write nothing"
    )
    parser.add_argument(
        "--profile",
        metavar="FILE",
        type=Path,
        help="rates to foresee by: what `fewstep bench --profile` wrote",
    )


def call(args: argparse.Namespace) -> Answer:
    with needs("export"):
        from ..export import Exported, export_bundle

    if args.target == WEB:
        return _site(args)
    small, share = _second(args.stitch, args.student)
    events = export_bundle(
        args.model,
        args.target,
        args.output,
        steps=args.steps,
        sampler=args.sampler,
        times=args.times,
        recipe=args.recipe,
        quantize=args.quantize,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        allow_download=args.download,
        config=args.config,
        measure_speed=not args.no_speed,
        image_input=args.image_input,
        small=small,
        share=share,
        profile=args.profile,
    )
    seen = watch(events, "export", describe)
    done = seen[-1]
    if not isinstance(done, Exported):
        return _intended(seen)

    manifest = done.manifest
    size = sum(spec.bytes for spec in manifest.files.values())
    data = {
        "bundle": str(done.path),
        "name": manifest.name,
        "target": args.target,
        "bytes": size,
        "parts": list(manifest.parts),
        "quality": dict(manifest.quality),
        "speed": dict(manifest.speed),
        "seconds": dict(done.seconds),
        "peak_rss_bytes": dict(done.peak_rss_bytes),
    }
    return Answer(data, f"{done.path}: {manifest.name} for {args.target}, {human_bytes(size)}")


def _site(args: argparse.Namespace) -> Answer:
    """The app with a bundle for every kind of browser."""
    from ..export.site import Site, export_site

    for option in ("quantize", "stitch", "student", "image_input"):
        if getattr(args, option):
            raise BadInput(
                f"--{option.replace('_', '-')} with --target {WEB}",
                expected="the recipes of the targets web-wasm and web-webgpu",
                fix="export a bundle with --target web-wasm, and fewstep serve it",
            )
    events = export_site(
        args.model,
        args.output,
        steps=args.steps,
        sampler=args.sampler,
        times=args.times,
        recipe=args.recipe,
        overwrite=args.overwrite,
        dry_run=args.dry_run,
        allow_download=args.download,
        config=args.config,
    )
    seen = watch(events, "export", describe)
    done = seen[-1]
    if not isinstance(done, Site):
        return _intended(seen)
    sizes = {
        each.path.name: sum(spec.bytes for spec in each.manifest.files.values()) for each in done.bundles
    }
    data = {"site": str(done.path), "bundles": sizes}
    text = ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items())
    return Answer(data, f"{done.path}: a site for any static host, with the bundles {text}")


def _intended(seen: Sequence[Any]) -> Answer:
    """What a dry run says. A bundle that would not fit is a failure, so that scripts can ask."""
    stages = [{"stage": event.stage, "note": event.note} for event in seen]
    lines = [f"{stage['stage']}: {stage['note']}".rstrip(": ") for stage in stages]
    data: dict[str, Any] = {"dry_run": True, "stages": stages}
    text = "\n".join(["would do:", *lines])
    wrong = []
    for event in seen:
        if hasattr(event, "forecast"):
            wrong += event.wrong
            more, said = foreseen(event)
            data, text = data | more, f"{text}\n\n{said}"
    return Answer(data, text, BadInput.exit_code if wrong else 0)


def foreseen(event: Any) -> tuple[dict[str, Any], str]:
    """What a bundle would be, and whether it fits: as data and as text."""
    found, rows = event.forecast, []
    for name, part in found.parts.items():
        main = sorted(part.shares.items(), key=lambda item: -item[1])[:2]
        time = human_seconds(part.call_s) if found.timed else ""
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in main)
        size, memory = human_bytes(part.size_bytes), human_bytes(part.memory_bytes)
        rows.append((name, part.precision, size, memory, time, part.calls, shares))
    lines = [table(rows, ("part", "computed in", "on disk", "in memory", "a call", "calls", "mostly")), ""]
    others = {name: other.to_json() for name, other in event.others.items()}
    for name, other in {"as asked": found, **event.others}.items():
        time = f", a picture in {human_seconds(other.picture_s)}" if other.timed else ""
        label = name if other is found else f"--quantize {name}"
        size, memory = human_bytes(other.size_bytes), human_bytes(other.memory_bytes)
        least = human_bytes(other.low_memory_bytes)
        lines.append(f"{label}: {size} on disk, {memory} in memory ({least} a part at a time){time}")
    if found.not_counted:
        lines.append(f"not counted: what {', '.join(found.not_counted)} will change")
    if not found.timed:
        lines.append(f"no rates are known for {event.target.id}: pass --profile for times")
    lines += [f"{event.target.id}: {sentence}; {event.remedy}" for sentence in event.wrong]
    if not event.wrong:
        lines.append(f"it fits {event.target.id}")
    data = {
        "forecast": found.to_json(),
        "others": others,
        "fits": not event.wrong,
        "wrong": event.wrong,
        "remedy": event.remedy if event.wrong else None,
    }
    return data, "\n".join(lines)


def _second(stitch: str | None, student: str | None) -> tuple[str | None, float | None]:
    """The model that comes along, and its share of the calls; None for a student, which draws alone."""
    if stitch and student:
        raise BadInput(
            "--stitch and --student", expected="one of them", fix="a bundle has one small denoiser"
        )
    if not stitch:
        return student, None
    name, _, number = stitch.rpartition(":")  # arch:bk-sdm-small has a colon of its own
    try:
        return (name, float(number)) if name else (stitch, SHARE)
    except ValueError:
        return stitch, SHARE


def describe(event: Progress | Any) -> tuple[float | None, str]:
    return event.fraction, f"{event.stage} {event.note}".strip()

"""`fewstep export`: a model becomes a bundle for a target."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from ..runtime.two_graphs import SHARE
from .console import Answer, human_bytes, needs, watch

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
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and write nothing")


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
    """What a dry run says."""
    stages = [{"stage": event.stage, "note": event.note} for event in seen]
    lines = [f"{stage['stage']}: {stage['note']}".rstrip(": ") for stage in stages]
    return Answer({"dry_run": True, "stages": stages}, "\n".join(["would do:", *lines]))


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

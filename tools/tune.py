"""`fewstep tune plan`: fit a plan of few calls to the model that ships, and put it into its bundle."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.errors import BadInput
from ..runtime.progress import Progress
from ..tune.methods import METHODS
from .console import Answer, add_threads, human_seconds, needs, watch
from .subjects import read_prompts

__all__ = ["add", "call"]


def add(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(title="what", metavar="WHAT", dest="what", required=True)
    line = "search a plan of few calls for this very model and add it to the bundle"
    plan = what.add_parser("plan", help=line, description=line, allow_abbrev=False)
    plan.add_argument("bundle", metavar="BUNDLE", type=Path)
    plan.add_argument("--calls", type=int, required=True, help="network calls of the plan")
    methods = f"{', '.join(METHODS)}; default: learned"
    plan.add_argument("--method", default="learned", metavar="NAME", help=methods)
    plan.add_argument(
        "--noises", type=int, default=32, help="starts to fit on; a quarter is held out to judge by"
    )
    plan.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="repeat for several")
    plan.add_argument("--prompts", type=Path, metavar="FILE", help="a text file, one prompt a line")
    plan.add_argument("--guidance", type=float, metavar="SCALE", help="default: the bundle's own")
    plan.add_argument("--reference-steps", type=int, default=100, metavar="N", help="of the long runs; 100")
    plan.add_argument("--batch", type=int, default=16, metavar="N", help="samples in one network call; 16")
    plan.add_argument("-s", "--seed", type=int, default=0, help="of the first noise, and of the search")
    plan.add_argument(
        "--storage", default="", metavar="URL", help="of optuna, for workers that share a solver search"
    )
    plan.add_argument("--workdir", type=Path, metavar="DIR", help="keeps what is done; default: BUNDLE.tune")
    plan.add_argument("--name", default="", help="of the plan; default: METHOD-CALLS")
    plan.add_argument("-o", "--out", type=Path, metavar="DIR", help="a new bundle; default: add to this one")
    plan.add_argument("--default", action="store_true", help="make it the plan of runs that ask for none")
    plan.add_argument(
        "--overwrite", action="store_true", help="replace a plan of that name, or the bundle at --out"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    plan.add_argument("--debug", action="store_true", help="show the traceback of an error")
    add_threads(plan)


def call(args: argparse.Namespace) -> Answer:
    with needs("tune"):
        from ..tune.job import Tuned, tune_bundle
        from ..tune.reference import Setting
    if args.prompt and args.prompts:
        raise BadInput("--prompt and --prompts", expected="one or the other")
    prompts = tuple(read_prompts(args.prompts) if args.prompts else args.prompt or ())
    setting = Setting(args.noises, prompts, args.guidance, args.reference_steps, args.seed, args.batch)
    began = time.perf_counter()
    with needs("tune"):
        events = tune_bundle(
            args.bundle,
            calls=args.calls,
            method=args.method,
            setting=setting,
            name=args.name,
            out=args.out,
            workdir=args.workdir,
            storage=args.storage,
            default=args.default,
            overwrite=args.overwrite,
            threads=args.threads,
        )
        done = watch(events, "tune", _describer())[-1]
    assert isinstance(done, Tuned), "the last event of a job that raised nothing"
    data = {"bundle": str(done.path), **done.record, "seconds": time.perf_counter() - began}
    score, fixed = done.found.score, done.found.best_fixed
    text = (
        f"{done.path}: plan {done.name}, {args.calls} calls, {score.psnr_db:.2f} dB from the reference on starts held"
        f" out; {done.found.fixed}: {fixed.psnr_db:.2f} dB\nfewstep run {done.path} --plan {done.name}"
    )
    return Answer(data, text)


def _describer() -> Callable[[Any], tuple[float | None, str]]:
    """Each event as the bar shows it, with the time that is left by the pace so far."""
    first: tuple[float, float] | None = None

    def describe(event: Progress | Any) -> tuple[float | None, str]:
        nonlocal first
        now, share = time.monotonic(), event.fraction or 0.0
        if first is None or share == 0:
            first = now, share
        note = f"{event.stage} {event.note}".strip()
        gone = share - first[1]
        if gone > 0 and share < 1 and now - first[0] > 1:
            note += f", about {human_seconds((now - first[0]) * (1 - share) / gone)} left"
        return event.fraction, note

    return describe

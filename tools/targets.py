"""`fewstep targets`: the devices fewstep exports for."""

from __future__ import annotations

import argparse
import dataclasses

from ..targets import known_targets, load_target
from .console import Answer, table
from .report import flatten

__all__ = ["add", "call"]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="show everything known about one")


def call(args: argparse.Namespace) -> Answer:
    if args.name:
        one = dataclasses.asdict(load_target(args.name))
        return Answer(one, table(flatten(one)))
    found = [load_target(name) for name in known_targets()]
    rows = [(t.id, t.device.name, t.backend.engine, ", ".join(t.limits.precisions)) for t in found]
    data = {"targets": [dataclasses.asdict(target) for target in found]}
    return Answer(data, table(rows, ("target", "device", "engine", "precisions")))

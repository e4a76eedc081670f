"""What a part costs before and after a change: both on one engine, in turns, on this host."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..model.model import Part
from ..model.trajectories import run_part
from ..runtime.backends import open_session
from ..runtime.errors import BadInput
from ..targets import Target
from . import parts

__all__ = ["side_by_side"]

ROUNDS = 12
"""A median of twelve pairs has an exact 95 % interval inside its range (a sign test needs six)."""

BUDGET_S = 60.0
"""After that no further round begins; three are made in any case."""


def side_by_side(
    versions: Mapping[str, Part], target: Target | None, work: Path
) -> dict[str, dict[str, Any]]:
    """Milliseconds of one forward of one sample at the model's own size: name -> wall, core, and weights' bytes.

    versions  name -> the part; all of equal inputs
    target    its engine and precision run them, when it can here; None: torch, in float32
    Wall and core (processor time of this process) are [quartile, median, quartile] over rounds that take turns.
    """
    runs: dict[str, Callable[[], object]] = {}
    bytes_: dict[str, int] = {}
    closing = []
    for name, part in versions.items():
        sizes = part.example.default_sizes() | {"batch": 1}
        feeds = part.example.feeds(part.inputs, sizes, seed=0)
        if target is None:
            runs[name] = lambda part=part, feeds=feeds: run_part(part, feeds)  # type: ignore[misc]
            bytes_[name] = part.weight_bytes()
            continue
        folder, own = work / name / part.name, work / name / "work"
        own.mkdir(parents=True)
        lowered = parts.lower(part, folder, target, own, None)
        here = parts.here(lowered.spec, target)
        if here.how != "device":
            fix = "leave out --target, or measure on the device"
            raise BadInput(
                f"this host is no {target.device.name}", expected="a target that runs here", fix=fix
            )
        session = open_session(folder.parent / here.spec.graph, here.spec)
        closing.append(session)
        runs[name] = lambda session=session, feeds=feeds: session.run(feeds)  # type: ignore[misc]
        bytes_[name] = sum(file.stat().st_size for file in folder.iterdir())
    wall: dict[str, list[float]] = {name: [] for name in runs}
    core: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()  # the first compiles, or plans memory
    began, order = time.perf_counter(), list(runs)
    for done in range(ROUNDS):
        if done > 2 and time.perf_counter() - began > BUDGET_S:
            break
        for name in order:
            first, spent = time.perf_counter(), time.process_time()
            runs[name]()
            core[name].append(1e3 * (time.process_time() - spent))
            wall[name].append(1e3 * (time.perf_counter() - first))
        order.reverse()
    for session in closing:
        session.close()
    return {
        name: {"wall_ms": _quartiles(wall[name]), "core_ms": _quartiles(core[name]), "bytes": bytes_[name]}
        for name in runs
    }


def _quartiles(values: list[float]) -> list[float]:
    return [round(float(value), 4) for value in np.quantile(values, [0.25, 0.5, 0.75])]

"""Is the export any faster? Ours against what torch.onnx.export writes by itself, in turns, on this host."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Part
from ..runtime.backends import open_session
from ..runtime.manifest import PartSpec

__all__ = ["SKIP_BYTES", "measure", "verdict"]

SKIP_BYTES = 1 << 30
"""Parts with more weights are not measured at export: a second export and ten forwards take minutes; `fewstep bench`
measures them."""

BUDGET_S = 2.0
"""Time for both graphs of one part together; at least MIN_RUNS of each whatever it takes."""

MIN_RUNS, MAX_RUNS = 5, 200

DEAR_S = 2.0
"""A part whose forward takes longer is left to `fewstep bench`: ten of them are no few seconds any more."""


def measure(part: Part, spec: PartSpec, graph: Path, baseline: Path) -> dict[str, Any]:
    """Medians and quartiles in milliseconds of one forward at batch 2, both graphs taking turns."""
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0)
    sessions = {"exported": open_session(graph, spec), "unoptimized": open_session(baseline, spec)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    began = time.perf_counter()
    for session in sessions.values():  # the first run plans memory
        session.run(feeds)
        if time.perf_counter() - began > DEAR_S:
            return {"verdict": f"not measured: a forward takes over {DEAR_S:g} s; fewstep bench measures it"}
    began = time.perf_counter()
    while len(times["exported"]) < MIN_RUNS or (
        time.perf_counter() - began < BUDGET_S and len(times["exported"]) < MAX_RUNS
    ):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(feeds)
            times[name].append((time.perf_counter() - start) * 1e3)
    for session in sessions.values():
        session.close()
    return summary(times)


def summary(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """times  {"exported": [ms, ...], "unoptimized": [ms, ...]}"""
    quartiles: dict[str, NDArray[np.float64]] = {
        name: np.quantile(values, [0.25, 0.5, 0.75]) for name, values in times.items()
    }
    speedup = float(quartiles["unoptimized"][1] / quartiles["exported"][1])
    return {
        **{f"{name}_ms": [round(float(q), 4) for q in values] for name, values in quartiles.items()},
        "runs": len(times["exported"]),
        "speedup": round(speedup, 3),
        "verdict": verdict(quartiles["exported"], quartiles["unoptimized"]),
    }


def verdict(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    """In so many words. Quartiles that overlap are no difference: this is a few seconds on a busy host."""
    if ours[2] < theirs[0]:
        return f"faster: {theirs[1] / ours[1]:.2f} times the un-optimized export"
    if ours[0] > theirs[2]:
        return f"slower: {ours[1] / theirs[1]:.2f} times the time of the un-optimized export"
    return "no speed-up over the un-optimized export"

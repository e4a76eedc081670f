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

MIN_RUNS, MAX_RUNS = 8, 200
"""Eight won of eight is the least a sign test at one in a hundred can tell from chance."""

DEAR_S = 1.0
"""A part whose forward takes longer is left to `fewstep bench`: sixteen of them are no few seconds any more."""


def measure(part: Part, spec: PartSpec, graph: Path, baseline: Path) -> dict[str, Any]:
    """Medians and quartiles in milliseconds of one forward at batch 2, both graphs taking turns."""
    feeds = part.example.feeds(part.inputs, part.example.default_sizes(), seed=0)
    # what torch.onnx.export writes goes to ONNX Runtime, whichever engine ours is for
    plain = PartSpec("onnxruntime", "", spec.inputs, spec.outputs)
    sessions = {"exported": open_session(graph, spec), "unoptimized": open_session(baseline, plain)}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():  # the first run compiles, or plans memory
        session.run(feeds)
    began = time.perf_counter()
    for session in sessions.values():
        session.run(feeds)
        if time.perf_counter() - began > DEAR_S:
            return {"verdict": f"not measured: a forward takes over {DEAR_S:g} s; fewstep bench measures it"}
    began, order = time.perf_counter(), list(sessions)
    while len(times["exported"]) < MIN_RUNS or (
        time.perf_counter() - began < BUDGET_S and len(times["exported"]) < MAX_RUNS
    ):
        for name in order:
            start = time.perf_counter()
            sessions[name].run(feeds)
            times[name].append((time.perf_counter() - start) * 1e3)
        order.reverse()  # whoever comes second finds warmer caches, or colder ones
    for session in sessions.values():
        session.close()
    return summary(times)


def summary(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """times  {"exported": [ms, ...], "unoptimized": [ms, ...]}, one of each a round"""
    ours, theirs = (np.asarray(times[name]) for name in ("exported", "unoptimized"))
    quartiles = {name: np.quantile(values, [0.25, 0.5, 0.75]) for name, values in times.items()}
    return {
        **{f"{name}_ms": [round(float(q), 4) for q in values] for name, values in quartiles.items()},
        "rounds": len(ours),
        "won": int(np.count_nonzero(ours < theirs)),
        "speedup": round(float(np.median(theirs / ours)), 3),
        "verdict": verdict(ours, theirs),
    }


def verdict(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> str:
    """In so many words: a sign test over the rounds, each of which saw the same disturbances.

    ours, theirs  [rounds] milliseconds
    A difference counts when chance alone would give it less than once in a hundred times (normal approximation of the
    binomial, 2.58 standard deviations of rounds / 2) and is at least a percent.
    """
    rounds, won = len(ours), np.count_nonzero(ours < theirs)
    ratio = float(np.median(theirs / ours))
    if abs(won - rounds / 2) > 2.58 * rounds**0.5 / 2:
        if ratio > 1.01:
            return f"faster: {ratio:.2f} times the un-optimized export"
        if ratio < 0.99:
            return f"slower: {1 / ratio:.2f} times the time of the un-optimized export"
    return "no speed-up over the un-optimized export"

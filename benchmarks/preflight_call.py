"""One graph in a process of its own, for benchmarks/preflight.py: core milliseconds of a call, and the memory it took.

python benchmarks/preflight_call.py FOLDER FEEDS.npz SECONDS        # one call's time and the process's peak
python benchmarks/preflight_call.py ENGINE                          # the process without any graph
python benchmarks/preflight_call.py BUNDLE                          # what the runtime takes beside its engine
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

LEAST = 5
"""Calls, whatever they take; a first quarter of them is undisturbed even beside other programs."""


PICTURES = 20


class Clocked:
    """A session that adds up what it takes."""

    def __init__(self, session: Any) -> None:
        self.session, self.core_s, self.calls = session, 0.0, 0

    def run(self, *arguments: Any) -> Any:
        before = time.process_time()
        found = self.session.run(*arguments)
        self.core_s, self.calls = self.core_s + time.process_time() - before, self.calls + 1
        return found

    def close(self) -> None:
        self.session.close()


def between(drawing: Any) -> float:
    """Microseconds of processor time a call beside the engine's, median over pictures of a pipeline."""
    drawing("a red apple", seed=0)
    clocked = [Clocked(session) for session in drawing._sessions.values()]
    drawing._sessions.update(zip(drawing._sessions, clocked, strict=True))
    found = []
    for seed in range(PICTURES):
        inside, calls = sum(one.core_s for one in clocked), sum(one.calls for one in clocked)
        before = time.process_time()
        drawing("a red apple", seed=seed)
        spent = time.process_time() - before - sum(one.core_s for one in clocked) + inside
        found.append(spent / (sum(one.calls for one in clocked) - calls) * 1e6)
    return median(found)


def main() -> None:
    import PIL.Image  # noqa: F401 - what a pipeline has in memory beside its engine
    import tokenizers  # noqa: F401

    from fewstep.runtime import pipeline
    from fewstep.runtime.backends import open_session
    from fewstep.runtime.manifest import PartSpec, TensorSpec
    from fewstep.tools.host import peak_rss_bytes

    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():
        print(json.dumps({"between_us": between(pipeline.Pipeline.from_pretrained(sys.argv[1], threads=1))}))
        return
    if len(sys.argv) == 2:
        module = import_module(f"fewstep.runtime.backends.{sys.argv[1]}")
        module.runs_in(PartSpec(sys.argv[1], "", (), ()))
        print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}))
        return
    folder, seconds = Path(sys.argv[1]), float(sys.argv[3])
    said = json.loads((folder / "spec.json").read_text())
    ends = {
        key: tuple(TensorSpec(end["name"], end["dtype"], tuple(end["shape"])) for end in said[key])
        for key in ("inputs", "outputs")
    }
    spec = PartSpec(said["engine"], said["graph"], **ends, precision=said["precision"])
    session = open_session(folder / said["graph"], spec, threads=1)
    kept = np.load(sys.argv[2])
    feeds = {end.name: kept[end.name].astype(end.dtype) for end in spec.inputs}
    for _ in range(2):  # the first compiles, or plans memory
        session.run(feeds)
    peak, took, began = peak_rss_bytes(), [], time.perf_counter()
    while len(took) < LEAST or time.perf_counter() - began < seconds:
        before = time.process_time()
        session.run(feeds)
        took.append((time.process_time() - before) * 1e3)
        if len(took) > 1 and sum(took) > 10e3 * seconds:
            break
    print(json.dumps({"core_ms": sorted(took)[len(took) // 4], "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()

"""Run an exported graph on its engine: here, or in a process of its own where memory matters.

python -m fewstep.export.engine JOB.json       is that process; `run_apart` starts it
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.backends import open_session
from ..runtime.errors import GateFailed
from ..runtime.manifest import PartSpec, TensorSpec

__all__ = ["Ran", "run_apart", "run_here"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Ran:
    outputs: list[dict[str, NDArray[Any]]]
    """One dictionary for each feed."""
    peak_mib: float
    """Peak resident memory of the process that ran it."""


def run_here(graph: Path, spec: PartSpec, feeds: Sequence[Arrays]) -> Ran:
    session = open_session(graph, spec)
    try:
        return Ran(
            [session.run(feed) for feed in feeds], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        )
    finally:
        session.close()


def run_apart(graph: Path, spec: PartSpec, feeds: Sequence[Arrays]) -> Ran:
    """The same in a fresh process, which gives all of its memory back.

    Raises GateFailed when that process dies, which is what running out of memory looks like.
    """
    with tempfile.TemporaryDirectory(prefix="fewstep-engine-") as name:
        folder = Path(name)
        for i, feed in enumerate(feeds):
            np.savez(folder / f"in-{i}.npz", **feed)
        job = {"graph": str(graph), "spec": asdict(spec), "count": len(feeds)}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", __spec__.name, str(folder / "job.json")]
        # its standard input is a pipe from us: when we are killed it reads the end and stops too
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            try:
                out, err = child.communicate()
            except BaseException:
                child.kill()
                raise
        if child.returncode != 0:
            said = err.decode(errors="replace").strip().splitlines()
            raise GateFailed(
                f"{spec.graph}: the engine's process ended with {child.returncode} ({said[-1] if said else 'silent'})",
                expected="outputs",
                fix="if it was killed, free memory and try again: the graph needs about twice its size",
            )
        outputs = []
        for i in range(len(feeds)):
            with np.load(folder / f"out-{i}.npz") as arrays:
                outputs.append({key: arrays[key] for key in arrays.files})
        return Ran(outputs, float(json.loads(out)["peak_mib"]))


def _main(job_file: Path) -> None:
    job = json.loads(job_file.read_text(encoding="utf-8"))
    fields = job["spec"]
    for side in ("inputs", "outputs"):
        fields[side] = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in fields[side])
    feeds = []
    for i in range(job["count"]):
        with np.load(job_file.parent / f"in-{i}.npz") as arrays:
            feeds.append({key: arrays[key] for key in arrays.files})
    ran = run_here(Path(job["graph"]), PartSpec(**fields), feeds)
    for i, output in enumerate(ran.outputs):
        np.savez(job_file.parent / f"out-{i}.npz", **output)
    print(json.dumps({"peak_mib": ran.peak_mib}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

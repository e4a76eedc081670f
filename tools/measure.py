"""Measure bundles in turn: cold starts in fresh processes, warm images in long-lived ones, round by round.

Whatever else the host does (another program, heat, a lower clock) falls on every bundle of a round alike,
and the order turns from round to round, so that no bundle is always the one after a rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..runtime.errors import BadInput

__all__ = ["Job", "Samples", "Tick", "Worker", "measure"]

PAUSE_SECONDS = 0.02
"""Between two measurements: an engine's threads spin for some milliseconds after a run before they sleep."""

STAGES = ("text", "denoise", "decode")


@dataclass(frozen=True)
class Job:
    """What to measure. `bundles` maps a short label to a bundle's folder."""

    bundles: dict[str, Path]
    prompts: tuple[str, ...]
    steps: int | None = None
    sampler: str | None = None
    times: str | None = None
    runs: int = 12
    cold_runs: int = 3
    threads: int | None = None


@dataclass
class Samples:
    """Every measured value of one bundle, in order of measurement; seconds and bytes."""

    cold: list[dict[str, float]] = field(default_factory=list)
    """process: spawn to first image; import, open, image: the parts the child saw."""
    warm: dict[str, list[float]] = field(default_factory=dict)
    """image, text, denoise, decode, core (processor time): one value an image; step: one a step."""
    load: float | None = None
    """Seconds the pipeline itself reports for loading its graphs."""
    peak_rss_bytes: list[int] = field(default_factory=list)
    """After the first image of each fresh process."""
    pictures: list[str] = field(default_factory=list)
    """Base64 PNG, one for each prompt of the job, equal seeds in all bundles."""


@dataclass(frozen=True)
class Tick:
    """Progress of a measurement."""

    fraction: float
    note: str


class Worker:
    """A bundle in its child process (tools/worker.py); a context manager that leaves no process behind."""

    def __init__(self, label: str, path: Path, threads: int | None) -> None:
        self.label = label
        self.began = time.perf_counter()
        command = [sys.executable, "-P", "-m", "fewstep.tools.worker", str(path)]
        self.process = subprocess.Popen(
            command + ([str(threads)] if threads else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.opened = self._read()
        except BaseException:
            self.close()
            raise

    def image(self, prompt: str, seed: int, job: Job, *, show: bool = False) -> dict[str, Any]:
        """Draw one image and return the child's measurements of it."""
        assert self.process.stdin is not None
        choice = {"steps": job.steps, "sampler": job.sampler, "times": job.times}
        request = {"prompt": prompt, "seed": seed, "show": show, **choice}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the child is gone: reading says so in our words
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            killed = " (killed, most likely for memory)" if code == -9 else ""
            raise BadInput(
                f"{self.label}: the measuring process ended with {code}{killed}", fix="fewstep verify"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BadInput(f"{self.label}: {answer['error']}")
        return answer

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()
        self.process.terminate()
        self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def measure(job: Job, into: dict[str, Samples]) -> Iterator[Tick]:
    """Run the job; fills `into` with the samples of each label, yields after each measurement."""
    into.update({label: Samples() for label in job.bundles})
    total = len(job.bundles) * (job.cold_runs + job.runs + 1)
    done = 0
    for r in range(job.cold_runs):
        for label in _turned(list(job.bundles), r):
            _cold(job, label, into[label])
            done += 1
            yield Tick(done / total, f"cold start {r + 1} of {job.cold_runs}")

    with ExitStack() as stack:
        workers = {
            label: stack.enter_context(Worker(label, path, job.threads))
            for label, path in job.bundles.items()
        }
        for label, worker in workers.items():  # unmeasured: the first images of a process pay for its loading
            shown = [worker.image(p, i, job, show=True) for i, p in enumerate(job.prompts)]
            into[label].pictures = [reply["png"] for reply in shown]
            into[label].load = shown[0]["timings"].get("load")
            done += 1
            yield Tick(done / total, "warming up")
        for r in range(job.runs):
            for label in _turned(list(workers), r):
                time.sleep(PAUSE_SECONDS)
                _warm(workers[label].image(job.prompts[r % len(job.prompts)], r, job), into[label])
                done += 1
                yield Tick(done / total, f"round {r + 1} of {job.runs}")


def _turned(labels: Sequence[str], r: int) -> list[str]:
    start = r % len(labels)
    return [*labels[start:], *labels[:start]]


def _cold(job: Job, label: str, samples: Samples) -> None:
    with Worker(label, job.bundles[label], job.threads) as worker:
        first = worker.image(job.prompts[0], 0, job)
        process = time.perf_counter() - worker.began
    samples.cold.append({"process": process, **worker.opened, "image": first["wall"]})
    if first["peak_rss_bytes"]:
        samples.peak_rss_bytes.append(first["peak_rss_bytes"])


def _warm(reply: dict[str, Any], samples: Samples) -> None:
    timings = reply["timings"]
    values: dict[str, list[float]] = {"image": [reply["wall"]], "core": [reply["cpu"]]}
    values |= {stage: [timings[stage]] for stage in STAGES if stage in timings}
    values["step"] = list(timings.get("step", []))
    for name, measured in values.items():
        samples.warm.setdefault(name, []).extend(measured)

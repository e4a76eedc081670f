"""One bundle in a process of its own, driven by JSON lines: what `fewstep bench` measures.

    parent  -> worker   {"do": "image", "prompt": "a cat", "seed": 3, "steps": 8, "sampler": null, "times": "karras"}
    worker  -> parent   {"total": 0.21, "text": 0.01, ..., "peak_rss_bytes": 61234567}

A process each, because a peak of memory cannot be taken back and because two engines in one process share
threads, allocator and caches. Start: `python -m fewstep.tools.worker BUNDLE [THREADS]`.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()  # before anything heavy is imported: what importing costs is part of a cold start

import base64  # noqa: E402
import io  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from typing import Any  # noqa: E402

__all__ = ["serve"]

STAGE_PART = {"text": "text_encoder", "decode": "vae_decoder"}
"""A stage without its part is a few lines of Python: nothing to measure."""


def serve(path: str, threads: int | None) -> None:
    """Open the bundle, say how long that took, then answer one request a line until stdin closes."""
    # a stray print of some library must not end up between our lines
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent closes our stdin

    def reply(data: dict[str, Any]) -> None:
        replies.write(json.dumps(data) + "\n")
        replies.flush()

    try:
        from ..runtime import Pipeline

        imported = time.perf_counter()
        pipeline = Pipeline.from_pretrained(path, threads=threads)
    except Exception as error:
        reply(_error(error))
        return
    reply({"import": imported - BEGAN, "open": time.perf_counter() - imported})
    for line in sys.stdin:
        try:
            reply(_image(pipeline, json.loads(line)))
        except Exception as error:
            reply(_error(error))


def _image(pipeline: Any, request: dict[str, Any]) -> dict[str, Any]:
    from ..runtime.given import example_observation

    observation = example_observation(pipeline.manifest, 1)
    cpu, began = time.process_time(), time.perf_counter()
    output = pipeline(
        request["prompt"] if pipeline.manifest.tokenizer else None,
        class_labels=request["seed"] % pipeline.manifest.classes if pipeline.manifest.classes else None,
        num_inference_steps=request["steps"],
        sampler=request.get("sampler"),
        times=request.get("times"),
        seed=request["seed"],
        observation=observation,
    )
    parts = pipeline.manifest.parts
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    from .host import peak_rss_bytes  # after the clock: its imports are not the bundle's

    reply = {
        "wall": wall,
        "cpu": cpu,
        "timings": {k: v for k, v in output.timings.items() if STAGE_PART.get(k) in (None, *parts)},
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if request.get("show"):
        png = io.BytesIO()
        output.images[0].save(png, "png")
        reply["png"] = base64.b64encode(png.getvalue()).decode()
    return reply


def _error(error: Exception) -> dict[str, Any]:
    return {"error": f"{error}" if hasattr(error, "exit_code") else f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)

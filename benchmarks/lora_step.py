"""One training step of LCM-LoRA on the SD-1.5 architecture at 512x512: memory and time, from loading to merged weights.

    python benchmarks/lora_step.py [--save] [--source arch:sd15]

Batch 1, rank 64, the activations computed again in the backward pass, one thread. The latent it learns on is noise:
drawing one would take longer than the step, and neither time nor memory depends on it.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save

from fewstep.distill import student
from fewstep.distill.lcm_lora import LCMLora
from fewstep.model import Context, Model, load
from fewstep.model.training import Latents, Processes, Samples, Training, given_samples
from fewstep.runtime.plan import plan
from fewstep.targets import load_target


def given(model: Model, how: Latents, store: Path, processes: Processes) -> Iterator[Any]:
    """In the place of prepare_samples: one latent of noise."""
    sample = model.sample
    shape = (1, sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    latent = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    yield from ()
    samples: Samples = given_samples(model, latent, ["a red apple"])
    return samples


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(source: str, store: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = load(source)
    found: dict[str, Any] = {"peak_rss_bytes_loaded": peak()}
    student.prepare_samples = given
    how = Training(steps=1, batch=1, average=0, checkpointing=True)
    way = plan("ddim", 1, model.process, prediction=model.prediction)
    work = LCMLora(training=how)(model, Context(load_target("laptop-cpu"), way, store, store))
    began, core = time.perf_counter(), time.process_time()
    while True:
        try:
            next(work)  # the last event is that of the step
            found |= {
                "peak_rss_bytes_trained": peak(),
                "core_s_trained": round(time.process_time() - core, 1),
                "wall_s_trained": round(time.perf_counter() - began, 1),
            }
        except StopIteration as done:
            losses = done.value.history[-1]["losses"]
            return {**found, "peak_rss_bytes": peak(), "losses": losses}


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--save", action="store_true", help="write results/lora_step.json")
    arguments.add_argument("--source", default="arch:sd15", help="what fewstep export takes")
    asked = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(asked.source, Path(folder))
    if asked.save:
        save("lora_step", found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

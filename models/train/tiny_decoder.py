"""Teach emoji-64's tiny decoder: `python tiny_decoder.py --latents FILE.npy --store FOLDER`.

Latents are drawn from every core caption, nine seeds each, by the model's own eight-step plan, and kept in FILE; the
training is fewstep's pass TinyDecoder, whose checkpoints lie in FOLDER. Both are taken up again after an interruption.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from fewstep.distill.tiny_decoder import TinyDecoder
from fewstep.distill.tiny_files import write_network
from fewstep.export.plans import plan_of
from fewstep.model import Context, load
from fewstep.model.trajectories import trajectories
from fewstep.targets import load_target

MODELS = Path(__file__).resolve().parents[1]
STEPS = 8
"""Of the plan: what few-step bundles ship."""
SEEDS = 9
"""For each of the 255 core captions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=MODELS / "emoji-64" / "vae_tiny")
    parser.add_argument("--steps", type=int, default=20_000)
    args = parser.parse_args()

    model = load(MODELS / "emoji-64")
    plan = plan_of(model, "model", STEPS)
    if not args.latents.exists():
        captions = json.loads((MODELS / "emoji-64-scorer" / "captions.json").read_text())
        core = [entry["caption"] for entry in captions if entry["core"]]
        runs = trajectories(
            model, plan, range(SEEDS * len(core)), prompts=core, batch=17
        )  # 135 whole batches
        np.save(args.latents, np.concatenate([run.latent for run in runs]))
    job = TinyDecoder(latents_file=str(args.latents), steps=args.steps)
    work = job(model, Context(load_target("laptop-cpu"), plan, args.store, args.store))
    shown = time.monotonic()
    while True:
        try:
            event = next(work)
        except StopIteration as done:
            model = done.value
            break
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"{event.fraction:.1%} {event.stage}: {event.note}", file=sys.stderr, flush=True)
    write_network(model, args.out)
    print(json.dumps(dict(model.history[-1]), indent=2))


if __name__ == "__main__":
    main()

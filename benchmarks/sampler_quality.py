"""How good emoji-64's pictures are by sampler and number of steps: the share the scorer recognises, through the bundle.

    python benchmarks/sampler_quality.py BUNDLE [--captions 64] [--steps 4 8 20] [--guidance G]

The scorer (models/emoji-64-scorer) was never used in training the generator. A picture counts when its own caption
ranks first, or in the first five, among all single-emoji captions. Captions are spread evenly over the core, the 255
emoji that training concentrated on (models/emoji-64/README.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from common import save

from fewstep.runtime import SAMPLERS, Pipeline

sys.path.insert(0, str(Path(__file__).parents[1] / "models/train"))


def main() -> None:
    import scorer
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--guidance", type=float)
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.bundle)
    model, captions = scorer.load()
    listed = json.loads((scorer.SCORER / "captions.json").read_text(encoding="utf-8"))
    core = np.array([i for i, row in enumerate(listed) if row.get("core")])
    chosen = core[np.unique(np.linspace(0, len(core) - 1, args.captions).astype(int))]
    rows = []
    for name in SAMPLERS:
        for steps in args.steps:
            if name == "lcm":
                continue  # needs a model distilled for it
            start, pictures = time.perf_counter(), []
            for first in range(0, len(chosen), 32):
                prompts = [captions[i] for i in chosen[first : first + 32]]
                out = pipeline(
                    prompts,
                    num_inference_steps=steps,
                    sampler=name,
                    guidance_scale=args.guidance,
                    seed=1000 + first,
                    output_type="np",
                )
                pictures.append(out.images)
            images = torch.from_numpy(np.concatenate(pictures).transpose(0, 3, 1, 2) * 2 - 1)
            ranks = scorer.ranks(model, captions, images, torch.from_numpy(chosen))
            row = {
                "sampler": name,
                "steps": steps,
                "calls": len(pipeline.plan(steps, name).calls),
                "first": float((ranks == 0).float().mean()),
                "first_five": float((ranks < 5).float().mean()),
                "seconds": time.perf_counter() - start,
            }
            rows.append(row)
            shares = f"first {row['first']:.3f}  first five {row['first_five']:.3f}"
            print(f"{name:9} {steps:3} steps  {row['calls']:3} calls  {shares}", flush=True)
    save("sampler-quality", {"captions": len(chosen), "guidance": args.guidance, "rows": rows})


if __name__ == "__main__":
    main()

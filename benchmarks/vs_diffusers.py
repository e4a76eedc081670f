"""The same seed and sampler through the bundle and through diffusers: PSNR of the decoded images.

    python benchmarks/vs_diffusers.py BUNDLE [--model models/emoji-64] [--steps 20] [--seeds 4]

For every sampler of the runtime: its plan traced at run time from the bundle's numbers, against diffusers' scheduler
of that name built from the model's configuration. PSNR over float images in 0..1, worst of the seeds.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
from common import save

from fewstep.runtime import Pipeline

CLASSES = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
PROMPTS = ["a rooster", "a red apple", "a tooth on a blue background", "an octopus"]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-20)))


def main() -> None:
    import diffusers
    import torch

    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "models/emoji-64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    ours = Pipeline.from_pretrained(args.bundle)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    config = theirs.scheduler.config
    size = ours.manifest.sample
    results = {}
    for name, cls in CLASSES.items():
        theirs.scheduler = getattr(diffusers, cls).from_config(config)
        values = []
        for seed in range(args.seeds):
            common = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "output_type": "np"}
            mine = ours(PROMPTS[seed % 4], seed=seed, sampler=name, **common).images[0]
            generator = torch.Generator().manual_seed(seed)
            other = theirs(
                PROMPTS[seed % 4], generator=generator, height=size.height, width=size.width, **common
            ).images[0]
            values.append(psnr(mine, other))
        results[name] = {"psnr_db": min(values), "all": values}
        print(f"{name:10} worst {min(values):6.1f} dB over {len(values)} seeds", flush=True)
    save("vs-diffusers", {"model": args.model.name, "steps": args.steps, "samplers": results})


if __name__ == "__main__":
    main()

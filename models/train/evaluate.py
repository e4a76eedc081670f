"""Measure the committed model: retrieval of generated pictures, autoencoder PSNR, contact sheet."""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import render
import scorer
import tokenizer
import torch
from autoencoder import held_out, psnr
from common import MODEL, SCORER, count, work_dir
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor

SHEET_COLUMNS = 16
SHEET_ROWS = 10
BATCH = 32


@lru_cache(maxsize=1)
def load(folder: Path) -> StableDiffusionPipeline:
    """The pipeline in single precision: on a CPU half precision is slow."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.unet.set_attn_processor(AttnProcessor())  # plain attention is the faster one at these sizes
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


@torch.no_grad()
def draw(folder: Path, captions: list[str], noise: torch.Tensor, steps: int, guidance: float) -> np.ndarray:
    """Pictures (uint8, NHWC), one per caption and noise.

    The same arithmetic as the pipeline's own loop (but the U-Net in bfloat16), batched here so that all
    captions take minutes.
    """
    torch.set_num_threads(1)
    pipe = load(folder)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    ids = torch.from_numpy(tokenizer.encode(captions).astype(np.int64))
    empty = pipe.text_encoder(torch.from_numpy(tokenizer.encode([""]).astype(np.int64))).last_hidden_state
    pictures = []
    for first in range(0, len(captions), BATCH):
        part = slice(first, first + BATCH)
        latents = noise[part] * scheduler.init_noise_sigma
        hidden = pipe.text_encoder(ids[part]).last_hidden_state
        both = torch.cat([empty.expand(len(hidden), -1, -1), hidden])
        scheduler.set_timesteps(steps)
        for moment in scheduler.timesteps:
            with torch.autocast("cpu", torch.bfloat16):
                velocity = pipe.unet(torch.cat([latents, latents]), moment, both).sample.float()
            plain, told = velocity.chunk(2)
            latents = scheduler.step(plain + guidance * (told - plain), moment, latents).prev_sample
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        pictures.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
    return np.concatenate(pictures)


def generate(folder: Path, captions: list[str], steps: int, guidance: float, workers: int = 2) -> np.ndarray:
    """Pictures for all captions, drawn by several processes; fixed seed, noise in caption order."""
    noise = torch.randn(len(captions), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(draw, folder, captions[i : i + BATCH], noise[i : i + BATCH], steps, guidance)
            for i in range(0, len(captions), BATCH)
        ]
        return np.concatenate([job.result() for job in jobs])


def retrieval(pictures: np.ndarray, wanted: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Top-1 and top-5 shares of generated pictures by the committed scorer, and every picture's rank."""
    model, captions = scorer.load()
    images = torch.from_numpy(render.as_model_input(pictures))
    rank = scorer.ranks(model, captions, images, wanted)
    return {"top1": (rank < 1).float().mean().item(), "top5": (rank < 5).float().mean().item()}, rank


def spread(numbers: torch.Tensor, wanted: int) -> torch.Tensor:
    """At most `wanted` of the numbers, evenly spread."""
    return numbers[torch.linspace(0, len(numbers) - 1, min(wanted, len(numbers))).round().long()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 4.0, 5.0])
    parser.add_argument(
        "--subset", type=int, default=64, help="core captions used to choose the guidance scale"
    )
    parser.add_argument("--others", type=int, default=128, help="captions outside the core, evenly spread")
    parser.add_argument("--psnr-images", type=int, default=512)
    parser.add_argument("--write", action="store_true", help="write evaluation.json and contact-sheet.png")
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    torch.set_num_threads(2)
    pipe = load(args.model)
    result: dict[str, Any] = {
        "parameters": {n: count(getattr(pipe, n)) for n in ("unet", "text_encoder", "vae")},
        "psnr_db": round(psnr(pipe.vae, held_out(args.psnr_images)), 2),
        "steps": args.steps,
    }
    print(result, flush=True)
    rows = json.loads((SCORER / "captions.json").read_text())
    captions = [row["caption"] for row in rows]

    def measure(wanted: torch.Tensor, scale: float) -> tuple[dict[str, float], torch.Tensor, np.ndarray]:
        pictures = generate(args.model, [captions[i] for i in wanted], args.steps, scale)
        share, rank = retrieval(pictures, wanted)
        return {"captions": len(wanted), **share}, rank, pictures

    core = torch.tensor([i for i, row in enumerate(rows) if row["core"]])
    chosen = args.guidance[0]
    if len(args.guidance) > 1:
        some = spread(core, args.subset)
        trials = {scale: measure(some, scale)[0] for scale in args.guidance}
        chosen = max(trials, key=lambda s: (trials[s]["top1"], trials[s]["top5"], -s))
        result["guidance_trials"] = trials
        print(trials, flush=True)
    started = time.time()
    result["guidance"] = chosen
    result["core"], rank, pictures = measure(core, chosen)
    result["seconds"] = round(time.time() - started, 1)
    print("core captions missed:", [captions[core[i]] for i in torch.nonzero(rank > 0).flatten()])
    if args.others:
        rest = torch.tensor([i for i, row in enumerate(rows) if not row["core"]])
        others = result["others"] = measure(spread(rest, args.others), chosen)[0]
        if others["captions"] == len(rest):
            hits = {
                key: result["core"][key] * len(core) + others[key] * len(rest) for key in ("top1", "top5")
            }
            result["all"] = {"captions": len(rows), **{key: hit / len(rows) for key, hit in hits.items()}}
    print(json.dumps(result, indent=2))
    np.savez_compressed(work_dir() / "generated.npz", pictures=pictures, rank=rank.numpy())
    if args.write:
        shown = spread(torch.arange(len(pictures)), SHEET_COLUMNS * SHEET_ROWS).numpy()
        render.sheet(pictures[shown], SHEET_COLUMNS).save(MODEL / "contact-sheet.png", optimize=True)
        (MODEL / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Measure the committed model: retrieval of generated pictures, autoencoder PSNR, contact sheet."""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0, 4.0, 5.0])
    parser.add_argument("--subset", type=int, default=128, help="captions used to choose the guidance scale")
    parser.add_argument(
        "--limit", type=int, default=0, help="evaluate only this many captions, evenly spread"
    )
    parser.add_argument("--psnr-images", type=int, default=512)
    parser.add_argument("--sheet", action="store_true", help="write contact-sheet.png")
    parser.add_argument("--model", type=Path, default=MODEL)
    args = parser.parse_args()
    torch.set_num_threads(2)
    pipe = load(args.model)
    result: dict[str, object] = {
        "parameters": {n: count(getattr(pipe, n)) for n in ("unet", "text_encoder", "vae")},
        "psnr_db": round(psnr(pipe.vae, held_out(args.psnr_images)), 2),
        "steps": args.steps,
    }
    print(result, flush=True)
    captions = [row["caption"] for row in json.loads((SCORER / "captions.json").read_text())]
    chosen = args.guidance[0]
    if len(args.guidance) > 1:
        some = torch.linspace(0, len(captions) - 1, args.subset).round().long()
        trials = {}
        for scale in args.guidance:
            trials[scale], _ = retrieval(
                generate(args.model, [captions[i] for i in some], args.steps, scale), some
            )
            print("guidance", scale, trials[scale], flush=True)
        chosen = max(trials, key=lambda s: (trials[s]["top1"], trials[s]["top5"], -s))
        result["guidance_trials"] = trials
    wanted = torch.arange(len(captions))
    if args.limit:
        wanted = torch.linspace(0, len(captions) - 1, args.limit).round().long()
    started = time.time()
    pictures = generate(args.model, [captions[i] for i in wanted], args.steps, chosen)
    seconds = time.time() - started
    share, rank = retrieval(pictures, wanted)
    result |= {"guidance": chosen, "captions": len(wanted), **share, "seconds": round(seconds, 1)}
    np.savez_compressed(work_dir() / "generated.npz", pictures=pictures, rank=rank.numpy())
    print("missed:", [captions[wanted[i]] for i in torch.nonzero(rank >= 5).flatten()][:60])
    print(json.dumps(result, indent=2))
    if args.sheet:
        shown = np.linspace(0, len(pictures) - 1, SHEET_COLUMNS * SHEET_ROWS).round().astype(int)
        render.sheet(pictures[shown], SHEET_COLUMNS).save(MODEL / "contact-sheet.png", optimize=True)
        (MODEL / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

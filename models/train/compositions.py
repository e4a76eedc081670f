"""Compositions as latents and token ids, computed once and drawn from again and again."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import render
import tokenizer
import torch
from common import config, load_state, save_state, work_dir
from diffusers import AutoencoderKL

FIRST_SEED = 3_000_000_000
FIRST_CORE_SEED = 4_000_000_000


@dataclass
class Compositions:
    """Scaled latents of the distinct pictures; per composition its picture and its token ids."""

    latents: torch.Tensor
    tokens: torch.Tensor
    picture: torch.Tensor
    plain: torch.Tensor  # the compositions that show one emoji in the canonical way

    def draw(self, number: int, plain_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents and token ids, a share of them plain ones on top of those drawn anyway."""
        rows = torch.randint(len(self.picture), (number,))
        extra = torch.rand(number) < plain_share
        rows[extra] = self.plain[torch.randint(len(self.plain), (int(extra.sum()),))]
        return self.latents[self.picture[rows]].float(), self.tokens[rows].long()


@torch.no_grad()
def build(
    vae: AutoencoderKL, path: Path, first_seed: int, number: int, pool: tuple[int, ...] | None
) -> Compositions:
    """Render and encode, or read the cache beside the checkpoints; equal pictures share one latent."""
    if (saved := load_state(path)) is not None:
        if "plain" not in saved:
            plans = (render.plan(first_seed + seed, pool)[0] for seed in range(number))
            saved["plain"] = torch.tensor([row for row, what in enumerate(plans) if what.is_canonical])
            save_state(path, saved)
        return Compositions(**saved)
    numbers: dict[render.Plan, int] = {}
    picture, captions = [], []
    for seed in range(number):
        what, caption = render.plan(first_seed + seed, pool)
        picture.append(numbers.setdefault(what, len(numbers)))
        captions.append(caption)
    plans, started, parts = list(numbers), time.time(), []
    for first in range(0, len(plans), 64):
        images = np.stack([render.draw(p) for p in plans[first : first + 64]])
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(torch.from_numpy(render.as_model_input(images))).latent_dist.mode()
        parts.append((mean.float() * vae.config.scaling_factor).half())
        if first % 6400 == 0:
            speed = (first + 64) / (time.time() - started)
            print(f"latents {first}/{len(plans)}, {speed:.0f}/s", flush=True)
    made = {
        "latents": torch.cat(parts),
        "tokens": torch.from_numpy(tokenizer.encode(captions).astype(np.int16)),
        "picture": torch.tensor(picture),
        "plain": torch.tensor([row for row, p in enumerate(picture) if plans[p].is_canonical]),
    }
    save_state(path, made)
    return Compositions(**made)


def load(vae: AutoencoderKL) -> tuple[Compositions, Compositions]:
    """Compositions of the core emoji, and of all."""
    cfg, folder = config()["denoiser"], work_dir()
    path = folder / "latents-core.pt"
    pool = None if path.exists() else render.catalogue().core  # reading the font takes seconds
    core = build(vae, path, FIRST_CORE_SEED, cfg["core_compositions"], pool)
    return core, build(vae, folder / "latents.pt", FIRST_SEED, cfg["compositions"], None)


if __name__ == "__main__":
    from common import MODEL

    torch.set_num_threads(2)
    load(AutoencoderKL.from_pretrained(MODEL / "vae", dtype=torch.float32))

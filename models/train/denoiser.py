"""Train the text encoder and the U-Net together, from scratch, on precomputed latents."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import render
import tokenizer
import torch
import torch.nn.functional as F
from common import MODEL, Average, Budget, config, count, load_state, save_state, set_rate, work_dir
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel

TRAIN_STEPS = 1000


def build_text_encoder(cfg: dict[str, Any]) -> CLIPTextModel:
    tok = tokenizer.load()
    width = cfg["text_width"]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tok),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=cfg["text_layers"],
            num_attention_heads=cfg["text_heads"],
            max_position_embeddings=tok.model_max_length,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        )
    )


def build_unet(cfg: dict[str, Any]) -> UNet2DConditionModel:
    """Plain convolutions at 16x16, where attention would be dear; cross-attention at 8x8 and 4x4."""
    channels = tuple(cfg["channels"])
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=cfg["layers_per_block"],
        cross_attention_dim=cfg["text_width"],
        # diffusers reads this as the number of heads per level
        attention_head_dim=[c // cfg["head_dim"] for c in channels],
        norm_num_groups=cfg["norm_groups"],
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=0,
        **config()["scheduler"],
    )


@torch.no_grad()
def dataset(vae: AutoencoderKL, compositions: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scaled latents (one per distinct picture), token ids and picture number of each composition.

    Encoding once is what makes training on latents cheap; it is cached beside the checkpoints.
    """
    path = work_dir() / "latents.pt"
    saved = load_state(path)
    if saved is not None:
        return saved["latents"], saved["tokens"], saved["picture"]
    numbers: dict[render.Plan, int] = {}
    picture, captions = [], []
    for seed in range(compositions):
        what, caption = render.plan(3_000_000_000 + seed)
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
    latents = torch.cat(parts)
    tokens = torch.from_numpy(tokenizer.encode(captions).astype(np.int16))
    save_state(path, {"latents": latents, "tokens": tokens, "picture": torch.tensor(picture)})
    return latents, tokens, torch.tensor(picture)


class Trainer:
    """Model, optimizer, averaged weights and their checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.cfg = config()["denoiser"]
        torch.manual_seed(0)
        self.text, self.unet = build_text_encoder(self.cfg), build_unet(self.cfg)
        # Spelled-out attention: the fused kernel's bf16 backward is 4-8 times slower on a CPU at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        self.text.set_attn_implementation("eager")
        self.unet.to(memory_format=torch.channels_last)
        self.weights = [*self.unet.parameters(), *self.text.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.cfg["rate"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = Average(self.weights, self.cfg["ema"])
        self.path = work_dir() / "denoiser.pt"
        state = load_state(self.path)
        self.step, elapsed = 0, 0.0
        if state:
            self.unet.load_state_dict(state["unet"])
            self.text.load_state_dict(state["text"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.shadow, self.average.step = state["average"], state["step"]
            self.step, elapsed = state["step"], state["elapsed"]
            torch.set_rng_state(state["rng"])
        self.budget = Budget(args.until, args.minutes, elapsed)
        vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
        self.latents, self.tokens, self.picture = dataset(vae, self.cfg["compositions"])
        self.alphas = build_scheduler().alphas_cumprod
        self.empty = torch.from_numpy(tokenizer.encode([""]).astype(np.int64))

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(len(self.picture), (self.cfg["batch"],))
        tokens = self.tokens[rows].long()
        drop = torch.rand(len(rows)) < self.cfg["drop_caption"]
        tokens[drop] = self.empty
        return self.latents[self.picture[rows]].float(), tokens

    def loss(self) -> torch.Tensor:
        """v-prediction at uniformly drawn times."""
        clean, tokens = self.batch()
        times = torch.randint(TRAIN_STEPS, (len(clean),))
        signal = self.alphas[times].sqrt().view(-1, 1, 1, 1)
        noise_share = (1 - self.alphas[times]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = signal * clean + noise_share * noise
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.text(tokens).last_hidden_state
            velocity = self.unet(noisy, times, hidden).sample
        return F.mse_loss(velocity.float(), signal * noise - noise_share * clean)

    def save(self) -> None:
        save_state(
            self.path,
            {
                "unet": self.unet.state_dict(),
                "text": self.text.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.shadow,
                "step": self.step,
                "elapsed": self.budget.elapsed,
                "rng": torch.get_rng_state(),
            },
        )

    def run(self, every: float) -> None:
        print(f"U-Net {count(self.unet):,}, text {count(self.text):,}, {self.budget.left()}", flush=True)
        last, running, begun, first = time.time(), 0.0, time.time(), self.step
        while self.budget.share < 1:
            set_rate(
                self.optimizer,
                self.budget.rate(self.cfg["rate"], self.cfg["floor"], self.step, self.cfg["warmup"]),
            )
            loss = self.loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.weights, self.cfg["clip"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            self.average.update(self.weights)
            running += (loss.item() - running) / min(self.step - first, 100)
            if time.time() - last > every or self.budget.share >= 1:
                self.save()
                last = time.time()
                speed = (self.step - first) * self.cfg["batch"] / (last - begun)
                print(
                    f"step {self.step} loss {running:.4f} {speed:.0f} images/s, {self.budget.left()}",
                    flush=True,
                )


def export() -> None:
    """Write the pipeline folder from the last checkpoint's averaged weights, in half precision."""
    cfg, state = config()["denoiser"], load_state(work_dir() / "denoiser.pt")
    if state is None:
        raise SystemExit("no checkpoint to export; train first")
    text, unet = build_text_encoder(cfg), build_unet(cfg)
    average = Average([*unet.parameters(), *text.parameters()], cfg["ema"])
    average.shadow = state["average"]
    average.copy_to([*unet.parameters(), *text.parameters()])
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float16),
        text_encoder=text.half().eval(),
        tokenizer=tokenizer.load(),
        unet=unet.half().eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # The tokenizer folder is kept as tokenizer.py wrote it: it holds the slow vocabulary files too.
    pipe.tokenizer.save_pretrained = lambda *args, **kwargs: ()
    pipe.save_pretrained(MODEL, safe_serialization=True)
    print(f"wrote {MODEL}: step {state['step']}, {state['elapsed'] / 60:.1f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", help="stop at this time of day, HH:MM")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument(
        "--export", action="store_true", help="only write the pipeline from the last checkpoint"
    )
    args = parser.parse_args()
    torch.set_num_threads(2)
    if not args.export:
        Trainer(args).run(args.every)
    export()


if __name__ == "__main__":
    main()

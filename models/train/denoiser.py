"""Train the text encoder and the U-Net together, from scratch, on precomputed latents."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import tokenizer
import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import MODEL, Average, Budget, config, load_state, save_state, set_rate, work_dir
from compositions import load as load_compositions
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
        steps_offset=1,
        **config()["scheduler"],
    )


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
        # Workers start alike and draw different batches; a resumed run must not repeat the old draws either.
        self.rank, self.workers = args.rank, args.workers
        torch.manual_seed(1_000 * self.step + self.rank)
        self.budget = Budget(args.until, args.minutes, elapsed)
        if args.share is not None:
            self.budget.take_up(args.share)
        vae = AutoencoderKL.from_pretrained(MODEL / "vae", dtype=torch.float32)
        self.core, self.all = load_compositions(vae)
        self.alphas = build_scheduler().alphas_cumprod
        self.empty = torch.from_numpy(tokenizer.encode([""]).astype(np.int64))

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        core = int((torch.rand(self.cfg["batch"]) < self.cfg["core_share"]).sum())
        parts = [
            part.draw(number, self.cfg["plain_extra"])
            for part, number in ((self.core, core), (self.all, self.cfg["batch"] - core))
        ]
        latents, tokens = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        drop = torch.rand(len(tokens)) < self.cfg["drop_caption"]
        tokens[drop] = self.empty
        return latents, tokens

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
            },
        )

    def meet(self) -> None:
        """Average the weights of all workers; every worker goes on from the average with its own moments.

        Meeting every few seconds rather than at every step (let alone at every operation, as threads do)
        costs nothing in quality here and keeps all cores busy when other programs use them as well.
        """
        if self.workers == 1:
            return
        with torch.no_grad():
            flat = torch.cat([w.flatten() for w in self.weights])
            dist.all_reduce(flat)
            flat /= self.workers
            for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
                weight.copy_(part.view_as(weight))

    def run(self, every: float) -> None:
        cfg, budget, workers = self.cfg, self.budget, self.workers
        # All workers count the same meetings from the same moment, so none waits for one that has left.
        begun = torch.tensor([time.time(), budget.total - budget.elapsed], dtype=torch.float64)
        if workers > 1:
            dist.broadcast(begun, 0)
        start, meetings = begun[0].item(), max(1, int(begun[1].item() / cfg["meet_seconds"]))
        last, running, first, seen = time.time(), 0.0, self.step, self.step
        for meeting in range(1, meetings + 1):
            while time.time() < start + meeting * cfg["meet_seconds"]:
                loss = self.loss()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.weights, cfg["clip"])
                rate = budget.rate(cfg["rate"], cfg["floor"], self.step, cfg["warmup"])
                set_rate(self.optimizer, rate)
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                running += (loss.item() - running) / min(self.step - first, 400)
            self.meet()
            if self.rank:
                continue
            self.average.update(self.weights, self.step - seen)
            seen = self.step
            if time.time() - last > every or meeting == meetings:
                self.save()
                last = time.time()
                speed = (self.step - first) * cfg["batch"] * workers / (last - start)
                print(
                    f"step {self.step} loss {running:.4f} {speed:.0f} images/s, {budget.left()}", flush=True
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
        vae=AutoencoderKL.from_pretrained(MODEL / "vae", dtype=torch.float16),
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
    # transformers would load the text encoder in its stored precision, diffusers loads the rest in single.
    settings = MODEL / "text_encoder" / "config.json"
    settings.write_text(settings.read_text().replace('"float16"', '"float32"'))
    print(f"wrote {MODEL}: step {state['step']}, {state['elapsed'] / 60:.1f} min")


def train(args: argparse.Namespace) -> None:
    """Run this worker; the first one starts the others and ends them with itself."""
    trainer, others, meeting = (
        Trainer(args),
        [],
        work_dir() / f"meeting-{os.getppid() if args.rank else os.getpid()}",
    )
    for rank in range(1, args.workers if args.rank == 0 else 0):
        others.append(subprocess.Popen([sys.executable, *sys.argv, "--rank", str(rank)]))
    if args.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=args.rank, world_size=args.workers
        )
    try:
        trainer.run(args.every)
    finally:
        for other in others:
            other.terminate()
        if args.workers > 1 and args.rank == 0:
            meeting.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", help="stop at this time of day, HH:MM")
    parser.add_argument("--minutes", type=float, default=75.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument(
        "--export", action="store_true", help="only write the pipeline from the last checkpoint"
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="single-threaded processes that share the work"
    )
    parser.add_argument("--share", type=float, help="take the schedule up as if this share had been used")
    parser.add_argument("--rank", type=int, default=0, help="set by the first process for the others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.export:
        train(args)
    if args.rank == 0:
        export()


if __name__ == "__main__":
    main()

"""Train the class-conditional diffusion transformer, from scratch, on latents computed once."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cifar import MODEL, SIZE, as_input, classes, config, pictures, work_dir
from common import Average, Budget, count, load_state, save_state, set_rate
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor

TRAIN_STEPS = 1000


def build(cfg: dict[str, Any], vae: AutoencoderKL) -> DiTTransformer2DModel:
    """A diffusion transformer that starts as the identity (Peebles and Xie 2022, arXiv:2212.09748, section 3.2)."""
    net = DiTTransformer2DModel(
        num_attention_heads=cfg["heads"],
        attention_head_dim=cfg["head_dim"],
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,  # said, since DiTPipeline does not expect None
        num_layers=cfg["layers"],
        sample_size=SIZE // 2 ** (len(vae.config.block_out_channels) - 1),
        patch_size=cfg["patch"],
        num_embeds_ada_norm=len(classes()),
        norm_num_groups=1,  # unused, but diffusers checks it
    )
    for block in net.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    for layer in (net.proj_out_1, net.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return ready(net)


def ready(net: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Fast on a CPU, and without diffusers' own label dropout: it draws anew in every block, so that hardly ever
    all of them see "no class" at once, as guidance asks them to.
    """
    for block in net.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        # Spelled-out attention: the fused kernel's bf16 backward takes 1.7 times the whole step's time here.
        block.attn1.set_processor(AttnProcessor())
    return net


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **config()["scheduler"],
    )


def load_vae() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32).eval()
    vae.register_to_config(_name_or_path="")  # a model says nothing about its maker's disk
    return vae


@torch.no_grad()
def latents(vae: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents of all training pictures and of their mirror images, [2, n, channels, 8, 8], and labels [n]."""
    pixels, labels = pictures("train")
    path = work_dir() / "latents.pt"
    found = load_state(path)
    if found is None:
        sides = []
        vae.to(memory_format=torch.channels_last)
        for mirrored in (False, True):
            parts = []
            for part in pixels.split(250):
                images = as_input(part.flip(-1) if mirrored else part).contiguous(
                    memory_format=torch.channels_last
                )
                with torch.autocast("cpu", torch.bfloat16):
                    mean = vae.encode(images).latent_dist.mode()
                parts.append(mean.float().contiguous() * vae.config.scaling_factor)
            sides.append(torch.cat(parts))
        found = {"latents": torch.stack(sides).half()}
        save_state(path, found)
    return found["latents"], labels


class Trainer:
    """Model, optimizer, averaged weights and their checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.cfg = config()["denoiser"]
        vae = load_vae()
        torch.manual_seed(0)
        self.net = build(self.cfg, vae).train()
        self.weights = list(self.net.parameters())
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=self.cfg["rate"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.average = Average(self.weights, self.cfg["ema"])
        self.path = work_dir() / args.checkpoint
        self.step, self.seen, elapsed = 0, 0, 0.0
        if state := load_state(self.path):
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.shadow, self.average.step = state["average"], state["step"]
            self.step, self.seen, elapsed = state["step"], state["seen"], state["elapsed"]
        self.rank, self.workers = args.rank, args.workers
        # Workers start alike and draw different batches; a resumed run must not repeat the old draws either.
        torch.manual_seed(1_000 * self.step + self.rank)
        self.budget = Budget(args.until, args.minutes, elapsed)
        self.data, self.labels = latents(vae)
        self.alphas = build_scheduler().alphas_cumprod

    def loss(self) -> torch.Tensor:
        """v-prediction at uniformly drawn times."""
        batch = self.cfg["batch"]
        picks, side = torch.randint(len(self.labels), (batch,)), torch.randint(2, (batch,))
        clean, labels = self.data[side, picks].float(), self.labels[picks].clone()
        labels[torch.rand(batch) < self.cfg["drop_label"]] = self.net.config.num_embeds_ada_norm
        times = torch.randint(TRAIN_STEPS, (batch,))
        signal = self.alphas[times].sqrt().view(-1, 1, 1, 1)
        noise_share = (1 - self.alphas[times]).sqrt().view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = signal * clean + noise_share * noise
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.net(noisy, timestep=times, class_labels=labels).sample
        return F.mse_loss(velocity.float(), signal * noise - noise_share * clean)

    def save(self) -> None:
        save_state(
            self.path,
            {
                "net": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.shadow,
                "step": self.step,
                "seen": self.seen,
                "elapsed": self.budget.elapsed,
            },
        )

    def run(self, every: float) -> None:
        """Train until the budget is used; workers meet as those of ../denoiser.py do."""
        cfg, budget, workers = self.cfg, self.budget, self.workers
        begun = torch.tensor([time.time(), budget.total - budget.elapsed], dtype=torch.float64)
        if workers > 1:
            dist.broadcast(begun, 0)
        start, meetings = begun[0].item(), max(1, int(begun[1].item() / cfg["meet_seconds"]))
        last, first, running, work = time.time(), self.step, 0.0, time.process_time()
        for meeting in range(1, meetings + 1):
            before = self.step
            while time.time() < start + meeting * cfg["meet_seconds"]:
                loss = self.loss()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.weights, cfg["clip"])
                set_rate(self.optimizer, budget.rate(cfg["rate"], cfg["floor"], self.step, cfg["warmup"]))
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.step += 1
                running += (loss.item() - running) / min(self.step - first, 400)
                if workers == 1:
                    self.average.update(self.weights)
            self.seen += (self.step - before) * cfg["batch"] * workers
            if workers > 1:
                self.meet()
                self.average.update(self.weights, self.step - before)
            if self.rank == 0 and (time.time() - last > every or meeting == meetings):
                self.save()
                last = time.time()
                speed = (self.step - first) * cfg["batch"] * workers
                print(
                    f"step {self.step} seen {self.seen:,} loss {running:.4f} {speed / (last - start):.0f} images/s, "
                    f"{speed / workers / (time.process_time() - work):.0f} a core-second, {budget.left()}",
                    flush=True,
                )

    @torch.no_grad()
    def meet(self) -> None:
        """Average the weights of all workers; every worker goes on from the average with its own moments."""
        flat = torch.cat([w.flatten() for w in self.weights])
        dist.all_reduce(flat)
        flat /= self.workers
        for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
            weight.copy_(part.view_as(weight))


def export(args: argparse.Namespace) -> None:
    """Write the pipeline folder from the last checkpoint's averaged weights, in half precision."""
    cfg, state = config()["denoiser"], load_state(work_dir() / args.checkpoint)
    if state is None:
        raise SystemExit("no checkpoint to export; train first")
    vae = load_vae()
    net = build(cfg, vae)
    average = Average(list(net.parameters()), cfg["ema"])
    average.shadow = state["average"]
    average.copy_to(list(net.parameters()))
    names = dict(enumerate(classes()))
    pipe = DiTPipeline(
        transformer=net.half().eval(), vae=vae.half(), scheduler=build_scheduler(), id2label=names
    )
    pipe.save_pretrained(args.output, safe_serialization=True)
    index = args.output / "model_index.json"
    settings = json.loads(index.read_text())
    settings["_guidance_scale"] = cfg["guidance"]  # fewstep's key: what the model draws best with
    settings["id2label"] = {str(k): v for k, v in names.items()}
    index.write_text(json.dumps(settings, indent=2) + "\n")
    print(
        f"wrote {args.output}: {count(net):,} parameters, step {state['step']}, {state['seen']:,} pictures, "
        f"{state['elapsed'] / 60:.1f} min"
    )


def train(args: argparse.Namespace) -> None:
    """Run this worker; the first one starts the others and ends them with itself."""
    trainer, others = Trainer(args), []
    meeting = work_dir() / f"meeting-{os.getppid() if args.rank else os.getpid()}"
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
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--every", type=float, default=120.0, help="seconds between checkpoints")
    parser.add_argument(
        "--export", action="store_true", help="only write the pipeline from the last checkpoint"
    )
    parser.add_argument("--output", type=Path, default=MODEL, help="the folder of the pipeline")
    parser.add_argument(
        "--workers", type=int, default=1, help="single-threaded processes that share the work"
    )
    parser.add_argument("--rank", type=int, default=0, help="set by the first process for the others")
    parser.add_argument("--checkpoint", default="denoiser.pt", help="its name in the work folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.export:
        train(args)
    if args.rank == 0:
        export(args)


if __name__ == "__main__":
    main()

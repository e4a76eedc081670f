"""Train the autoencoder: 32x32 RGB <-> 8x8 latents of 8 channels (diffusers `AutoencoderKL`)."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import torch.nn.functional as F
from cifar import MODEL, SIZE, as_input, config, pictures, work_dir
from common import Budget, count, load_state, save_state, set_rate
from diffusers import AutoencoderKL


def build(cfg: dict[str, Any]) -> AutoencoderKL:
    """A small, purely convolutional autoencoder; the decoder runs once a picture on small devices."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=tuple(cfg["channels"]),
        layers_per_block=1,
        latent_channels=cfg["latent_channels"],
        norm_num_groups=cfg["norm_groups"],
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over pictures of the PSNR of reconstructions from the latent mean, in dB, on 8-bit range."""
    values = []
    for batch in images.split(64):
        out = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((out - batch) / 2).square().mean(dim=(1, 2, 3))
        values.append(-10 * torch.log10(error.clamp_min(1e-10)))
    return torch.cat(values).mean().item()


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Root mean square of the latent means: samplers start from noise of mean 0."""
    return (
        torch.cat([vae.encode(b).latent_dist.mode() for b in images.split(64)]).square().mean().sqrt().item()
    )


def loss_of(
    vae: AutoencoderKL, images: torch.Tensor, cfg: dict[str, Any], decoder_only: bool
) -> torch.Tensor:
    """MSE and L1 of the reconstruction, and the KL term while the encoder learns."""
    with torch.autocast("cpu", torch.bfloat16):
        if decoder_only:
            with torch.no_grad():
                latents = vae.encode(images).latent_dist.mode().float()
            # Slightly disturbed latents, because a sampler never lands exactly on an encoder output.
            latents = latents + 0.03 * torch.randn_like(latents)
        else:
            posterior = vae.encode(images).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        out = vae.decode(latents).sample
    out = out.float()
    loss = F.mse_loss(out, images) + cfg["l1"] * F.l1_loss(out, images)
    if not decoder_only:
        loss = loss + cfg["kl"] * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss


def draw(pixels: torch.Tensor, batch: int) -> torch.Tensor:
    """Random training pictures, half of them mirrored."""
    images = as_input(pixels[torch.randint(len(pixels), (batch,))])
    mirrored = torch.rand(batch) < 0.5
    images[mirrored] = images[mirrored].flip(-1)
    return images.contiguous(memory_format=torch.channels_last)


def train(args: argparse.Namespace) -> None:
    """Until the time is up, then write `vae/`."""
    cfg = config()["autoencoder"]
    path = work_dir() / ("decoder.pt" if args.decoder_only else "autoencoder.pt")
    state = load_state(path) or {"step": 0, "elapsed": 0.0, "model": None}
    torch.manual_seed(state["step"] + (1 if args.decoder_only else 0))
    vae = build(cfg)
    if args.decoder_only:
        vae = AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32)
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    if state["model"]:
        vae.load_state_dict(state["model"])
    vae.to(memory_format=torch.channels_last)
    peak = cfg["rate"] * (0.15 if args.decoder_only else 1.0)
    trainable = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    budget, step = Budget(args.until, args.minutes, state["elapsed"]), state["step"]
    pixels, check = pictures("train")[0], as_input(pictures("test")[0][: cfg["check_images"]])
    print(f"{count(vae):,} parameters, decoder {count(vae.decoder):,}, {budget.left()}", flush=True)
    last, running = time.time(), 0.0
    while budget.share < 1:
        set_rate(optimizer, budget.rate(peak, cfg["floor"], step, cfg["warmup"]))
        loss = loss_of(vae, draw(pixels, cfg["batch"]), cfg, args.decoder_only)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        running += (loss.item() - running) / min(step, 200)
        if time.time() - last > args.every or budget.share >= 1:
            last = time.time()
            state = {"step": step, "elapsed": budget.elapsed, "model": vae.state_dict()}
            save_state(path, {**state, "optimizer": optimizer.state_dict()})
            speed = step * cfg["batch"] / budget.elapsed
            quality = f"PSNR {psnr(vae, check):.2f} dB"
            print(
                f"step {step} loss {running:.4f} {quality} {speed:.0f} images/s, {budget.left()}", flush=True
            )
    export(vae)


def export(vae: AutoencoderKL) -> None:
    """Write the folder `vae/` in half precision, with the measured latent scale."""
    if (MODEL / "vae" / "config.json").exists():  # the latents' scale belongs to the denoiser: keep it
        scale = AutoencoderKL.load_config(MODEL / "vae")["scaling_factor"]
    else:
        scale = round(1 / latent_std(vae, as_input(pictures("train")[0][::10])), 5)
    vae.register_to_config(scaling_factor=scale, force_upcast=False, _name_or_path="")
    vae.eval().to(memory_format=torch.contiguous_format).half()
    vae.save_pretrained(MODEL / "vae", safe_serialization=True)
    quality = psnr(
        AutoencoderKL.from_pretrained(MODEL / "vae", torch_dtype=torch.float32), as_input(pictures("test")[0])
    )
    print(f"wrote {MODEL / 'vae'}, scaling factor {scale}, PSNR of all test pictures {quality:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--until", help="stop at this time of day, HH:MM")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument(
        "--decoder-only", action="store_true", help="sharpen the decoder; latents stay the same"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args)


if __name__ == "__main__":
    main()

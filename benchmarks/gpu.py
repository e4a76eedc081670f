"""A picture in four steps on an NVIDIA GPU: our AOTInductor path against eager diffusers and torch.compile.

    python benchmarks/gpu.py --arch sd15            512 x 512
    python benchmarks/gpu.py --arch sdxl            1024 x 1024
    python benchmarks/gpu.py --device cpu --tiny    the same code at tiny size, wherever there is no GPU

From text states and noise to decoded pixels, of architectures with random weights: time does not depend on their
values. All three run the same networks at the same four DDIM steps without guidance, and each picture is compared with
the one that the same networks draw in float32. Ours is measured whole, with its loop in numpy and its copies to and
from the GPU. Beside it the roofline: no picture can be drawn in less time than its multiplications take at the peak of
the device, nor than its weights take to be read once a call. Writes results/gpu_ARCH_DEVICE.json.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save, spread
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.export import aoti, onnx
from fewstep.model.model import Example, Part
from fewstep.runtime.backends.aoti import open_session
from fewstep.runtime.denoiser import Denoiser
from fewstep.runtime.manifest import PartSpec, TensorSpec
from fewstep.runtime.plan import Plan

STEPS = 4
"""What the students of this project are made for."""

PEAKS = {
    # name holds -> operations a second in 16 bits, without sparsity; bytes a second of memory
    "H200": (989e12, 4.8e12),  # NVIDIA's data sheet, SXM
    "H100": (989e12, 3.35e12),  # NVIDIA's data sheet, SXM
    "A100": (312e12, 2.0e12),  # NVIDIA's data sheet, 80 GB SXM
    "RTX 4090": (165.2e12, 1.008e12),  # NVIDIA's Ada whitepaper, accumulation in float32
}

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""Of stabilityai/stable-diffusion-xl-base-1.0, unet/config.json."""
TINY: dict[str, Any] = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
}
TEXT = 77
"""Tokens of CLIP."""


class Denoise(torch.nn.Module):
    """SD-1.5's U-Net by names of inputs."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any) -> Any:
        return self.network(sample, timestep, encoder_hidden_states, return_dict=False)[0]


class DenoiseXL(Denoise):
    """SDXL's takes pooled text and the sizes of the picture as well."""

    def forward(  # type: ignore[override]
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, text_embeds: Any, time_ids: Any
    ) -> Any:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        states = encoder_hidden_states
        return self.network(sample, timestep, states, added_cond_kwargs=added, return_dict=False)[0]


class Decode(torch.nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, latent_sample: Any) -> Any:
        return self.network.decode(latent_sample, return_dict=False)[0]


@dataclass(frozen=True)
class Case:
    """Two networks and what they are fed."""

    denoise: Any
    decode: Any
    condition: Mapping[str, np.ndarray]
    latents: np.ndarray

    def parts(self) -> tuple[Part, Part]:
        feeds = {"sample": self.latents, "timestep": np.zeros(1, np.float32), **self.condition}
        return (
            _part("unet", self.denoise, feeds, "out_sample", self.latents.shape),
            _part("vae_decoder", self.decode, {"latent_sample": self.latents}, "sample", self.pixels()),
        )

    def pixels(self) -> tuple[int, ...]:
        side = self.latents.shape[-1] * 2 ** (len(self.decode.network.config.block_out_channels) - 1)
        return (1, 3, side, side)


def _part(
    name: str, module: Any, feeds: Mapping[str, np.ndarray], output: str, shape: tuple[int, ...]
) -> Part:
    inputs = tuple(TensorSpec(key, str(array.dtype), array.shape) for key, array in feeds.items())
    return Part(name, module, inputs, (TensorSpec(output, "float32", shape),), Example({}))


def make(arch: str, *, tiny: bool) -> Case:
    """The architecture with random weights, in float32 on the CPU."""
    torch.manual_seed(0)
    config = {**(SDXL if arch == "sdxl" else SD15), **(TINY if tiny else {})}
    if tiny and arch == "sdxl":
        config |= {"transformer_layers_per_block": 1, "projection_class_embeddings_input_dim": 6 * 256 + 16}
    unet = UNet2DConditionModel(**config)
    widths = (8, 8) if tiny else (128, 256, 512, 512)  # of both models' vae/config.json
    vae = AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if tiny else 2,
        norm_num_groups=4 if tiny else 32,
        latent_channels=4,
    )
    rng = np.random.default_rng(0)
    size, cross = config["sample_size"], config["cross_attention_dim"]
    condition = {"encoder_hidden_states": rng.standard_normal((1, TEXT, cross))}
    if arch == "sdxl":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * 256  # six numbers, 256 sines of each
        side = 8 * size
        condition |= {
            "text_embeds": rng.standard_normal((1, pooled)),
            "time_ids": np.array([[side, side, 0, 0, side, side]]),
        }
    whole = {name: array.astype(np.float32) for name, array in condition.items()}
    latents = rng.standard_normal((1, 4, size, size)).astype(np.float32)
    wrapper = DenoiseXL if arch == "sdxl" else Denoise
    return Case(wrapper(unet).eval(), Decode(vae).eval(), whole, latents)


def by_diffusers(case: Case, device: str, dtype: Any, mode: str | None) -> Callable[[], np.ndarray]:
    """Its networks, its scheduler and a loop on the device.

    mode  of torch.compile; None: eager. On a CPU its own compiler is left out, for this is no measurement there
    """
    denoise, decode = (copy.deepcopy(each).to(device, dtype) for each in (case.denoise, case.decode))
    if mode is not None:
        how: dict[str, Any] = {"mode": mode} if device == "cuda" else {"backend": "eager"}
        denoise, decode = (torch.compile(each, fullgraph=True, **how) for each in (denoise, decode))
    scheduler = _scheduler()
    scheduler.set_timesteps(STEPS, device=device)
    condition = [torch.from_numpy(array).to(device, dtype) for array in case.condition.values()]

    def run() -> np.ndarray:
        with torch.no_grad():
            sample = torch.from_numpy(case.latents).to(device, dtype)
            for timestep in scheduler.timesteps:
                noise = denoise(sample, timestep.reshape(1), *condition)
                sample = scheduler.step(noise, timestep, sample).prev_sample
            return np.asarray(decode(sample).float().cpu())

    return run


def by_us(case: Case, device: str, precision: str, work: Path) -> tuple[Callable[[], np.ndarray], float]:
    """Lowered, compiled on this device, and run by the runtime's plan; beside it the seconds that took."""
    began, sessions, specs = time.perf_counter(), {}, {}
    for part in case.parts():
        folder = work / part.name
        spec = aoti.write(onnx.trace(part), folder, precision=precision)
        specs[part.name] = PartSpec(
            "aoti", spec.graph, spec.inputs, spec.outputs, precision, "gpu" if device == "cuda" else "cpu"
        )
        sessions[part.name] = open_session(work / spec.graph, specs[part.name])
    plan = Plan.from_diffusers(_scheduler(), STEPS)
    denoiser = Denoiser(sessions["unet"], specs["unet"], case.condition)

    def run() -> np.ndarray:
        *_, last = plan.run(denoiser, plan.start(case.latents))
        return sessions["vae_decoder"].run({"latent_sample": last.x})["sample"]

    return run, time.perf_counter() - began


def _scheduler() -> Any:
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)


def roofline_s(case: Case, device_name: str) -> dict[str, float]:
    """The least time of a picture, and what makes it; nan for a device whose peak is not known."""
    peak = next((peak for name, peak in PEAKS.items() if name in device_name), None)
    total = {"operations": 0.0, "weight_bytes": 0.0, "least_s": 0.0}
    for part, calls in zip(case.parts(), (STEPS, 1), strict=True):
        module = copy.deepcopy(part.module).to("meta")
        feeds = [
            torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in part.inputs
        ]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(*feeds)
        operations, size = counter.get_total_flops(), 2 * part.parameters()
        total["operations"] += calls * operations
        total["weight_bytes"] += calls * size
        if peak is not None:
            total["least_s"] += calls * max(operations / peak[0], size / peak[1])
    return total if peak is not None else {**total, "least_s": float("nan")}


def psnr_db(right: np.ndarray, got: np.ndarray) -> float:
    """Of pictures in -1 to 1, clipped as decoded pictures are."""
    error = np.mean((np.clip(right, -1, 1) - np.clip(got, -1, 1)).astype(np.float64) ** 2)
    return float(10 * np.log10(4 / error)) if error else float("inf")


def measure(runs: Mapping[str, Callable[[], np.ndarray]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, taking turns."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name in list(runs) if number % 2 else list(runs)[::-1]:
            began = time.perf_counter()
            runs[name]()  # ends with a copy to the host, which waits for the device
            if number > 1:  # the first two compile, and record graphs
                took[name].append(1e3 * (time.perf_counter() - began))
    return took


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a network of a few thousand parameters")
    parser.add_argument(
        "--precision", choices=("bfloat16", "float16"), default="bfloat16", help="of all three"
    )
    parser.add_argument("--compile-mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-save", action="store_true")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no NVIDIA GPU; --device cpu --tiny tries the script without one")
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    case, dtype = make(args.arch, tiny=args.tiny), getattr(torch, args.precision)
    reference = by_diffusers(case, args.device, torch.float32, None)()
    with tempfile.TemporaryDirectory(prefix="gpu-") as work:
        ours, compiled_s = by_us(case, args.device, args.precision, Path(work))
        runs = {
            "eager diffusers": by_diffusers(case, args.device, dtype, None),
            "torch.compile": by_diffusers(case, args.device, dtype, args.compile_mode),
            "ours (aoti)": ours,
        }
        took = measure(runs, args.rounds)
        quality = {each: round(psnr_db(reference, run()), 1) for each, run in runs.items()}
    roofline = roofline_s(case, name)
    median = {each: spread(values)["median"] for each, values in took.items()}
    results = {
        "device": name,
        "torch": torch.__version__,
        "arch": args.arch + (" tiny" if args.tiny else ""),
        "steps": STEPS,
        "precision": args.precision,
        "compile_mode": args.compile_mode,
        "ms": {each: spread(values) for each, values in took.items()},
        "psnr_db_of_float32": quality,
        "ours_compiled_s": round(compiled_s, 1),
        "faster_than": {each: round(median[each] / median["ours (aoti)"], 3) for each in runs},
        "roofline": roofline,
        "share_of_roofline": round(1e3 * roofline["least_s"] / median["ours (aoti)"], 3),
    }
    for each in runs:
        print(f"{each:16} {median[each]:10.2f} ms   {quality[each]:6.1f} dB of float32")
    print(f"roofline         {1e3 * roofline['least_s']:10.2f} ms")
    if not args.no_save:
        save(f"gpu_{args.arch}{'_tiny' if args.tiny else ''}_{name.replace(' ', '_')}", results)
    return results


if __name__ == "__main__":
    main()

"""The VAE's decoder replaced by a tiny one, taught by it on the latents the model itself draws.

TAESD (Bohan 2023, github.com/madebyollin/taesd) is the architecture. Unlike there, no data and no adversary take part:
the teacher is the decoder, the loss its picture, so that the two can be told apart by a number.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..model.fingerprint import model_fingerprint
from ..model.libraries import torch
from ..model.model import Context, Model
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write
from ..runtime.progress import Progress, within
from .lessons import Lessons, Source, prepare
from .tiny_files import read_network, tiny_config
from .tiny_shape import choose_shape

__all__ = ["TinyDecoder"]

TAUGHT_SHARE = 0.3
"""Of the pass's progress bar: the time the latents take. A guess, for the bar alone."""
SEEDS = 1_000_000
"""The first seed of the latents, far from those that pictures are judged on."""
WARM_STEPS = 100
"""Over which the learning rate rises: AdamW's second moments are noise before (its beta2 of 0.99 forgets as fast)."""
CHECKPOINT_S = 20.0
"""Seconds of training a kill costs at most."""
SHOWN = 32
"""Held-out pictures behind the figure shown while it trains; all of them make the one that is kept."""
EDGE = 4
"""Cells beside the cut of a crop that are not learned from: there the teacher saw what the student does not."""


@dataclass(frozen=True)
class TinyDecoder:
    """A pass: the part vae_decoder becomes a tiny one of convolutions alone.

    The record in history holds `psnr_db`, over all held-out latents, of its pictures against the decoder's it replaces;
    `psnr_db_worst`, the least of any; `parameters`; and `work`, its multiplications over the other's.
    """

    widths: tuple[int, ...] = ()
    """Channels of each stage, the coarsest first. Empty: TAESD's four of 64, or narrower ones where that is no more
    than a quarter of the work."""
    blocks: tuple[int, ...] = ()
    """Residual blocks of each stage; empty with `widths`."""
    latents: int = 2048
    """Drawn with the plan that ships, to teach on."""
    copies: int = 3
    """Of each latent, mirrored or not, with a little noise: what another sampler might have drawn."""
    prompts: tuple[str, ...] = ()
    """Empty for the model's own."""
    latents_file: str = ""
    """A .npy file of latents in the denoiser's scale in place of drawn ones."""
    steps: int = 20_000
    batch: int = 16
    crop: int = 32
    """Cells a side of what one sample teaches; smaller latents are taken whole."""
    rate: float = 2e-3
    """Largest learning rate of AdamW; it falls to nothing along a cosine."""
    precision: str = "bfloat16"
    """Of the arithmetic in training: bfloat16, or float32 where the processor is no faster in bfloat16."""
    seed: int = 0
    weights: str = ""
    """A folder that `tiny_files.write_network` wrote, or a diffusers AutoencoderTiny: taken as it is, not trained."""

    def __post_init__(self) -> None:
        for name, least in (("latents", 1), ("copies", 0), ("steps", 1), ("batch", 1), ("crop", 1)):
            if getattr(self, name) < least:
                raise BadInput(
                    f"{name} of a tiny decoder: {getattr(self, name)}", expected=f"at least {least}"
                )
        if not 0 < self.rate < 1:
            raise BadInput(f"rate of a tiny decoder: {self.rate}", expected="between 0 and 1")
        if self.precision not in ("bfloat16", "float32"):
            raise BadInput(f"precision of a tiny decoder: {self.precision}", expected="bfloat16 or float32")

    def __call__(self, model: Model, ctx: Context) -> Generator[Progress, None, Model]:
        """Teach, or read what was taught; an interrupted run goes on from its last checkpoint in ctx.store.

        Raises BadInput for a model without a VAE, a shape that saves nothing, weights that do not fit, and a loss that
        turned NaN, which leaves the last good weights in the store.
        """
        if "vae_decoder" not in model.parts:
            raise BadInput(
                f"{model.name} has no vae_decoder",
                expected="a latent diffusion model",
                fix="take tiny_decoder out of [recipe] passes",
            )
        teacher = model.parts["vae_decoder"]
        if self.weights:
            network, said = read_network(Path(self.weights), model)
            yield Progress("tiny decoder", 1.0, f"weights of {Path(self.weights).name}")
            figures = {"psnr_db": said.get("psnr_db"), "psnr_db_worst": said.get("psnr_db_worst")}
            untaught = {"steps": 0, "latents": 0, "copies": 0}  # here; what taught it is not known
            return _with_decoder(model, self, network, figures | untaught)
        shape, _ = choose_shape(model, self.widths, self.blocks)
        store, file = _places(self, model, ctx)
        source = Source(self.latents, self.copies, self.prompts, self.latents_file)
        taught, held = yield from within(
            prepare(model, ctx.plan, source, store, SEEDS + ctx.seed + self.seed), 0, TAUGHT_SHARE
        )
        from .tiny_network import TinyNetwork

        th = torch()
        with th.random.fork_rng(devices=[]):
            th.manual_seed(ctx.seed + self.seed)
            network = TinyNetwork(shape, model.sample.scaling_factor, model.sample.shift_factor)
        yield from within(_train(self, network, taught, held, model, file, ctx.seed), TAUGHT_SHARE, 1)
        network.eval()
        every, worst = psnr(network, held, model, len(held))
        yield Progress("tiny decoder", 1.0, f"{every:.1f} dB against {teacher.name}")
        drawn = len(taught) // (1 + self.copies)  # of a file there may be other than `latents`
        figures = {"psnr_db": round(every, 2), "psnr_db_worst": round(worst, 2), "latents": drawn}
        return _with_decoder(model, self, network, figures)


def psnr(network: Any, held: Lessons, model: Model, count: int) -> tuple[float, float]:
    """Decibels of pictures in [0, 1] against the teacher's: over `count` of them together, and of the worst."""
    th, sample = torch(), model.sample
    errors = []
    for number in range(min(count, len(held))):
        latent, right = held.take(np.array([number]))
        seen = latent / sample.scaling_factor + sample.shift_factor
        with th.no_grad():
            got = network(th.from_numpy(seen.astype(np.float32))).numpy()
        errors.append(float(np.mean(((got.clip(-1, 1) - right.clip(-1, 1)) / 2) ** 2, dtype=np.float64)))
    least = 1e-12  # 120 dB, so that equal pictures have a number
    return tuple(-10 * math.log10(max(e, least)) for e in (float(np.mean(errors)), max(errors)))  # type: ignore[return-value]


def _train(
    job: TinyDecoder, network: Any, taught: Lessons, held: Lessons, model: Model, file: Path, seed: int
) -> Generator[Progress, None, None]:
    """AdamW on the squared error of the picture. Equal steps give equal weights, interrupted or not."""
    th, sample = torch(), model.sample
    network.train().to(memory_format=th.channels_last)
    # beta2 below the usual 0.999: with batches this small the gradient's size changes fast
    optimizer = th.optim.AdamW(network.parameters(), lr=job.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    random = th.Generator().manual_seed(seed + job.seed)
    step = 0
    if file.exists():
        kept = th.load(io.BytesIO(file.read_bytes()), weights_only=True)
        step = kept["step"]
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        random.set_state(kept["random"])
    began = saved = time.perf_counter()
    first, note = step, ""
    while step < job.steps:
        for group in optimizer.param_groups:
            group["lr"] = job.rate * min(1, (step + 1) / WARM_STEPS) * _cosine(step / job.steps)
        which = th.randint(len(taught), (job.batch,), generator=random).numpy()
        latent, right, learned = _cropped(*taught.take(which), job.crop, sample.factor, random)
        seen = th.from_numpy(latent / sample.scaling_factor + sample.shift_factor).float()
        with th.autocast("cpu", th.bfloat16, enabled=job.precision == "bfloat16"):
            drawn = network(seen.contiguous(memory_format=th.channels_last))
        error = (drawn.float() - th.from_numpy(right)) * th.from_numpy(learned)
        loss = error.square().mean()
        if not math.isfinite(loss.item()):
            raise BadInput(
                f"the tiny decoder's loss turned {loss.item()} at step {step + 1} of {job.steps}",
                expected="a finite loss",
                fix=f"a lower rate than {job.rate:g}; the last good weights are in {file.name} of the store",
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        now = time.perf_counter()
        if now - saved >= CHECKPOINT_S or step == job.steps:
            buffer = io.BytesIO()
            state = {"step": step, "network": network.state_dict(), "optimizer": optimizer.state_dict()}
            th.save({**state, "random": random.get_state()}, buffer)
            atomic_write(file, buffer.getvalue())
            note, saved = f", {psnr(network, held, model, SHOWN)[0]:.1f} dB", now
        left = (now - began) / (step - first) * (job.steps - step)
        said = f"step {step} of {job.steps}{note}, {math.ceil(left / 60)} min left"
        yield Progress("tiny decoder", step / job.steps, said)


def _cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def _cropped(latent: Any, right: Any, crop: int, factor: int, random: Any) -> tuple[Any, Any, Any]:
    """A piece of each latent and of its picture, and a mask [1, 1, height, width] of what can be learned there."""
    corner = []
    for size in latent.shape[2:]:
        room = max(0, size - crop)
        corner.append(int(torch().randint(room + 1, (1,), generator=random)) if room else 0)
    sides = []
    learned = np.ones((1, 1, 1, 1), np.float32)
    for axis, (begin, size) in enumerate(zip(corner, latent.shape[2:], strict=True)):
        end = min(begin + crop, size)
        side = np.ones((end - begin) * factor, np.float32)
        edge = min(EDGE, (end - begin) // 4) * factor
        if begin > 0:
            side[:edge] = 0
        if end < size:
            side[len(side) - edge :] = 0
        learned = learned * (side[:, None] if axis == 0 else side[None, :])
        sides.append((begin, end))
    (top, bottom), (left, side_end) = sides
    piece = latent[:, :, top:bottom, left:side_end]
    pixels = slice(top * factor, bottom * factor), slice(left * factor, side_end * factor)
    return piece, np.ascontiguousarray(right[:, :, pixels[0], pixels[1]]), learned


def _with_decoder(model: Model, job: TinyDecoder, network: Any, figures: dict[str, Any]) -> Model:
    """The model with the network as its decoder: same inputs, outputs and sizes."""
    old = model.parts["vae_decoder"]
    _, work = choose_shape(model, network.shape.widths, network.shape.blocks)
    network.requires_grad_(False)
    part = replace(
        old,
        module=network.eval(),
        config=tiny_config(network.shape, model),
        quantized=None,
        margin=network.shape.margin,
    )
    measured = {**figures, "parameters": part.parameters(), "work": round(work, 4), "margin": part.margin}
    # names of files, not where they lay: a bundle says nothing about its maker's disk
    named = {field: Path(getattr(job, field)).name for field in ("weights", "latents_file")}
    shape = {"widths": list(network.shape.widths), "blocks": list(network.shape.blocks)}
    return model.after(job, {part.name: part}, **{**named, **shape, **measured})


def _places(job: TinyDecoder, model: Model, ctx: Context) -> tuple[Path, Path]:
    """The folder of the lessons and the file of the checkpoint: named after everything they depend on."""
    lessons = {
        "model": model_fingerprint(model),
        "plan": ctx.plan.to_json(),
        "guidance": model.guidance.scale,
        "prompts": job.prompts or model.prompts,
        "source": [job.latents, job.copies, job.seed, ctx.seed],
        "file": hashlib.sha256(Path(job.latents_file).read_bytes()).hexdigest() if job.latents_file else "",
    }
    folder = ctx.store / f"tiny-decoder-{_digest(lessons)}"
    training = [job.widths, job.blocks, job.steps, job.batch, job.crop, job.rate, job.precision]
    return folder, folder / f"training-{_digest(training)}.pt"


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]

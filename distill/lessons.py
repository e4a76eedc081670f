"""What a decoder is taught on: latents the model itself draws, copies of them moved and made noisy, and the pictures
the model's own decoder makes of all of them. Kept in a folder, a file a batch: an interrupted job goes on there.
"""

from __future__ import annotations

import io
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..model.model import Model
from ..model.trajectories import PROMPTS, run_part, trajectories
from ..runtime.errors import BadInput
from ..runtime.files import atomic_write, output_errors
from ..runtime.plan import Plan
from ..runtime.progress import Progress

__all__ = ["Lessons", "Source", "prepare"]

Array = NDArray[Any]

BATCH = 16
"""Latents drawn and kept together."""
NOISE = 0.2
"""Largest noise on a copy, in standard deviations of the latents: what few steps, guidance or quantization leave."""
HELD = 16
"""One more latent for so many is held out."""


@dataclass(frozen=True)
class Source:
    """Where latents come from: the plan run on the model, or a file."""

    count: int
    """Latents to teach on."""
    copies: int
    """Moved and noisy copies of each."""
    prompts: tuple[str, ...] = ()
    """Empty for the model's own."""
    file: str = ""
    """A .npy file of latents in the denoiser's scale, [n, channels, height, width], in place of the plan."""


@dataclass(frozen=True, eq=False)
class Lessons:
    """Latents in the denoiser's scale and their pictures in [-1, 1], in pieces as they lie on disk."""

    latents: tuple[Array, ...]
    """float32 [n, channels, h, w] each."""
    pictures: tuple[Array, ...]
    """float16 [n, colors, height, width] each, mapped from disk."""

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.latents)

    def take(self, which: Array) -> tuple[Array, Array]:
        """Latents and pictures by number, float32."""
        ends = np.cumsum([len(piece) for piece in self.latents])
        piece = np.searchsorted(ends, which, side="right")
        inside = which - np.concatenate([[0], ends])[piece]
        pairs = list(zip(piece.tolist(), inside.tolist()))
        pictures = np.stack([self.pictures[p][i] for p, i in pairs])
        return np.stack([self.latents[p][i] for p, i in pairs]), pictures.astype(np.float32)


def prepare(
    model: Model, plan: Plan, source: Source, folder: Path, seed: int
) -> Generator[Progress, None, tuple[Lessons, Lessons]]:
    """Draw and decode what is not in `folder` yet; returns what to teach on, and what is held out of it.

    Held-out latents come from seeds of their own and have no copies. Raises BadInput for latents the decoder does not
    take, and for a decoder whose pictures are not finite.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    given = _given(model, source.file) if source.file else None
    count = source.count if given is None else len(given) - max(1, len(given) // HELD)
    total = count + max(1, count // HELD) if given is None else len(given)
    spans = [(i, min(i + BATCH, count)) for i in range(0, count, BATCH)]
    spans += [(i, min(i + BATCH, total)) for i in range(count, total, BATCH)]
    taught: list[tuple[Array, Array]] = []
    held: list[tuple[Array, Array]] = []
    for begin, end in spans:
        kept = [folder / f"{kind}-{begin:06d}.npy" for kind in ("latents", "pictures")]
        if not all(file.exists() for file in kept):
            yield Progress("teacher", begin / total, f"{begin} of {total} latents")
            rng = np.random.default_rng((seed, begin))
            z = given[begin:end] if given is not None else _draw(model, plan, source, seed, begin, end, rng)
            if begin < count:
                z = np.concatenate([z, *(_moved(z, rng) for _ in range(source.copies))])
            for file, array in zip(kept, (z, _decoded(model, z)), strict=True):
                buffer = io.BytesIO()
                np.save(buffer, array)
                atomic_write(file, buffer.getvalue())
        pair = np.load(kept[0]), np.load(kept[1], mmap_mode="r")
        (taught if begin < count else held).append(pair)
    both = [Lessons(tuple(z for z, _ in pairs), tuple(y for _, y in pairs)) for pairs in (taught, held)]
    return both[0], both[1]


def _draw(
    model: Model, plan: Plan, source: Source, seed: int, begin: int, end: int, rng: np.random.Generator
) -> Array:
    """Latents number begin to end, [n, channels, h, w], from seeds of their own; prompts go round, labels differ."""
    prompts: tuple[str, ...] = ()
    if model.tokenizer is not None:
        known = source.prompts or model.prompts or PROMPTS
        prompts = tuple(known[i % len(known)] for i in range(begin, end))
    labels = () if model.classes is None else tuple(rng.integers(model.classes, size=end - begin).tolist())
    seeds = range(seed + begin, seed + end)
    (run,) = trajectories(model, plan, seeds, prompts=prompts, labels=labels, batch=end - begin)
    return run.latent


def _moved(z: Array, rng: np.random.Generator) -> Array:
    """A copy of each latent: half of them mirrored, all with some noise."""
    mirrored = np.where(rng.random((len(z), 1, 1, 1)) < 0.5, z[..., ::-1], z)
    size = rng.uniform(0, NOISE * z.std(), (len(z), 1, 1, 1))
    return (mirrored + size * rng.standard_normal(z.shape)).astype(np.float32)


def _decoded(model: Model, z: Array) -> Array:
    """float16 [n, colors, height, width]: what the model's own decoder makes of the latents, one at a time."""
    part, sample = model.parts["vae_decoder"], model.sample
    feed, out = part.inputs[0].name, part.outputs[0].name
    seen = (z / sample.scaling_factor + sample.shift_factor).astype(np.float32)
    pictures = np.concatenate([run_part(part, {feed: seen[i : i + 1]})[out] for i in range(len(seen))])
    if not np.isfinite(pictures).all():
        raise BadInput(
            f"{model.name}: its own decoder makes NaN or infinity of its latents",
            expected="finite pictures",
            fix="look at the VAE's weights; SDXL's overflows in float16",
        )
    return pictures.astype(np.float16)  # 65 dB and more below a picture in [-1, 1]


def _given(model: Model, file: str) -> Array:
    """Latents of a file, checked."""
    try:
        z = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadInput(f"latents {file} cannot be read ({error})", expected="a .npy file") from None
    wanted = f"at least 2 finite latents of {model.sample.channels} channels, [n, channels, height, width]"
    good = z.ndim == 4 and z.shape[1] == model.sample.channels and len(z) > 1
    if not good or not np.issubdtype(z.dtype, np.floating) or not np.isfinite(z).all():
        raise BadInput(f"latents {file} of shape {z.shape} and type {z.dtype}", expected=wanted)
    return np.asarray(z, dtype=np.float32)

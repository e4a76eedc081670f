"""What callers bring besides noise, as arrays of the network's own: images to start from, masks, observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backends import Session
from .errors import BadInput
from .manifest import Manifest, PartSpec, SampleSpec
from .noise import randn
from .process import Array, process_from_json
from .step import Denoise

__all__ = ["Brought", "as_mask", "as_samples", "bring", "encode", "example_observation"]


@dataclass(frozen=True)
class Brought:
    """What a call brings besides its prompt and noise."""

    arrays: tuple[Array, ...] = ()
    """The plan's given arrays: the observation, then the image, each where there is one."""
    observation: Array | None = None
    kept: Array | None = None
    """1 where the image, the last of the arrays, is kept; None without a mask."""

    def keep(self, denoise: Denoise) -> Denoise:
        if self.kept is None:
            return denoise
        from .editing import keep  # with the samplers it needs, for those who edit

        return keep(denoise, self.arrays[-1], self.kept)

    def finish(self, x: Array) -> Array:
        """What is kept, exactly: a grid that ends at the first trained level leaves a trace of noise on it."""
        return x if self.kept is None else np.where(self.kept == 1, self.arrays[-1], x)


def bring(
    image: Any,
    mask: Any,
    observation: Any,
    n: int,
    shape: Sequence[int],
    sample: SampleSpec,
    encode: Callable[[Array], Array],
) -> Brought:
    """From what the caller has to arrays of n samples of this shape; None for what there is not."""
    y = None if observation is None else as_samples(observation, n, shape, sample, encode, "observation")
    x = None if image is None else as_samples(image, n, shape, sample, encode, "image")
    kept = None if mask is None else as_mask(mask, n, shape, sample.factor)
    return Brought(tuple(array for array in (y, x) if array is not None), y, kept)


def example_observation(manifest: Manifest, n: int) -> Array | None:
    """What stands in for an observation where a bundle is only tried out: noise, or None for models without."""
    if not hasattr(process_from_json(manifest.process), "gamma"):
        return None
    sample = manifest.sample
    cells = (sample.channels, sample.height // sample.factor, sample.width // sample.factor)
    return randn((max(n, 16), *cells), seed=1)[:n]  # torch draws fewer than 16 values another way


def encode(session: Session, spec: PartSpec, sample: SampleSpec, pixels: Array) -> Array:
    """[n, 3, height, width] in -1..1 to clean samples: the encoder's means, shifted and scaled for the denoiser."""
    name, out = spec.inputs[0].name, spec.outputs[0].name
    pixels = pixels.astype(spec.inputs[0].dtype)
    means = [session.run({name: pixels[i : i + 1]}, [out])[out] for i in range(len(pixels))]
    return np.asarray((np.concatenate(means) - sample.shift_factor) * sample.scaling_factor, dtype=np.float32)


def as_samples(
    image: Any, n: int, shape: Sequence[int], sample: SampleSpec, encode: Callable[[Array], Array], what: str
) -> Array:
    """float32 [n, channels, h, w]: the latent of an image, or a pixel model's image in -1..1.

    image  what the network works on, [n or 1, channels, h, w]; or pictures: PIL, or [height, width, 3] or [n or 1,
           height, width, 3], uint8 or 0..1, of the size that is drawn
    encode  [n, 3, height, width] in -1..1 -> clean samples
    """
    array = (
        np.stack([np.asarray(item) for item in image])
        if isinstance(image, list | tuple)
        else np.asarray(image)
    )
    size = (shape[1] * sample.factor, shape[2] * sample.factor)
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and array.shape[1:] == (*size, 3) and len(array) in (1, n):
        array = array / 255 if array.dtype == np.uint8 else array
        array = encode((array.transpose(0, 3, 1, 2) * 2 - 1).astype(np.float32))
    good = array.ndim == 4 and array.shape[1:] == tuple(shape) and len(array) in (1, n)
    good = good and np.issubdtype(array.dtype, np.floating) and bool(np.isfinite(array).all())
    if not good:
        raise BadInput(
            f"{what} of shape {array.shape} and type {array.dtype}",
            expected=f"finite numbers of shape {(n, *shape)}, or a picture {(*size, 3)} in 0..1",
            fix=f"resize it to {size[1]}x{size[0]}",
        )
    return np.repeat(array.astype(np.float32), n // len(array), axis=0)


def as_mask(mask: Any, n: int, shape: Sequence[int], factor: int) -> Array:
    """float32 [n or 1, 1, h, w]: 1 where the image is kept, 0 where it is painted anew.

    mask  as diffusers has it: PIL, bool, uint8 or 0..1, light where to paint; [height, width], [n or 1, height, width]
          or with a channel axis, in pixels or in the sample's cells. A cell with any light pixel is painted.
    """
    array = np.asarray(mask)
    array = array / 255 if array.dtype == np.uint8 else array.astype(np.float64)
    array = (
        array.reshape(array.shape[0] if array.ndim > 2 else 1, *array.shape[-2:]) if array.ndim > 1 else array
    )
    h, w = shape[1:]
    if array.ndim == 3 and array.shape[1:] == (h * factor, w * factor):
        array = array.reshape(len(array), h, factor, w, factor).max((2, 4))
    if (
        array.ndim != 3
        or array.shape[1:] != (h, w)
        or len(array) not in (1, n)
        or not np.isfinite(array).all()
    ):
        raise BadInput(
            f"mask of shape {np.shape(mask)}", expected=f"{(h * factor, w * factor)} in pixels, or {(h, w)}"
        )
    return (array < 0.5).astype(np.float32)[:, None]

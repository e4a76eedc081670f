"""A large picture decoded window by window, so that memory is that of one window.

A decoder of convolutions alone looks at no more than `margin` latent cells around what it draws: windows that overlap
by that much give the untiled picture exactly. One with group norms or attention looks at the whole latent; windows then
differ a little from each other, and what overlaps is blended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .errors import BadInput
from .process import Array

__all__ = ["BLEND", "Tiling", "tiling"]

BLEND = 0.25
"""Share of a window that overlaps the next where they are blended, as in diffusers' AutoencoderKL.tiled_decode."""

Span = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """How a latent is cut into windows of one size. All numbers are latent cells."""

    window: int
    margin: int | None
    """Cells beyond which the decoder sees nothing; None where it sees the whole latent."""

    def along(self, size: int) -> list[tuple[Span, Span]]:
        """(what is decoded, what of it is kept) along one side: as few windows as cover it, evenly spread.

        All windows are equally long, so that an engine prepares for one shape. Kept spans overlap only where they are
        blended.
        """
        window = min(self.window, size)
        overlap = self._overlap
        count = 1 if window == size else -(-(size - overlap) // (window - overlap))
        starts = [round(i * (size - window) / max(1, count - 1)) for i in range(count)]
        spans = [(start, start + window) for start in starts]
        if self.margin is None:
            return [(span, span) for span in spans]
        cuts = [0, *((a[1] + b[0]) // 2 for a, b in pairwise(spans)), size]
        return list(zip(spans, pairwise(cuts)))

    def decode(self, decode: Callable[[Array], Array], latent: Array, factor: int) -> Array:
        """The picture of a latent.

        decode  [1, channels, h, w] -> [1, colors, h factor, w factor]
        latent  [1, channels, height, width]
        """
        height, width = latent.shape[2:]
        image, weights = None, np.zeros((height * factor, width * factor), np.float32)
        for (rows, kept_rows), (columns, kept_columns) in self._windows(height, width):
            seen = np.ascontiguousarray(latent[:, :, slice(*rows), slice(*columns)])
            part = decode(seen)
            if image is None:
                image = np.zeros((1, part.shape[1], *weights.shape), np.float32)
            inner = tuple(
                slice((kept[0] - span[0]) * factor, (kept[1] - span[0]) * factor)
                for span, kept in ((rows, kept_rows), (columns, kept_columns))
            )
            outer = tuple(slice(a * factor, b * factor) for a, b in (kept_rows, kept_columns))
            weight = np.outer(self._weight(rows, height, factor), self._weight(columns, width, factor))[inner]
            image[:, :, *outer] += part[:, :, *inner] * weight
            weights[outer] += weight
        assert image is not None, "a latent has at least one cell"
        image /= weights
        return image

    @property
    def _overlap(self) -> int:
        return 2 * self.margin if self.margin is not None else max(1, round(self.window * BLEND))

    def _windows(self, height: int, width: int) -> Iterator[tuple[tuple[Span, Span], tuple[Span, Span]]]:
        for row in self.along(height):
            for column in self.along(width):
                yield row, column

    def _weight(self, span: Span, size: int, factor: int) -> Array:
        """Of each pixel row of a window: 1, but where windows are blended a ramp towards every inner edge."""
        count = (span[1] - span[0]) * factor
        if self.margin is not None:
            return np.ones(count, np.float32)
        ramp, at = self._overlap * factor, np.arange(count) + 0.5
        rise = at / ramp if span[0] > 0 else np.ones(count)
        fall = (count - at) / ramp if span[1] < size else np.ones(count)
        return np.minimum(np.minimum(rise, fall), 1).astype(np.float32)


def tiling(tile: int, factor: int, margin: int | None) -> Tiling:
    """Windows of `tile` pixels a side. Raises BadInput for a size that is no multiple of the decoder's factor, or
    too small to hold anything but margins.
    """
    least = 4 if margin is None else 2 * margin + 1  # an overlap of one cell, and three more to draw
    good = type(tile) is int and tile % factor == 0 and tile >= least * factor
    if not good:
        near = max(least, round(tile / factor)) * factor if isinstance(tile, int | float) else least * factor
        raise BadInput(
            f"tiles of {tile!r} pixels",
            expected=f"a multiple of {factor} from {least * factor} on",
            fix=f"try {near}",
        )
    return Tiling(tile // factor, margin)

"""The tiny decoder as a module: convolutions, ReLU and nearest-neighbour upsampling, nothing that sees far.

The architecture is TAESD's (Bohan 2023, github.com/madebyollin/taesd), in two ways more general: every stage has a
width of its own, and the last doublings can be a rearrangement of channels (Shi et al. 2016, arXiv:1609.05158), so that
a small picture pays for no wide layer at full size. With equal widths and no rearrangement the weights have the names
they have in diffusers' AutoencoderTiny. Imported only where torch is already needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["TinyNetwork", "TinyShape"]

Tensor = Any

CLAMP = 3.0
"""Of latents of unit variance, smoothly: TAESD's own bound."""


@dataclass(frozen=True)
class TinyShape:
    """What the network is built from."""

    widths: tuple[int, ...]
    """Channels of each stage, the coarsest first; each stage after the first doubles the sides."""
    blocks: tuple[int, ...]
    """Residual blocks of each stage."""
    factor: int
    """Pixels a latent cell: what the stages do not reach, a rearrangement of channels does."""
    latent_channels: int
    channels: int
    """Of the picture."""

    @property
    def shuffle(self) -> int:
        """Pixels along each side that come out of one cell of the last stage."""
        return self.factor >> (len(self.widths) - 1)

    @property
    def margin(self) -> int:
        """Latent cells around a pixel's own that it depends on: 1 for a kernel of 3, counted from the picture inwards.

        A pixel sees n others on each side; of cells twice as large those are ceil(n / 2) at most.
        """
        reach = 1  # the last convolution
        for stage in reversed(range(len(self.widths))):
            reach += 3 * self.blocks[stage] + 1  # a block has three kernels; one more leads into the stage
            if stage > 0:
                reach = -(-reach // 2)
        return reach


class Block(torch.nn.Module):  # type: ignore[misc]
    """x -> relu(x + three convolutions of x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[Any] = []
        for _ in range(3):
            layers += [torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.ReLU()]
        self.conv = torch.nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


class TinyNetwork(torch.nn.Module):  # type: ignore[misc]
    """latent_sample [batch, channels, height / factor, width / factor] -> image in [-1, 1], as the decoder it replaces.

    scaling_factor, shift_factor  of the model's VAE: the layers see latents in the denoiser's scale
    """

    def __init__(self, shape: TinyShape, scaling_factor: float = 1.0, shift_factor: float = 0.0) -> None:
        super().__init__()
        self.shape, self.scaling_factor, self.shift_factor = shape, scaling_factor, shift_factor
        nn, widths = torch.nn, shape.widths
        layers: list[Any] = [nn.Conv2d(shape.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for stage, (width, blocks) in enumerate(zip(widths, shape.blocks, strict=True)):
            if stage > 0:
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(widths[stage - 1], width, 3, padding=1, bias=False),
                ]
            layers += [Block(width) for _ in range(blocks)]
        layers.append(nn.Conv2d(widths[-1], shape.channels * shape.shuffle**2, 3, padding=1))
        if shape.shuffle > 1:
            layers.append(nn.PixelShuffle(shape.shuffle))
        self.layers = nn.Sequential(*layers)

    def forward(self, latent_sample: Tensor) -> Tensor:
        z = (latent_sample - self.shift_factor) * self.scaling_factor
        return self.layers(torch.tanh(z / CLAMP) * CLAMP) * 2 - 1

"""Upsampling before a convolution is doubled work: of the 36 products behind four pixels that were one, 20 are spared.

nearest-neighbour doubling, then a kernel of 3: each of the four output pixels a cell becomes sees 2 x 2 cells, some of
them through more than one tap of the kernel. Adding up those taps gives four kernels of 2 x 2 on the small picture, one
for each place in the cell, with the same result (Shi et al. 2016, arXiv:1609.07009, for transposed convolutions).
Imported only where torch is already needed.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SplitUpsample", "split_upsampling"]

Tensor = Any

TAPS = (((0,), (1, 2)), ((0, 1), (2,)))
"""Place in the doubled cell, along one axis -> the taps of the kernel that see its first cell, and its second."""


class Place(torch.nn.Conv2d):  # type: ignore[misc]
    """The convolution of 2 x 2 for one place: cells above and left of it, or below and right, are zero at the edge."""

    def __init__(self, conv: Any, row: int, column: int) -> None:
        super().__init__(conv.in_channels, conv.out_channels, 2, bias=conv.bias is not None)
        self.edges = (1 - column, column, 1 - row, row)
        with torch.no_grad():
            if conv.bias is not None:
                self.bias.copy_(conv.bias)
            for i, above in enumerate(TAPS[row]):
                for j, left in enumerate(TAPS[column]):
                    taps = [conv.weight[:, :, u, v] for u in above for v in left]
                    self.weight[:, :, i, j] = torch.stack(taps).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.nn.functional.pad(x, self.edges))


class SplitUpsample(torch.nn.Module):  # type: ignore[misc]
    """[batch, in, height, width] -> [batch, out, 2 height, 2 width]: doubling and a convolution of 3 x 3 in one."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.places = torch.nn.ModuleList(Place(conv, row, column) for row in range(2) for column in range(2))

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None:
            raise ValueError("sizes that are no multiple of the network's factor cannot be doubled in one")
        parts = torch.cat([place(hidden_states) for place in self.places], 1)
        batch, channels, height, width = parts.shape
        parts = parts.view(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(batch, channels // 4, 2 * height, 2 * width)


def split_upsampling(module: Any) -> int:
    """Replace every doubling with a convolution of 3 x 3 behind it, in place; returns how many.

    diffusers' Upsample2D, and torch.nn.Upsample followed by Conv2d in a Sequential. Weights grow from 9 to 16 a pair of
    channels; a plain convolution of 3 x 3 with padding 1 is all that is taken.
    """
    found = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "Upsample2D" and _plain(getattr(child, "conv", None)):
                doubles = child.use_conv and not child.use_conv_transpose and child.interpolate
                if doubles and child.norm is None and child.name == "conv":
                    setattr(parent, name, SplitUpsample(child.conv))
                    found += 1
        if isinstance(parent, torch.nn.Sequential):
            for place in range(len(parent) - 1):
                first, conv = parent[place], parent[place + 1]
                if isinstance(first, torch.nn.Upsample) and _doubles(first) and _plain(conv):
                    parent[place], parent[place + 1] = torch.nn.Identity(), SplitUpsample(conv)
                    found += 1
    return found


def _doubles(layer: Any) -> bool:
    return layer.mode == "nearest" and layer.size is None and float(layer.scale_factor) == 2


def _plain(conv: Any) -> bool:
    return (
        type(conv) is torch.nn.Conv2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )

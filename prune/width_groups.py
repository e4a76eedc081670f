"""Which rows and columns of a denoiser's weights go together when it gets narrower, and the cut itself.

What lies inside a block can go without anyone outside noticing, and what goes together is known for each kind of block:

    channels  of a residual block, between its two convolutions: rows of conv1, of time_emb_proj and of norm2, columns
              of conv2. A unit is a whole group of norm2: what remains is normalized exactly as before, which dropping
              single channels would not leave it, and the number of groups falls with the width.
    heads     of an attention: rows of to_q, to_k and to_v, columns of to_out.
    ffn       of a feed-forward net: rows of the first layer (GEGLU: value and gate), columns of the second.

The widths between blocks are left alone. Torch-Pruning 1.6.1 finds by tracing what is tied there, and finds it right
(tried on emoji-64, a UNet2DModel and a DiT: two channels swapped in all that it says is tied change nothing), but its
cuts do not run: a GroupNorm keeps a number of groups that no longer divides it, Downsample2D and Upsample2D assert
`channels` that it does not set, and DiT's position embedding is a buffer that it does not see. Nor can what is left be
as before: the norms behind a skip connection mix channels of both its ends in one group, and LayerNorms take their
means over all channels. Inside the blocks, where cuts can be exact, nothing has to be traced.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

from ..model.libraries import diffusers, torch

__all__ = ["KINDS", "Slice", "WidthGroup", "cut", "find_groups"]

KINDS = ("channels", "heads", "ffn")


@dataclass(frozen=True)
class Slice:
    """Where a group's units lie in one layer."""

    layer: str
    """Path of a Conv2d, Linear or GroupNorm."""
    axis: int
    """Of its weight: 0 for outputs, 1 for inputs."""
    copies: int = 1
    """How often the units lie there one after the other: twice in GEGLU, value and gate."""


@dataclass(frozen=True)
class WidthGroup:
    """Units of one block that can go one by one."""

    name: str
    """Path of the block."""
    kind: str
    """One of KINDS."""
    count: int
    """Units there are."""
    size: int
    """Rows of a unit: channels of a GroupNorm's group, a head's dimension, 1 in a feed-forward net."""
    slices: tuple[Slice, ...]
    """The last one is the layer that reads the units: its columns."""
    weights: int
    """Parameters that go with each unit, biases included."""

    @property
    def reader(self) -> str:
        return self.slices[-1].layer

    @property
    def width(self) -> int:
        return self.count * self.size

    def widths_kept(self, round_to: int, floor: float) -> list[int]:
        """Numbers of units that may be kept, the most first: all, and those that make a multiple of round_to.

        floor  share of the units that has to stay
        """
        step = lcm(self.size, round_to) // self.size
        least = max(1, -(-self.count * floor // 1))
        return [self.count, *(n for n in range(self.count - 1, 0, -1) if n % step == 0 and n >= least)]


def find_groups(module: Any, kinds: Sequence[str] = KINDS) -> list[WidthGroup]:
    """Every group of the diffusers blocks in a module, in its own order; none for a module without such blocks."""
    found = []
    for name, block in module.named_modules():
        if (group := _group(name, block)) is not None and group.kind in kinds and group.count > 1:
            found.append(group)
    return found


def cut(module: Any, kept: Mapping[str, Sequence[int]]) -> Any:
    """A copy of the module in which of each group, by name, only the units of these numbers are left.

    The layers are new ones of the smaller size; nothing of the copy's memory is the module's.
    """
    smaller = copy.deepcopy(module)
    for group in find_groups(smaller):
        if group.name not in kept or len(kept[group.name]) == group.count:
            continue
        units = sorted(kept[group.name])
        for piece in group.slices:
            old = smaller.get_submodule(piece.layer)
            _replace(smaller, piece.layer, _narrower(old, piece, rows(group, piece, units), len(units)))
        if group.kind == "heads":
            attention = smaller.get_submodule(group.name)
            attention.heads = attention.sliceable_head_dim = len(units)
            attention.inner_dim = attention.inner_kv_dim = len(units) * group.size
    return smaller


def rows(group: WidthGroup, piece: Slice, units: Sequence[int]) -> list[int]:
    """The indices along the slice's axis that belong to these units."""
    return [
        again * group.width + unit * group.size + row
        for again in range(piece.copies)
        for unit in units
        for row in range(group.size)
    ]


def _group(name: str, block: Any) -> WidthGroup | None:
    """The group of one block, if it is of a kind we know and its layers are plain ones."""
    d = diffusers()
    path = f"{name}." if name else ""
    if isinstance(block, d.models.resnet.ResnetBlock2D):
        norm = block.norm2
        slices = [Slice(f"{path}conv1", 0)]
        if block.time_emb_proj is not None:
            slices.append(Slice(f"{path}time_emb_proj", 0, _copies(block.time_emb_proj, norm.num_channels)))
        slices += [Slice(f"{path}norm2", 0), Slice(f"{path}conv2", 1)]
        kind, count, size = "channels", norm.num_groups, norm.num_channels // norm.num_groups
    elif isinstance(block, d.models.attention_processor.Attention):
        if block.to_k is None or block.to_out is None or block.inner_dim != block.inner_kv_dim:
            return None
        if any(getattr(block, extra, None) is not None for extra in ("norm_q", "norm_k", "add_k_proj")):
            return None
        slices = [Slice(f"{path}{layer}", 0) for layer in ("to_q", "to_k", "to_v")]
        slices.append(Slice(f"{path}to_out.0", 1))
        kind, count, size = "heads", block.heads, block.inner_dim // block.heads
    elif isinstance(block, d.models.attention.FeedForward) and hasattr(block.net[0], "proj"):
        width = _inputs(block.net[2])
        slices = [Slice(f"{path}net.0.proj", 0, _copies(block.net[0].proj, width)), Slice(f"{path}net.2", 1)]
        kind, count, size = "ffn", width, 1
    else:
        return None
    layers = [block.get_submodule(piece.layer.removeprefix(path)) for piece in slices]
    if not all(_plain(layer) for layer in layers):
        return None
    weights = sum(
        piece.copies * size * _of_one_row(layer, piece.axis)
        for piece, layer in zip(slices, layers, strict=True)
    )
    return WidthGroup(name, kind, count, size, tuple(slices), weights)


def _plain(layer: Any) -> bool:
    """Of a kind that can be cut, and not of a class that adds something to it."""
    nn = torch().nn
    return type(layer) in (nn.Linear, nn.GroupNorm) or (type(layer) is nn.Conv2d and layer.groups == 1)


def _inputs(layer: Any) -> int:
    return int(layer.weight.shape[1])


def _copies(layer: Any, width: int) -> int:
    return int(layer.weight.shape[0]) // width


def _of_one_row(layer: Any, axis: int) -> int:
    """Parameters of one output, its bias included, or of one input."""
    count = layer.weight.numel() // layer.weight.shape[axis]
    return int(count) + (layer.bias is not None and axis == 0)


def _narrower(old: Any, piece: Slice, kept: Sequence[int], units: int) -> Any:
    """A new layer of the same kind with these rows or columns. `units`: groups that a GroupNorm is left with."""
    th = torch()
    index = th.tensor(list(kept), device=old.weight.device)
    weight = old.weight.detach().index_select(piece.axis, index)
    bias = None if old.bias is None else old.bias.detach().clone()
    if bias is not None and piece.axis == 0:
        bias = bias[index]
    how: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, th.nn.GroupNorm):
        new = th.nn.GroupNorm(units, len(kept), eps=old.eps, **how)
    elif isinstance(old, th.nn.Linear):
        new = th.nn.Linear(weight.shape[1], weight.shape[0], bias is not None, **how)
    else:
        new = th.nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            old.kernel_size,
            old.stride,
            old.padding,
            old.dilation,
            bias=bias is not None,
            padding_mode=old.padding_mode,
            **how,
        )
    new.weight = th.nn.Parameter(weight, requires_grad=old.weight.requires_grad)
    if bias is not None:
        new.bias = th.nn.Parameter(bias, requires_grad=old.bias.requires_grad)
    return new.train(old.training)


def _replace(module: Any, path: str, layer: Any) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)

"""Which weights stay when single ones go: masks by magnitude, in patterns, on a schedule, and regrown.

A mask is a boolean tensor of its weight's shape: True stays. Weights are [out, in] of a Linear or [out, in, height,
width] of a Conv2d. Plain functions of tensors; sparsify.py trains with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..model.libraries import torch
from ..runtime.errors import BadInput

__all__ = [
    "block_mask",
    "cubic_sparsity",
    "drop_and_regrow",
    "global_masks",
    "magnitude_mask",
    "n_of_m_mask",
    "regrown_fraction",
]

Tensor = Any


def cubic_sparsity(step: int, *, initial: float, final: float, begin: int, pulses: int, every: int) -> float:
    """s_k = s_f + (s_i - s_f) (1 - (k - k_0) / (n D))^3 of gradual magnitude pruning.

    pulses  n: how often weights go, `every` D steps from k_0 = begin on
    Fast at first, where much is superfluous, and slow at last. Zhu and Gupta 2017, arXiv:1710.01878, eq. 1.
    """
    share = min(1.0, max(0.0, (step - begin) / max(1, pulses * every)))
    return final + (initial - final) * (1 - share) ** 3


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """The largest of one layer's weights stay, in absolute value: exactly round((1 - sparsity) n) of them."""
    return _largest(weight.detach().abs().float(), _kept(weight.numel(), sparsity))


def global_masks(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """The same with one threshold for all layers. Layers of small weights may lose nearly everything."""
    th = torch()
    flat = th.cat([weight.detach().abs().float().flatten() for weight in weights.values()])
    whole = _largest(flat, _kept(flat.numel(), sparsity))
    pieces = whole.split([weight.numel() for weight in weights.values()])
    return {name: piece.view(weights[name].shape) for name, piece in zip(weights, pieces, strict=True)}


def n_of_m_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m weights that follow each other along the input stay, 2 of 4 for Sparse Tensor Cores.

    Of a convolution every place of the kernel has its own groups: engines lay channels innermost (Mishra et al. 2021,
    arXiv:2104.08378). Raises BadInput where m does not divide the inputs.
    """
    if not 0 < n <= m:
        raise BadInput(f"a pattern of {n} in {m}", expected="1 to as many as there are")
    if weight.ndim < 2 or weight.shape[1] % m:
        raise BadInput(
            f"a pattern of {n} in {m} for a weight {list(weight.shape)}",
            expected=f"inputs in multiples of {m}",
        )
    last = weight.detach().abs().float().movedim(1, -1)
    mask = _largest_of_each(last.reshape(-1, m), n)
    return mask.view(last.shape).movedim(-1, 1).contiguous()


def block_mask(weight: Tensor, sparsity: float, rows: int, columns: int) -> Tensor:
    """Blocks of rows x columns of the matrix [out, in] stay or go as one, by their mean square.

    Of a convolution every place of the kernel is such a matrix. Raises BadInput where blocks do not tile it.
    """
    if min(rows, columns) < 1 or weight.ndim < 2 or weight.shape[0] % rows or weight.shape[1] % columns:
        raise BadInput(
            f"blocks of {rows}x{columns} for a weight {list(weight.shape)}",
            expected=f"outputs in multiples of {rows} and inputs of {columns}",
        )
    last = (
        weight.detach().float().square().flatten(2)
        if weight.ndim > 2
        else weight.detach().float().square()[..., None]
    )
    tiled = last.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns, -1)
    energy = tiled.mean(dim=(1, 3))
    stays = _largest(energy, _kept(energy.numel(), sparsity))
    return stays[:, None, :, None, :].expand_as(tiled).reshape(weight.shape).contiguous()


def regrown_fraction(step: int, *, first: float, end: int) -> float:
    """Share of the remaining weights that is dropped and regrown: from `first` at step 0 to none at `end`, a cosine.

    Liu et al. 2021 (GraNet), arXiv:2106.10404, section 3.2, with the decay of RigL (arXiv:1911.11134).
    """
    return first / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1, end))))


def drop_and_regrow(weight: Tensor, mask: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """A mask of as many weights: the smallest `fraction` of those that stay go, and as many grow where the gradient is
    largest among all that are then off. GraNet's zero-cost neuroregeneration.

    gradient  of the loss by every weight, those at zero included
    """
    remaining = int(mask.sum())
    exchanged = min(round(fraction * remaining), mask.numel() - remaining)
    if exchanged == 0:
        return mask.clone()
    th = torch()
    size = th.where(mask, weight.detach().abs().float(), -th.inf)
    stays = _largest(size, remaining - exchanged)
    pull = th.where(stays, -th.inf, gradient.detach().abs().float())
    return stays | _largest(pull, exchanged)


def _kept(count: int, sparsity: float) -> int:
    if not 0 <= sparsity < 1:
        raise BadInput(f"a sparsity of {sparsity}", expected="from 0 to below 1")
    return round((1 - sparsity) * count)


def _largest(values: Tensor, count: int) -> Tensor:
    """True at the `count` largest of all; exactly as many, whatever ties."""
    mask = torch().zeros(values.numel(), dtype=torch().bool, device=values.device)
    mask[values.flatten().topk(count).indices] = True
    return mask.view(values.shape)


def _largest_of_each(values: Tensor, count: int) -> Tensor:
    """The same in every row of [rows, m]."""
    mask = torch().zeros_like(values, dtype=torch().bool)
    return mask.scatter(1, values.topk(count, dim=1).indices, True)

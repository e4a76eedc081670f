"""The few distances that distilling methods minimize; all of them means over a batch."""

from __future__ import annotations

from typing import Any

from ..model.libraries import torch

__all__ = ["pseudo_huber", "squared"]

Tensor = Any

ICT_C = 0.00054
"""c of the pseudo-Huber distance over the root of the dimension (iCT, Song and Dhariwal 2023, arXiv:2310.14189)."""


def squared(a: Tensor, b: Tensor) -> Tensor:
    """mean (a - b)^2."""
    return (a - b).square().mean()


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """mean of sqrt((a - b)^2 + c^2) - c, element by element: square near 0, absolute beyond c."""
    return (torch().sqrt((a - b).square() + c * c) - c).mean()

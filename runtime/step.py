"""What passes between a sampler, a plan and whoever runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .process import Array

__all__ = ["Denoise", "Noise", "Step"]

Denoise = Callable[[Array, float], Array]
Noise = Callable[[], Array]


@dataclass(frozen=True, slots=True)
class Step:
    """One new state on the way from noise to data."""

    index: int
    x: Array
    """The state after this step, at times[index + 1]."""
    x0: Array
    """The network's latest guess of the clean sample: what a preview shows."""

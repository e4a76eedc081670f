"""The default where nothing is known but the number of steps."""

from __future__ import annotations

from collections.abc import Iterator

from ..process import Array, Process
from .adams import ipndm
from .step import Denoise, Noise, Step
from .unipc import unipc, unipc_3

FEWEST, FEW = 5, 15
"""Up to so many steps the third-order predictor, then the second-order one; beyond, fourth-order Adams-Bashforth. In
benchmarks/mixture.py this stays within a tenth of the best of all samplers and grids at 4 to 20 network calls."""


def auto(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """The sampler for this number of steps, without guidance or with little. One network call a step, no fresh noise.

    UniPC (Zhao et al. 2023 <arXiv:2302.04867>), from 16 steps on iPNDM (Zhang and Chen 2022 <arXiv:2204.13902>).
    """
    steps = len(times) - 1
    chosen = unipc_3 if steps <= FEWEST else unipc if steps <= FEW else ipndm
    return chosen(denoise, process, x, times, noise)

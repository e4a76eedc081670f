"""The defaults where nothing is known but the number of steps, and whether there is guidance."""

from __future__ import annotations

from collections.abc import Iterator

from ..process import Array, Process
from .adams import ipndm
from .dpmpp import dpmpp_2m, dpmpp_2s
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


FEW_GUIDED = 6
"""Up to so many steps a singlestep solver: guidance makes the predictions of one step a poor guide to the next. On
emoji-64 with guidance 5 (benchmarks/sampler_quality.py) this is within a twentieth of the best at 4, 6 and 10 calls."""


def auto_guided(denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise) -> Iterator[Step]:
    """The sampler for this number of steps with guidance: DPM-Solver++ 2S, from 7 steps on 2M. Lu et al. 2022
    <arXiv:2211.01095>. One network call a step, no fresh noise."""
    chosen = dpmpp_2s if len(times) - 1 <= FEW_GUIDED else dpmpp_2m
    return chosen(denoise, process, x, times, noise)

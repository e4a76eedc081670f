"""Momentum: heavy ball and its generalisation, against the artifacts of few steps under strong guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from ..errors import PlanError
from ..process import Array, Process
from ..process import lam as log_snr
from .euler import levels
from .step import Denoise, Noise, Step

GHVB = (
    (1, ((0, 1),)),
    (2, ((2, 1), (-2, 1))),
    (12, ((18, 5), (-24, 8), (6, -1))),
    (24, ((46, 9), (-78, 19), (42, -5), (-10, 1))),
    (720, ((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19))),
)
"""By order: denominator n and (a, b) of each weight (a + b beta) / n, newest first, as in the
authors' momentum_scheduler.py <github.com/sWizad/momentum-diffusion>."""


def hb(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, beta: float = 0.9
) -> Iterator[Step]:
    """DPM-Solver++(2M) with Polyak's heavy ball. Wizadwongsa et al. 2023 <arXiv:2307.11118>.

    beta  1 is DPM-Solver++(2M); smaller ones keep 1 - beta of the last direction, for 0.8 to 0.95 with few steps and
          strong guidance; the order of accuracy falls to 1

    The direction v = (1 - beta) v + beta D is read back from the last two states, which it led from one to the other.
    First-order steps, the first and one onto sigma 0, have no momentum.
    """
    alpha, sigma, lam = process.alpha(times), process.sigma(times), log_snr(process, times)
    x_last = x0_last = None
    h_last, moving = 0.0, False
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        h = lam[i + 1] - lam[i]
        target = x0
        if x0_last is not None and np.isfinite(h) and np.isfinite(h_last):
            target = x0 + (x0 - x0_last) * (h / (2 * h_last))
            if moving:
                v = (x - sigma[i] / sigma[i - 1] * x_last) / (-alpha[i] * np.expm1(-h_last))
                target = (1 - beta) * v + beta * target
            moving = True
        x_last, x = x, sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * target
        x0_last, h_last = x0, h
        yield Step(i, x, x0)


def ghvb(
    denoise: Denoise, process: Process, x: Array, times: Array, noise: Noise, *, order: float = 1.8
) -> Iterator[Step]:
    """GHVB: Adams-Bashforth on slopes with heavy-ball memory. Wizadwongsa et al. 2023 <arXiv:2307.11118>.

    order  a real number up to 5: weights of its ceiling, damped by beta, its fraction; whole orders have beta 1 and
           are `ipndm`. 1.8 to 2.8 suit few steps. It has its ceiling's order of accuracy on grids even in c
           (sigma / alpha), 2 at most on others.

    The paper moves along u_k = (1 / beta) sum_j c_j v_{k-j}, with v_k = (1 - beta) v_{k-1} + beta d_k. From step
    ceil(order) on that is u_k = (1 - beta) u_{k-1} + sum_j c_j d_{k-j}, and u_{k-1} is read back from two states.
    """
    if not 0 < order <= len(GHVB):
        raise PlanError(f"GHVB of order {order}", expected=f"more than 0, at most {len(GHVB)}")
    most = math.ceil(order)
    beta = order - most + 1
    slopes: list[Array] = []
    memory: list[Array] = []  # the v of the first steps
    y_last, c_last = x, 0.0
    for i, (here, there) in enumerate(pairwise(levels(process, times))):
        (t, s, c), (_, s_next, c_next) = here, there
        x0 = denoise(x, t)
        y = x / s
        d = (y - x0) / c
        slopes = [d, *slopes][:most]
        n, pairs = GHVB[len(slopes) - 1]
        weights = [(a + b * beta) / n for a, b in pairs]
        if i < most:
            memory = [(1 - beta) * memory[0] + beta * d if memory else d, *memory]
            u = weights[0] / beta * memory[0]
            terms = zip(weights[1:], memory[1:], strict=True)
            u = sum((w / beta * v for w, v in terms), start=u)
        else:
            u = weights[0] * d
            u = sum((w * d for w, d in zip(weights[1:], slopes[1:], strict=True)), start=u)
            if beta < 1:
                u = u + (1 - beta) / (c - c_last) * (y - y_last)
        y_last, c_last = y, c
        x = s_next * (y + (c_next - c) * u)
        yield Step(i, x, x0)

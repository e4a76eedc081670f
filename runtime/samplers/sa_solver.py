"""SA-Solver: stochastic Adams predictor and corrector on the data prediction."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ..process import Array, Process
from .exponential import J, solve
from .step import Denoise, Noise, Step, noise_to_signal


def sa_solver(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    tau: float = 1.0,
    noisy: tuple[float, float] = (0.0, math.inf),
    predictor: int = 3,
    corrector: int = 4,
) -> Iterator[Step]:
    """SA-Solver, predict-evaluate-correct. Xue et al. 2023, algorithm 1 <arXiv:2309.05019>. One call a step.

    tau        how stochastic: 0 is the ODE, 1 the reverse SDE
    noisy      the noise levels sigma / alpha between which it is; steps that start elsewhere take tau 0
    predictor  points the predictor's polynomial goes through
    corrector  points the corrector's does, the newest included; 0 for none

    With k = 1 + tau^2 the SDE's exact solution over a step h in log(alpha / sigma) is
    x' = (sigma' / sigma) e^(-tau^2 h) x + alpha' int_0^h k e^(-k (h - v)) x0(v) dv + sigma' sqrt(1 - e^(-2 tau^2 h)) z.
    Two points use k h / 2 for the slope's weight, as the authors' and diffusers' code. Orders rise over the first
    steps and fall over the last; steps from no signal or onto sigma 0 are first order.
    """
    alpha, sigma, ratio = process.alpha(times), process.sigma(times), noise_to_signal(process, times)
    with np.errstate(divide="ignore"):
        lam = -np.log(ratio)
    h = np.diff(lam)
    taus = np.where((ratio[:-1] >= noisy[0]) & (ratio[:-1] <= noisy[1]), tau, 0.0)
    kept = (alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])) ** taus**2  # e^(-tau^2 h)
    whole = np.isfinite(h)
    z = np.where(whole, (1 + taus**2) * np.where(whole, h, 0.0), math.inf)
    count = max(predictor, corrector)
    phi = np.array([_moments(value, count) for value in z.tolist()]).T

    def weights(i: int, nodes: list[int]) -> Array:
        """Of the predictions at `nodes` in the step from times[i], by exactness on polynomials."""
        if len(nodes) == 1:
            return phi[:1, i]
        wanted = phi[: len(nodes), i]
        if len(nodes) == 2:
            wanted = np.array([wanted[0], (1 + taus[i] ** 2) * h[i] / 2])
        return solve((lam[nodes] - lam[i]) / h[i], wanted)

    steps = len(times) - 1
    past: dict[int, Array] = {}
    used: dict[int, float] = {}
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        known = [j for j in sorted(past, reverse=True) if np.isfinite(lam[j])]
        if i > 0 and whole[i - 1] and corrector > 0:
            nodes = [i, *known][: min(corrector, steps - i + 2)]
            # predictor and corrector share their start and noise: only the weights of predictions change
            change = dict(zip(nodes, alpha[i] * weights(i - 1, nodes), strict=True))
            for j in {*nodes, *used}:
                x = x + (change.get(j, 0.0) - used.get(j, 0.0)) * (x0 if j == i else past[j])
        past = {j: past[j] for j in known[: max(predictor, corrector)]} | {i: x0}
        nodes = [i, *known][: min(predictor, steps - i)] if whole[i] else [i]
        used = dict(zip(nodes, alpha[i + 1] * weights(i, nodes), strict=True))
        x = sigma[i + 1] / sigma[i] * kept[i] * x
        for j, weight in used.items():
            x = x + weight * past[j]
        s = sigma[i + 1] * np.sqrt(1 - kept[i] ** 2)
        if s > 0:
            x = x + s * noise()
        yield Step(i, x, x0)


def _moments(z: float, count: int) -> list[float]:
    """Integrals over w from 0 to 1 of z e^(-z (1 - w)) w^m; for infinite z the first one alone counts."""
    if math.isinf(z):
        return [1.0] + [0.0] * (count - 1)
    return [math.factorial(m) * j / z**m for m, j in enumerate(J(z, count))]

"""ER-SDE: extended reverse-time SDE solvers, whose noise is shaped by a free function phi."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..errors import PlanError
from ..process import Array, Process
from .exponential import gauss_legendre
from .step import Denoise, Noise, Step, noise_to_signal

GROWTH: dict[str, Callable[[Array], Array]] = {
    "er": lambda lam: np.exp(lam**0.3) + 10,
    "ode": np.ones_like,
    "sde": lambda lam: lam,
}
"""phi(lam) / lam. "er" is the default of the authors' code <github.com/QinpengCui/ER-SDE-Solver>."""

NODES = 16
"""Of the Gauss-Legendre rule in log(lam): within 2e-14 for every phi above, even for EDM in two steps."""


def er_sde(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    order: int = 3,
    phi: str = "er",
    corrected: bool = True,
) -> Iterator[Step]:
    """ER-SDE-Solver. Cui et al. 2023 <arXiv:2309.06169>. Its lam is sigma / alpha, not a logarithm.

    order      1 to 3; the first steps are of lower order
    phi        "er", "ode" (phi = lam: no noise) or "sde" (phi = lam^2: the reverse SDE)
    corrected  the paper's third order takes the slope of the data prediction between the last two points for the
               slope at the last one, which leaves it second order; True adds what the second difference knows

    With q = phi(lam') lam / (phi(lam) lam'), the spread a step keeps, its fresh noise is sigma' sqrt(1 - q^2).
    Steps from no signal, or onto sigma 0, are first order, the latter exact.
    """
    if phi not in GROWTH:
        raise PlanError.unknown("phi", phi, GROWTH)
    alpha, sigma, lam = process.alpha(times), process.sigma(times), noise_to_signal(process, times)
    with np.errstate(over="ignore"):
        growth = GROWTH[phi](lam)
    q = growth[1:] / growth[:-1]
    r = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1]) * q
    s = sigma[1:] * np.sqrt(1 - q**2)
    first, second = _integrals(lam, GROWTH[phi])
    past: list[tuple[float, Array]] = []  # lam and data prediction, newest first
    slope_last = None
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        ahead = (1 - r[i]) * x0
        if np.isfinite(lam[i]):
            past = [(lam[i], x0), *past][:3]
        if order > 1 and len(past) > 1:
            slope = (x0 - past[1][1]) / (lam[i] - past[1][0])
            d1 = slope
            if order > 2 and slope_last is not None:
                change = (slope - slope_last) / (lam[i] - past[2][0])
                if corrected:
                    d1 = d1 + (lam[i] - past[1][0]) * change
                ahead = ahead + second[i] * (2 * change)
            ahead = ahead + first[i] * d1
            slope_last = slope
        x = sigma[i + 1] / sigma[i] * q[i] * x + alpha[i + 1] * ahead
        if s[i] > 0:
            x = x + s[i] * noise()
        yield Step(i, x, x0)


def _integrals(lam: Array, growth: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Integrals over xi from lam' to lam of (phi(lam') / phi(xi) - 1) times 1 and times (xi - lam), for each step.

    They are the paper's lam' - lam + phi(lam') int 1/phi and (lam' - lam)^2 / 2 + phi(lam') int (xi - lam)/phi, without
    their cancellation. 0 where a step has no finite ends in log(lam).
    """
    whole = np.isfinite(lam[:-1]) & (lam[1:] > 0)
    low, high = (np.where(whole, end, 1.0)[:, None] for end in (lam[1:], lam[:-1]))
    node, weight = gauss_legendre(NODES)
    length = np.log(high / low)
    xi = low * np.exp(length * node)
    bend = weight * length * xi * (low * growth(low) / (xi * growth(xi)) - 1)
    return bend.sum(axis=1), (bend * (xi - high)).sum(axis=1)

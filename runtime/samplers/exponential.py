"""One engine for DPM-Solver, DPM-Solver++, UniPC, DEIS and their kin: exponential integrators.

With lam = log(alpha/sigma) and h = lam_t - lam_s, sampling from a time s to a time t is exactly (Lu et al. 2022,
proposition 3.1 <arXiv:2206.00927>; proposition 4.1 <arXiv:2211.01095>)

    data   x_t = sigma_t/sigma_s x_s + alpha_t int_0^h e^(u-h) m(u) du         m the prediction of x_0
    noise  x_t = alpha_t/alpha_s x_s - sigma_t int_0^h e^(h-u) eps(u) du       eps the prediction of the noise

A solver replaces m or eps by what it knows at a few points. It is therefore a rule that turns the points' lam into
weights; everything else is shared. The noise integral is the data integral of the negated lam, so a rule serves both.

With fresh noise, in the amount eta (0 is the ODE above, 1 the reverse SDE; k-diffusion's parameter), the data integral
becomes that of lam scaled by 1 + eta, and the noise integral is multiplied by 1 + eta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np

from ..errors import PlanError
from ..process import Array, Process
from ..process import lam as log_snr
from .step import NO_SIGNAL, Denoise, Noise, Step

Rule = Callable[[float, Sequence[float]], Array]
"""(lam_t, lam of the points, the start s first) -> w with int_0^h e^(u-h) m(u) du = sum of w_j m_j."""

FEW_STEPS = 15
"""Below this many steps multistep solvers end with lower orders, for stability (diffusers, lower_order_final)."""


def J(h: float, count: int) -> list[float]:
    """J_k(h) = int_0^h e^(u-h) u^k/k! du for k < count; h may be negative, or inf where only J_0 = 1 is finite."""
    if math.isinf(h) and h > 0:
        return [1.0] + [math.inf] * (count - 1)
    if abs(h) < 1:  # the recursion below loses digits; 18 terms, since 1/18! is below float64's resolution
        series = [sum((-h) ** j / math.factorial(k + 1 + j) for j in range(18)) for k in range(count)]
        return [h ** (k + 1) * value for k, value in enumerate(series)]
    out = [-math.expm1(-h)]
    for k in range(1, count):
        out.append(h**k / math.factorial(k) - out[-1])
    return out


def first(lam_t: float, lam: Sequence[float]) -> Array:
    """First order, which is DDIM: the latest prediction holds all the way."""
    return np.array([-math.expm1(lam[0] - lam_t)])


def taylor(lam_t: float, lam: Sequence[float]) -> Array:
    """The weights that are exact for polynomials in lam of degree below the number of points."""
    return solve(*_scaled(lam_t, lam))


def pseudo(lam_t: float, lam: Sequence[float]) -> Array:
    """Each derivative from as few of the points as it needs, in their order: second order from two points on, but
    calmer in the fewest steps (Zheng et al. 2023 <arXiv:2310.13268>)."""
    r, moments = _scaled(lam_t, lam)
    return np.asarray(moments @ divided_differences(r))


def _scaled(lam_t: float, lam: Sequence[float]) -> tuple[Array, Array]:
    """The points r_j in units of the step, and int_0^h e^(u-h) (u/h)^k du."""
    h = lam_t - lam[0]
    moments = [math.factorial(k) * j / h**k for k, j in enumerate(J(h, len(lam)))]
    return (np.array(lam) - lam[0]) / h, np.array(moments)


def solve(r: Array, moments: Array) -> Array:
    """Weights w at the points r with sum_j w_j r_j^k = moments[k]: the Vandermonde system."""
    return np.asarray(np.linalg.solve(r ** np.arange(len(r))[:, None], moments))


def divided_differences(r: Array) -> Array:
    """[k, j]: the weight of value j in the divided difference over the points r_0 to r_k."""
    table = np.zeros((len(r), len(r)))
    for k in range(len(r)):
        apart = r[: k + 1, None] - r[: k + 1] + np.eye(k + 1)
        table[k, : k + 1] = 1 / apart.prod(axis=1)
    return table


@cache
def gauss_legendre(nodes: int) -> tuple[Array, Array]:
    """Nodes and weights on [0, 1]."""
    v, w = np.polynomial.legendre.leggauss(nodes)
    return (v + 1) / 2, w / 2


T = TypeVar("T")


def choose(what: str, name: str, known: Mapping[str, T]) -> T:
    """The option of that name. Raises PlanError with the known ones."""
    if name not in known:
        raise PlanError.unknown(what, name, known)
    return known[name]


@dataclass(frozen=True, slots=True)
class Point:
    """What the network said at one time of the grid."""

    i: int
    x0: Array
    q: Array
    """The prediction a rule interpolates: x0, or the noise."""


@dataclass(frozen=True)
class Integrator:
    """The integrals of the module's docstring, along one grid of times."""

    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    lam: tuple[float, ...]
    noise_prediction: bool
    eta: float

    @classmethod
    def of(
        cls, process: Process, times: Array, *, noise_prediction: bool = False, eta: float = 0.0
    ) -> Integrator:
        """Raises PlanError for an eta below 0, or above where the times rise, and for a start without noise."""
        if eta < 0 or (eta > 0 and times[-1] > times[0]):
            raise PlanError(f"eta {eta}", expected="0 or more" if eta < 0 else "0 for an inversion")
        alpha, sigma, lam = process.alpha(times), process.sigma(times), log_snr(process, times)
        if not np.all(sigma[:-1] > 0):
            raise PlanError("a network call at sigma 0", expected="noise at every time but the last")
        lam = np.where(alpha > NO_SIGNAL, lam, -np.inf)
        return cls(tuple(alpha.tolist()), tuple(sigma.tolist()), tuple(lam.tolist()), noise_prediction, eta)

    def point(self, i: int, x: Array, x0: Array) -> Point:
        return Point(i, x0, (x - self.alpha[i] * x0) / self.sigma[i] if self.noise_prediction else x0)

    def finite(self, s: int, t: int) -> bool:
        """Whether the step has a length: not from alpha 0 (lam is -inf), not onto sigma 0 (lam is inf)."""
        return math.isfinite(self.lam[t] - self.lam[s])

    def points(self, i: int, order: int, lower_final: bool) -> int:
        """How many points step i of a multistep solver uses: it ramps up, and steps of infinite length use one.

        A time at lam = -inf is no point a polynomial could pass through.
        """
        past = sum(map(math.isfinite, self.lam[: i + 1]))
        ahead = len(self.lam) - 1 - i if lower_final else order
        return min(order, past, ahead) if self.finite(i, i + 1) else 1

    def weights(self, t: int, points: Sequence[Point], rule: Rule) -> list[float]:
        """What the points' predictions add to x_t in a step from the first of them."""
        c = -1.0 if self.noise_prediction else 1 + self.eta
        scale = (1 + self.eta) * self.sigma[t] if self.noise_prediction else self.alpha[t]
        w = rule(c * self.lam[t], [c * self.lam[p.i] for p in points])
        return [scale * value for value in w.tolist()]

    def step(self, x: Array, t: int, points: Sequence[Point], rule: Rule, noise: Noise) -> Array:
        """x at grid time t from x at the time of the first point."""
        s = points[0].i
        alpha_s, sigma_s, alpha_t, sigma_t = self.alpha[s], self.sigma[s], self.alpha[t], self.sigma[t]
        h = self.lam[t] - self.lam[s]
        if not self.finite(s, t):
            # DDIM written without h. Onto sigma 0 it returns x0; from alpha 0 fresh noise replaces the old
            kept = sigma_t / sigma_s if self.eta == 0 else 0.0
            x = kept * x + (alpha_t - kept * alpha_s) * points[0].x0
            fresh = sigma_t if self.eta > 0 else 0.0
        else:
            if self.noise_prediction:
                kept, fresh = alpha_t / alpha_s, sigma_t * math.sqrt(self.eta * math.expm1(2 * h))
            else:
                kept = sigma_t / sigma_s * math.exp(-self.eta * h)
                fresh = sigma_t * math.sqrt(-math.expm1(-2 * self.eta * h))
            x = kept * x
            for weight, point in zip(self.weights(t, points, rule), points, strict=True):
                x = x + weight * point.q
        return x + fresh * noise() if fresh > 0 else x


def multistep(
    denoise: Denoise,
    times: Array,
    x: Array,
    noise: Noise,
    integrator: Integrator,
    rules: Sequence[Rule],
    lower_order_final: bool,
) -> Iterator[Step]:
    """One network call a step; rules[p - 1] is used with p points. Orders ramp up 1, 2, 3, ..."""
    lower_final = lower_order_final and len(times) - 1 < FEW_STEPS
    past: list[Point] = []
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        past = [integrator.point(i, x, x0), *past][: len(rules)]
        p = integrator.points(i, len(rules), lower_final)
        x = integrator.step(x, i + 1, past[:p], rules[p - 1], noise)
        yield Step(i, x, x0)


def singlestep(
    denoise: Denoise,
    times: Array,
    x: Array,
    noise: Noise,
    integrator: Integrator,
    rules: Sequence[Sequence[Rule]],
) -> Iterator[Step]:
    """One state a block of network calls. rules[p - 1] are those of a block of p calls: one for each call after the
    first, at the grid's own times, and the last for the block's end."""
    start = 0
    for index, p in enumerate(blocks(integrator, len(rules))):
        points: list[Point] = []
        u = x
        for j, rule in enumerate(rules[p - 1]):
            x0 = denoise(u, float(times[start + j]))
            points.append(integrator.point(start + j, u, x0))
            u = integrator.step(x, start + j + 1, points, rule, noise)
        x, start = u, start + p
        yield Step(index, x, x0)


def blocks(integrator: Integrator, order: int) -> list[int]:
    """The orders of the blocks that use the grid's calls up, as in DPM-Solver-fast (Lu et al. 2022).

    A step from lam = -inf or onto lam = inf is a block of its own.
    """
    last = len(integrator.lam) - 2
    head = [1] * min(last, sum(map(math.isinf, integrator.lam[:-1])))
    calls = last + 1 - len(head)
    if order == 3 and calls % 3 == 0:
        split = [3] * (calls // 3 - 1) + [2, 1]
    else:
        split = [order] * (calls // order) + [calls % order] * (calls % order > 0)
    if split[-1] > 1 and not integrator.finite(last, last + 1):
        split[-1:] = [split[-1] - 1, 1]
    return head + split

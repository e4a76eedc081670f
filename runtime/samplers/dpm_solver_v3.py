"""DPM-Solver-v3: an exponential integrator whose linear part is measured on the model. Zheng et al. 2023
<arXiv:2310.13268>."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import PlanError
from ..process import Array, Process
from .exponential import Integrator, Point, divided_differences, first, gauss_legendre, solve
from .step import Denoise, Noise, Step


@dataclass(frozen=True)
class Statistics:
    """The model's linear part l and scaling s (two of the paper's "EMS") as functions of lam, averaged over elements.

    Piecewise linear between the given lam, constant beyond. l = 1, s = 0 is DPM-Solver++; l = 0, s = -1 is DPM-Solver.
    To measure them, with x noised data and y = x/alpha moving along the flow, dy/dlam = -(sigma/alpha) eps:

        l = E[diag d(sigma eps)/dx],  f = (sigma eps - l x)/alpha,  s = E[f df/dlam] / E[f^2]

    The paper's bias b is left out, since a constant image is no combination of predictions; hence no means in s.
    """

    lam: tuple[float, ...] = (0.0,)
    """Rising."""
    l: tuple[float, ...] = (1.0,)  # noqa: E741 - the paper's letter
    s: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        sizes = {len(self.lam), len(self.l), len(self.s)}
        if len(sizes) != 1 or 0 in sizes or np.any(np.diff(self.lam) <= 0):
            raise PlanError(
                f"statistics of lengths {len(self.lam)}, {len(self.l)}, {len(self.s)}",
                expected="lam rising, with an l and an s for each",
            )

    def integral(self, values: Sequence[float], lam: ArrayLike) -> Array:
        """The integral of l or s up to each lam, from the first knot."""
        x, y = np.array(self.lam), np.array(values)
        at = np.asarray(lam, dtype=np.float64)
        inside = np.clip(at, x[0], x[-1])
        k = np.clip(np.searchsorted(x, inside, side="right") - 1, 0, None)
        area = np.concatenate([[0.0], np.cumsum(np.diff(x) * (y[1:] + y[:-1]) / 2)])
        trapezoid = (inside - x[k]) * (y[k] + np.interp(inside, x, y)) / 2
        return np.asarray(area[k] + trapezoid + (at - inside) * np.interp(at, x, y))


def dpm_solver_v3(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    statistics: Statistics = Statistics(),
    order: int = 2,
    corrector: bool = True,
    pseudo: bool = False,
    pseudo_corrector: bool = False,
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """DPM-Solver-v3, multistep. Zheng et al. 2023 <arXiv:2310.13268>.

        f = (sigma eps - l x) / alpha,  L, S the integrals of l, s,  g_i = e^(S_s - S_i) f_i
        x_t = alpha_t/alpha_s e^(L_s - L_t) x_s - alpha_t e^(L_s - L_t) int_s^t e^(L + S - L_s - S_s) g dlam

    g is the polynomial in lam through the latest `order` points. The corrector, free of network calls, does the same
    through the new point and the latest order - 1; the corrected state keeps the f it was computed from.

    order   1 to 3; the paper takes 2 with guidance, 3 without
    pseudo, pseudo_corrector   derivatives from divided differences, each from as few points as it needs, for the fewest
            calls; the corrector then keeps all `order` latest points
    """
    if order not in (1, 2, 3):
        raise PlanError(f"DPM-Solver-v3 of order {order}", expected="1, 2 or 3")
    integrator = Integrator.of(process, times)
    alpha, l = integrator.alpha, np.interp(integrator.lam, statistics.lam, statistics.l)  # noqa: E741
    kept, weights = _coefficients(integrator, statistics)
    past: list[Point] = []
    p, predicted = 0, [0.0]
    for i, t in enumerate(times[:-1]):
        x0 = denoise(x, float(t))
        f = x0 if l[i] == 1 or alpha[i] == 0 else x0 - (1 - l[i]) / alpha[i] * x  # -f, so that l = 1 reads x0
        new = Point(i, x0, f)
        if corrector and p + pseudo_corrector > 1 and integrator.finite(i - 1, i):
            used = [past[0], new, *past[1:p]][: p + pseudo_corrector]
            x = _add(x, weights(i, used, pseudo_corrector), used)
            x = _add(x, [-w for w in predicted], past[:p])
        past = [new, *past][:order]
        p = integrator.points(i, order, lower_order_final)
        if integrator.finite(i, i + 1):
            predicted = weights(i + 1, past[:p], pseudo)
            x = _add(kept[i] * x, predicted, past[:p])
        else:
            x = integrator.step(x, i + 1, past[:1], first, noise)
        yield Step(i, x, x0)


def _add(x: Array, weights: Sequence[float], points: Sequence[Point]) -> Array:
    for w, point in zip(weights, points, strict=True):
        x = x + w * point.q
    return x


def _coefficients(
    integrator: Integrator, statistics: Statistics
) -> tuple[list[float], Callable[[int, Sequence[Point], bool], list[float]]]:
    """What each step keeps of x, and weights(t, points, pseudo) of -f in a step from the first point to time t."""
    lam = np.array([v if np.isfinite(v) else 0.0 for v in integrator.lam])  # no step uses the others
    h = np.diff(lam)
    L, S = statistics.integral(statistics.l, lam), statistics.integral(statistics.s, lam)
    nodes, w = gauss_legendre(24)  # beyond float64 for steps of a few units of lam
    within = lam[:-1, None] + h[:, None] * nodes
    exponent = statistics.integral(statistics.l, within) + statistics.integral(statistics.s, within)
    exponent -= (S[:-1] + L[1:])[:, None]
    moments = (h[:, None] * w * np.exp(exponent)) @ (nodes[:, None] ** np.arange(4))
    with np.errstate(divide="ignore"):
        kept = np.array(integrator.alpha[1:]) / integrator.alpha[:-1] * np.exp(L[:-1] - L[1:])

    def weights(t: int, points: Sequence[Point], pseudo: bool) -> list[float]:
        j = [point.i for point in points]
        r, moment = (lam[j] - lam[t - 1]) / h[t - 1], moments[t - 1, : len(j)]
        found = moment @ divided_differences(r) if pseudo else solve(r, moment)
        return list((integrator.alpha[t] * np.exp(S[t - 1] - S[j]) * found).tolist())

    return kept.tolist(), weights

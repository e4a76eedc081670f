"""Align Your Steps: the grid whose frozen denoiser strays least, by a bound. Sabour et al. 2024 <arXiv:2404.14507>.

In the frame of x / alpha with noise level s = sigma / alpha, the bound on the divergence between the true process and
the one whose denoiser is frozen over each interval is (their KLUB)

    sum_i 2 int_{s_i-1}^{s_i} s^-3 E |D(x_s, s) - D(x_{s_i}, s_i)|^2 ds,    x_s = x0 + s z,  x_{s_i} = x_s + noise

with x0 from the data, here the reference's samples. Each integral is taken at the quantiles of a density of that
shape; fixed noises make the sum a plain function of the grid, and coordinate descent lowers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from ..runtime.errors import PlanError
from ..runtime.grids.levels import lowest
from ..runtime.plan import Plan, plan
from ..runtime.process import Array
from ..runtime.progress import Progress
from ..runtime.samplers import SAMPLERS
from .problem import Problem
from .search import (
    FIXED_SAMPLERS,
    Candidate,
    Found,
    Search,
    found_or_fixed,
    ranked_fixed,
    recall,
    remember,
)

__all__ = ["Bound", "grid_plan", "halved"]

COARSE = 10
"""Knots that are optimised first; finer grids split those and move only the new ones (their section 3.3)."""
QUANTILES = 4
"""Noise levels an interval's integral is taken at."""
SWEEPS = 12
"""Passes over all knots, at most; each is one of their iterations for every knot."""
CANDIDATES = (-0.4, -0.15, 0.15, 0.4)
"""Where a knot may move: shares of the way, in log s, to its neighbour on that side."""


@dataclass
class Bound:
    """The bound of a grid, interval by interval, with noises drawn once."""

    problem: Problem
    seed: int = 0
    samples: int = 16
    _known: dict[tuple[float, float], float] = field(default_factory=dict)

    def total(self, levels: Array) -> float:
        """levels  [knots] falling noise levels sigma / alpha"""
        return sum(self.interval(float(b), float(a)) for a, b in pairwise(levels))

    def interval(self, low: float, high: float) -> float:
        """2 int_low^high s^-3 E |D(x_s, s) - D(x_high, high)|^2 ds"""
        if (low, high) not in self._known:
            problem = self.problem
            which = problem.fitted[: self.samples]
            x0 = problem.targets[which]
            rng = np.random.default_rng(self.seed)
            z = rng.standard_normal((QUANTILES, 2, *x0.shape)).astype(x0.dtype)
            s, weight = density(low, high, float(np.std(x0)))
            clean = [x0 + float(a) * z[k, 0] for k, a in enumerate(s)]
            further = np.sqrt(high**2 - s**2)
            noisy = [x + float(further[k]) * z[k, 1] for k, x in enumerate(clean)]
            frozen = self._denoise(np.concatenate(noisy), high, np.tile(which, QUANTILES))
            total = 0.0
            for k, part in enumerate(np.split(frozen, QUANTILES)):
                gap = self._denoise(clean[k], float(s[k]), which) - part
                total += weight[k] * float(np.mean(np.square(gap, dtype=np.float64)))
            self._known[low, high] = total
        return self._known[low, high]

    def _denoise(self, y: Array, level: float, which: Array) -> Array:
        """y = x / alpha at this noise level."""
        process = self.problem.process
        t = float(process.t_of_lam(-np.log(level)))
        [call] = self.problem.rows([t, 0.0])
        return self.problem.x0(y * float(process.alpha(t)), call, which)


def density(low: float, high: float, c: float) -> tuple[Array, Array]:
    """Levels at the quantiles of pi(s) ~ s^-3 (1/(s^2 + c^2) - 1/(high^2 + c^2)), and what each counts for, with which
    a sum over them is 2 int s^-3 f(s) ds. c is the spread of the data (their equation 14)."""
    edges = np.exp(np.linspace(np.log(low), np.log(high), 257))  # so many cells are exact to four digits
    middle = np.sqrt(edges[:-1] * edges[1:])
    mass = middle**-3 * (1 / (middle**2 + c**2) - 1 / (high**2 + c**2)) * np.diff(edges)
    share = np.cumsum(mass) / mass.sum()
    s = np.interp((np.arange(QUANTILES) + 0.5) / QUANTILES, share, middle)
    shape = 1 / (s**2 + c**2) - 1 / (high**2 + c**2)
    return s, 2 * mass.sum() / (QUANTILES * shape)


def halved(levels: Array) -> Array:
    """A knot more in the middle of each interval, in log s."""
    out = np.empty(2 * len(levels) - 1)
    out[::2], out[1::2] = levels, np.sqrt(levels[:-1] * levels[1:])
    return out


def grid_plan(search: Search) -> Iterator[Progress | Found]:
    """The grid by the bound, and the fixed sampler that does best on it.

    The bound is not the error, so after every sweep the grid is tried, and the descent ends when it got worse twice.
    """
    problem, calls = search.problem, search.calls
    ranked = yield from ranked_fixed(search)
    bound = Bound(problem, search.seed)
    state = recall(search.state)
    levels = np.array(state["levels"]) if state else arctan_levels(problem, min(calls, COARSE))
    stage, sweep = state.get("stage", 0), state.get("sweep", 0)
    best, worse = state.get("best"), state.get("worse", 0)
    wanted = max(0, int(np.ceil(np.log2(calls / COARSE)))) + 1
    while stage < wanted:
        movable = range(1, len(levels) - 1, 1 if stage == 0 else 2)
        before = bound.total(levels)
        levels = descend(bound, levels, movable)
        after = bound.total(levels)
        tried = best_on(problem, between(levels, calls))
        if best is None or tried.rmse < best["rmse"]:
            best, worse = {"rmse": tried.rmse, "levels": levels.tolist()}, 0
        else:
            worse += 1
        sweep += 1
        if worse >= 2 or sweep >= SWEEPS or after > before * (1 - 1e-3):
            stage, sweep, worse = stage + 1, 0, 0
            levels = np.array(best["levels"])
            if stage < wanted:
                levels, best = halved(levels), None
        saved = {"levels": levels.tolist(), "stage": stage, "sweep": sweep, "best": best, "worse": worse}
        remember(search.state, saved)
        note = f"bound {after:.4g}, {tried.plan.sampler} RMSE {tried.rmse:.4g}"
        yield Progress("grid", min(1.0, (stage + sweep / SWEEPS) / wanted), note)
    chosen = best_on(problem, between(levels, calls))
    details = {"levels": levels.tolist(), "sampler": chosen.plan.sampler, "bound": bound.total(levels)}
    yield found_or_fixed(search, chosen.plan, ranked, details)


def descend(bound: Bound, levels: Array, movable: Any) -> Array:
    """One pass of coordinate descent over the knots that may move."""
    levels = levels.copy()
    for i in movable:
        a, b, c = (float(value) for value in levels[i - 1 : i + 2])
        options = [b] + [
            float(b * (a / b) ** -share if share < 0 else b * (c / b) ** share) for share in CANDIDATES
        ]
        costs = [bound.interval(value, a) + bound.interval(c, value) for value in options]
        levels[i] = options[int(np.argmin(costs))]
    return levels


def arctan_levels(problem: Problem, calls: int) -> Array:
    """The optimum for Gaussian data: even in arctan(s / c), c its spread (their appendix A)."""
    high, low = _ends(problem)
    c = float(np.std(problem.targets[problem.fitted]))
    return np.asarray(c * np.tan(np.linspace(np.arctan(high / c), np.arctan(low / c), calls)))


def between(levels: Array, calls: int) -> Array:
    """So many knots, by interpolation of log s."""
    where = np.linspace(0, len(levels) - 1, calls)
    return np.asarray(np.exp(np.interp(where, np.arange(len(levels)), np.log(levels))))


def best_on(problem: Problem, levels: Array) -> Candidate:
    """The fixed sampler that does best on these levels, judged by the fitted starts."""
    times = np.append(problem.process.t_of_lam(-np.log(levels)), 0.0)
    times[0] = problem.process.t_max
    found = []
    for sampler in FIXED_SAMPLERS:
        if sampler in SAMPLERS:
            made: Plan = problem.shipped(
                plan(sampler, len(levels), problem.process, times, prediction=problem.prediction)
            )
            if len(made.calls) == len(levels):
                found.append(Candidate(made, "searched", problem.score(made, problem.fitted).rmse))
    return min(found, key=lambda candidate: candidate.rmse)


def _ends(problem: Problem) -> tuple[float, float]:
    process = problem.process
    if float(process.alpha(process.t_max)) <= 0:
        raise PlanError(
            "a grid search on a process that starts at alpha 0",
            expected="a process with some signal at its noisiest time",
            fix="use --method learned or evolution",
        )
    times = np.array([process.t_max, lowest(process)])
    high, low = process.sigma(times) / process.alpha(times)
    return float(high), float(low)

"""DC-Solver's ratios, searched for the model at hand. Zhao et al. 2024 <arXiv:2409.03755>, algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, MissingExtra
from ..runtime.plan import Call, Plan
from ..runtime.process import Array
from ..runtime.progress import Progress
from ..runtime.samplers.unipc import unipc
from ..runtime.times import make_times
from .problem import Problem, spread
from .search import FIXED_GRIDS, Found, Search, found_or_fixed, ranked_fixed

__all__ = ["BOUNDS", "compensated_plan", "ratios_of"]

BOUNDS = (0.3, 1.7)
"""Ratios outside these were never useful on Stable Diffusion; the parabola extrapolates too far."""


def compensated_plan(search: Search) -> Iterator[Progress | Found]:
    """UniPC on the grid that suits it best, with a ratio for every step from the third on."""
    try:
        from scipy.optimize import minimize_scalar
    except ModuleNotFoundError:
        raise MissingExtra.of("scipy", "tune") from None
    if search.calls < 3:
        raise BadInput(f"{search.calls} calls", expected="at least 3: a ratio needs three predictions")
    problem = search.problem
    ranked = yield from ranked_fixed(search)
    times, order = _grid(problem, search.calls)
    yield Progress("compensation", 0.1, f"UniPC of order {order}")
    ratios = [1.0] * search.calls
    cache: list[Array] = []
    for i in range(search.calls):
        advance(problem, times, order, ratios, cache, i)
        if i < 2:
            continue

        def error(ratio: float, i: int = i) -> float:
            tried = [*ratios[:i], ratio, *ratios[i + 1 :]]
            return step_error(problem, times, order, tried, cache, i)

        best = minimize_scalar(error, bounds=BOUNDS, method="bounded", options={"xatol": 1e-4})
        if best.fun < error(1.0):
            ratios[i] = float(best.x)
        yield Progress("compensation", 0.1 + 0.9 * (i + 1) / search.calls, f"step {i + 1}: {ratios[i]:.3f}")
    made = ratios_of(problem, times, order, ratios)
    yield found_or_fixed(search, made, ranked, {"order": order, "ratios": ratios, "times": times.tolist()})


def ratios_of(problem: Problem, times: Array, order: int, ratios: Sequence[float]) -> Plan:
    """UniPC's plan with these ratios, without a corrector at the first step as the paper has it."""
    sampler = partial(unipc, order=order, ratios=tuple(ratios), disable_corrector=(0,))
    traced = Plan.trace(sampler, problem.process, times, prediction=problem.prediction, name="dc_solver")
    return problem.shipped(traced)


def advance(
    problem: Problem, times: Array, order: int, ratios: Sequence[float], cache: list[Array], i: int
) -> None:
    """Ask the network for call i, on the state that the ratios so far lead to, and remember what it says."""
    calls: list[Any] = []

    def predict(x: Array, call: Call, which: Array) -> Array:
        if len(calls) == len(cache):
            cache.append(problem.x0(x, call, which))
        calls.append(call)
        return cache[len(calls) - 1]

    _until(problem, predict, ratios_of(problem, times, order, ratios), i)


def step_error(
    problem: Problem, times: Array, order: int, ratios: Sequence[float], cache: Sequence[Array], i: int
) -> float:
    """Mean squared distance of the state after step i from the reference, from remembered predictions alone."""
    known = iter(cache)
    x = _until(problem, lambda x, call, which: next(known), ratios_of(problem, times, order, ratios), i)
    which, t = problem.fitted, float(times[i + 1])
    if problem.trajectory is None or i == len(times) - 2:
        target = problem.targets[which]
    else:
        target = problem.trajectory.unit(t, which) * spread(problem.process, t)
    return float(np.mean(np.square(x - target, dtype=np.float64)))


def _until(problem: Problem, predict: Any, plan: Plan, i: int) -> Array:
    """The state after step i, with the fitted starts in one batch."""
    whole = replace(problem, predict=predict, batch=problem.fit)
    for step in whole.run(plan, problem.fitted):
        if step.index == i:
            return step.x
    raise AssertionError("a plan has as many steps as it has times, less one")


def _grid(problem: Problem, calls: int) -> tuple[Array, int]:
    """The grid and order on which plain UniPC is best."""
    found: list[tuple[float, str, int]] = []
    for grid in FIXED_GRIDS:
        for order in (2, 3):
            try:
                times = make_times(grid, calls, problem.process)
                made = ratios_of(problem, times, order, [1.0] * calls)
            except BadInput:
                continue
            found.append((problem.score(made, problem.fitted).rmse, grid, order))
    _, grid, order = min(found)
    return make_times(grid, calls, problem.process), order

"""DPM-Solver-v3 with the statistics of the model at hand, on the grid and with the options that suit it best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

import numpy as np

from ..runtime.errors import FewstepError, PlanError
from ..runtime.plan import Plan
from ..runtime.progress import Progress
from ..runtime.samplers.dpm_solver_v3 import Statistics, dpm_solver_v3
from ..runtime.times import make_times
from .problem import Problem, spread
from .search import FIXED_GRIDS, Found, Search, found_or_fixed, ranked_fixed
from .statistics import Measurement, measure

__all__ = ["Variant", "measured_plan", "v3_plan", "variants"]

GUIDE = 0.2
"""Weight of the states on the way, as in fit.py. Few starts do not show which plans lose their way: on
benchmarks/mixture.py, plans chosen by the final states of 24 alone leave errors on other starts 1.1, 1.5, 2.6 and 3.8
times as large, at 5, 8, 10 and 20 calls. For networks that lose it less 0.3 is too much already."""


@dataclass(frozen=True)
class Variant:
    """A plan with these options, and its error on the fitted starts: the root of the mean square at the end and, times
    GUIDE, on the way."""

    plan: Plan
    grid: str
    order: int
    corrector: bool
    pseudo: bool
    error: float


def v3_plan(
    problem: Problem,
    statistics: Statistics,
    calls: int,
    grids: Sequence[str] = FIXED_GRIDS,
    finalists: int = 2,
) -> Plan:
    """The best of `variants`. Raises PlanError where there is none."""
    return _best(variants(problem, statistics, calls, grids, finalists), calls).plan


def variants(
    problem: Problem,
    statistics: Statistics,
    calls: int,
    grids: Sequence[str] = FIXED_GRIDS,
    finalists: int = 2,
) -> Iterator[Variant]:
    """Second order with corrector on every grid; then, on the `finalists` best of them, orders 2 and 3, with and
    without corrector and pseudo order. Grids that cannot serve this process, and plans that overflow, are left out."""
    first = [v for grid in grids for v in _variant(problem, statistics, calls, grid, 2, True, False)]
    yield from first
    for best in sorted(first, key=lambda variant: variant.error)[:finalists]:
        for order, corrector, pseudo in product((2, 3), (True, False), (False, True)):
            known = (
                (2, True, False),
                (2, False, True),
            )  # the second is (2, False, False): two points have one slope
            if (order, corrector, pseudo) not in known:
                yield from _variant(problem, statistics, calls, best.grid, order, corrector, pseudo)


def measured_plan(search: Search, *, how: Measurement = Measurement()) -> Iterator[Progress | Found]:  # noqa: B008
    """DPM-Solver-v3 with measured statistics. These are kept beside the search's state, for any number of calls."""
    problem = search.problem
    ranked = yield from ranked_fixed(search)
    statistics, found = Statistics(), list[Variant]()
    for measured in measure(
        problem, how, None if search.state is None else search.state.with_name("statistics.json")
    ):
        if isinstance(measured, Statistics):
            statistics = measured
        else:
            yield Progress(measured.stage, 0.7 * (measured.fraction or 0.0), measured.note)
    for variant in variants(problem, statistics, search.calls):
        found.append(variant)
        yield Progress(
            "variants", 0.7 + 0.3 * min(len(found) / 18, 1.0), f"{variant.grid}: {variant.error:.4g}"
        )
    best = _best(found, search.calls)
    details = {name: value for name, value in vars(best).items() if name not in ("plan", "error")}
    columns = {name: list(column) for name, column in asdict(statistics).items()}
    yield found_or_fixed(search, best.plan, ranked, {**details, "statistics": columns})


def _best(found: Sequence[Variant] | Iterator[Variant], calls: int) -> Variant:
    best = min(found, key=lambda variant: variant.error, default=None)
    if best is None:
        raise PlanError(f"no grid gives DPM-Solver-v3 {calls} calls on this process", fix="name other grids")
    return best


def _variant(
    problem: Problem,
    statistics: Statistics,
    calls: int,
    grid: str,
    order: int,
    corrector: bool,
    pseudo: bool,
) -> Iterator[Variant]:
    """One or none."""
    sampler = partial(
        dpm_solver_v3,
        statistics=statistics,
        order=order,
        corrector=corrector,
        pseudo=pseudo,
        pseudo_corrector=pseudo,
    )
    try:
        times = make_times(grid, calls, problem.process)
        traced = Plan.trace(
            sampler, problem.process, times, prediction=problem.prediction, name="dpm_solver_v3"
        )
        plan = problem.shipped(traced)
        with np.errstate(over="ignore", invalid="ignore"):
            error = _error(problem, plan)
    except FewstepError:
        return
    if np.isfinite(error):
        yield Variant(plan, grid, order, corrector, pseudo, error)


def _error(problem: Problem, plan: Plan) -> float:
    which, total = problem.fitted, 0.0
    for step, following in zip(problem.run(plan, which), [*plan.calls[1:], None], strict=True):
        if following is None:
            total += float(np.mean(np.square(step.x - problem.targets[which], dtype=np.float64)))
        elif problem.trajectory is not None:
            near = step.x / spread(problem.process, following.t) - problem.trajectory.unit(following.t, which)
            total += GUIDE**2 * float(np.mean(np.square(near, dtype=np.float64)))
    return float(np.sqrt(total))

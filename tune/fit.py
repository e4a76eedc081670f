"""Fitting a learned plan with nothing but the network as it ships: Levenberg-Marquardt, differences for derivatives.

What is minimised over the fitted starts:

    |x_K - target|^2 + guide^2 * sum_i |x_i / spread_i - reference(t_i) / spread_i|^2

The second sum holds the states on the way to the reference's trajectory. Without it few starts say little about the
early states (later steps forgive their errors) and the fit has many minima; with guide = 1 nearly every beginning
leads to the same one, so the fit starts there and lets go step by step. A perturbed late weight repeats only the calls
after it, and perturbed copies share batches: a round costs about K^3 / 6 calls a start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..runtime.errors import FewstepError
from ..runtime.plan import Plan
from ..runtime.process import Array, Process
from ..runtime.process import lam as log_snr
from .learned import Coordinates
from .problem import Problem, spread

__all__ = ["GUIDES", "Fit", "begin", "fit", "race", "winner"]

GUIDES = (1.0, 0.3, 0.1, 0.03)
"""Falling by threes. On the mixture of benchmarks/mixture.py nearly every beginning leads to one minimum this way."""

ROUNDS = 25
"""Most rounds at each guide; 10 to 15 are usual."""

TOLERANCE = 1e-3
"""A round that lowers the loss by less than this share ends its stage."""


FIRST_DAMPING = 1e-3
"""Marquardt 1963 starts at 1e-2; the beginnings here are better than his."""

RACE_ROUNDS = 8
"""After so many rounds at the first guide, beginnings that lead to the lesser minima are clearly behind."""


@dataclass(frozen=True)
class Fit:
    """Where a fit stands: everything that is needed to go on from here."""

    vector: tuple[float, ...]
    damping: float = FIRST_DAMPING
    stage: int = 0
    """Which of the guides."""
    round: int = 0
    """Within the stage."""
    done: bool = False
    best: tuple[float, ...] = ()
    """The vector with the least error on the starts held out."""
    held_out: float = float("inf")
    """Its root mean squared error there."""
    fitted: float = float("inf")
    """The root mean squared error of `vector` on the fitted starts."""
    loss: float = float("inf")
    """What was minimised, after the last round."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Fit:
        return cls(**{**data, "vector": tuple(data["vector"]), "best": tuple(data["best"])})


def begin(problem: Problem, at: Coordinates, vector: Array) -> Fit:
    vector = at.project(vector)
    start = tuple(float(value) for value in vector)
    rmse = problem.score(at.plan(problem, vector), problem.held_out).rmse
    return Fit(start, best=start, held_out=rmse)


def fit(problem: Problem, at: Coordinates, state: Fit, guides: Sequence[float] = GUIDES) -> Iterator[Fit]:
    """Go on from `state` to the end, yielding the state after every round.

    Each round depends on the state alone, so an interrupted fit goes on exactly as it would have.
    """
    if problem.trajectory is None:
        guides = (0.0,)
    while not state.done:
        state = _round(problem, at, state, guides)
        yield state


def race(
    problem: Problem, at: Coordinates, runners: list[Fit], guides: Sequence[float] = GUIDES
) -> Iterator[list[Fit]]:
    """A few rounds from each beginning; yields all of them after every round. `winner` says which one to go on from."""
    if problem.trajectory is None:
        guides = (0.0,)
    for k in range(len(runners)):
        while runners[k].stage == 0 and runners[k].round < RACE_ROUNDS and not runners[k].done:
            runners = [*runners[:k], _round(problem, at, runners[k], guides), *runners[k + 1 :]]
            yield runners


def winner(runners: Sequence[Fit]) -> Fit:
    """The one with the least loss at the first guide, with the best vector any of them met."""
    best = min(runners, key=lambda state: state.held_out)
    first = min(runners, key=lambda state: state.loss)
    return replace(first, best=best.best, held_out=best.held_out)


def _round(problem: Problem, at: Coordinates, state: Fit, guides: Sequence[float]) -> Fit:
    guide, vector, damping = guides[state.stage], np.array(state.vector), state.damping
    gram, slope, before = normal_equations(problem, at, vector, guide)
    scale = np.diag(gram) + 1e-12 * np.trace(gram) + 1e-30  # also where a parameter moves nothing
    for _ in range(12):  # quadrupled so often, the damping leaves no step worth taking
        step = np.linalg.solve(gram + damping * np.diag(scale), -slope)
        moved = at.project(vector + step)
        after, plan = loss(problem, at, moved, guide)
        if after < before:
            break
        damping *= 4
    else:
        return _next_stage(replace(state, loss=before), guides)
    assert plan is not None, "a plan without a table has no loss to be less"
    state = replace(
        state, vector=tuple(moved.tolist()), damping=max(damping / 4, 1e-9), round=state.round + 1
    )
    ended = after > (1 - TOLERANCE) * before or state.round >= ROUNDS
    rmse = problem.score(plan, problem.held_out).rmse
    fitted = problem.score(plan, problem.fitted).rmse
    if rmse < state.held_out:
        state = replace(state, best=state.vector, held_out=rmse)
    state = replace(state, fitted=fitted, loss=after)
    return _next_stage(state, guides) if ended else state


def _next_stage(state: Fit, guides: Sequence[float]) -> Fit:
    if state.stage + 1 == len(guides):
        return replace(state, done=True)
    return replace(state, damping=FIRST_DAMPING, stage=state.stage + 1, round=0)


def loss(problem: Problem, at: Coordinates, vector: Array, guide: float) -> tuple[float, Plan | None]:
    """What is minimised, and the plan; infinite where times are out of order or a state leaves the numbers."""
    which, total = problem.fitted, 0.0
    try:
        plan = at.plan(problem, vector)
        times, _ = at.decode(vector)
        for begin in range(0, len(which), problem.batch):
            part = which[begin : begin + problem.batch]
            for step in problem.run(plan, part):
                t, last = float(times[step.index + 1]), step.index + 1 == at.calls
                if last or (guide != 0 and problem.trajectory is not None):
                    wanted = _wanted(problem, t, last, part)
                    total += float(np.sum(np.square(_distance(problem, step.x, t, last, wanted, guide))))
    except FewstepError:
        return np.inf, None
    return total, plan


def _wanted(problem: Problem, t: float, last: bool, which: Array) -> Array:
    """Where the reference is at time t: the target at the end, on the way its state over its spread."""
    if last:
        return np.asarray(problem.targets[which])
    assert problem.trajectory is not None, "without trajectories only the end is compared"
    return problem.trajectory.unit(t, which)


def _distance(problem: Problem, x: Array, t: float, last: bool, wanted: Array, guide: float) -> Array:
    away = x - wanted if last else guide * (x / spread(problem.process, t) - wanted)
    return np.asarray(away, dtype=np.float64)


def normal_equations(
    problem: Problem, at: Coordinates, vector: Array, guide: float
) -> tuple[Array, Array, float]:
    """J'J [p, p], J'r [p] and r'r of the residuals r, over the fitted starts."""
    steps = difference_steps(problem, at, vector)
    tables = [at.decode(vector), *(at.decode(vector + step) for step in np.diag(steps))]
    gram, slope, total = np.zeros((at.size, at.size)), np.zeros(at.size), 0.0
    chunk = max(1, problem.batch // len(tables))  # so that all copies of its starts fit into one batch
    for begin in range(0, len(problem.fitted), chunk):
        part = problem.fitted[begin : begin + chunk]
        for i, copies in enumerate(_sweep(problem, at, tables, part), start=1):
            if i < at.calls and (guide == 0 or problem.trajectory is None):
                continue
            references: dict[float, Array] = {}  # most copies share their time with the base
            rows = []
            for c, x in copies.items():
                t = float(tables[c][0][i])
                if t not in references:
                    references[t] = _wanted(problem, t, i == at.calls, part)
                rows.append(np.ravel(_distance(problem, x, t, i == at.calls, references[t], guide)))
            residual, moved = rows[0], [c - 1 for c in copies if c > 0]
            jacobian = (np.reshape(rows[1:], (-1, residual.size)) - residual) / steps[moved, None]
            gram[np.ix_(moved, moved)] += jacobian @ jacobian.T
            slope[moved] += jacobian @ residual
            total += float(residual @ residual)
    return gram, slope, total


def difference_steps(problem: Problem, at: Coordinates, vector: Array) -> Array:
    """[p] how far each parameter is moved: the root of float64's precision, or, for float32 networks (and quantized
    ones, which are not even smooth), far enough to rise above their rounding. Times move towards noise, since the
    cleanest may stand at its limit; with whole timesteps, by whole levels."""
    double = problem.starts.dtype == np.float64
    steps = np.full(at.size, 1e-6 if double else 1e-3)
    times, _ = at.decode(vector)
    for k, (earlier, t) in enumerate(pairwise(times[:-1])):
        if problem.whole_timesteps:
            moved = t + min(2.0, (earlier - t) / 2)
            steps[k] = float(log_snr(at.process, moved)) - float(log_snr(at.process, t))
        else:
            gap = float(log_snr(at.process, t)) - float(log_snr(at.process, earlier))
            steps[k] = -min(steps[k], gap / 2)
    return steps


def _sweep(
    problem: Problem, at: Coordinates, tables: Sequence[tuple[Array, Array]], which: Array
) -> Iterator[dict[int, Array]]:
    """The states after each step, by table. Table 0 is the base, table 1 + k differs from it in parameter k; one that
    does not differ yet is left out."""
    times, _ = tables[0]
    rows = problem.rows(times)
    x = {0: problem.starts[which] * spread(at.process, float(times[0]))}
    seen: list[dict[int, Array]] = []
    for i in range(at.calls):
        shared = [c for c in x if c == 0 or tables[c][0][i] == times[i]]
        predicted = problem.x0(np.concatenate([x[c] for c in shared]), rows[i], np.tile(which, len(shared)))
        d = dict(zip(shared, np.split(predicted, len(shared)), strict=True))
        for c in x.keys() - d.keys():
            row = problem.rows(np.array([tables[c][0][i], at.end]))[0]
            d[c] = problem.x0(x[c], row, which)
        seen.append(d)
        live = [0, *(1 + k for k in range(at.size) if at.first(k) <= i + 1)]
        x = {c: _step(tables[c], i, x.get(c, x[0]), [s.get(c, s[0]) for s in seen], at.process) for c in live}
        yield x


def _step(table: tuple[Array, Array], i: int, x: Array, seen: Sequence[Array], process: Process) -> Array:
    times, weights = table
    sigma = process.sigma(times[i : i + 2])
    x = x * float(sigma[1] / sigma[0])
    for j, x0 in enumerate(seen):
        if weights[i, j] != 0:
            x = x + x0 * float(weights[i, j])
    return x

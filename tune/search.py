"""The searches by name, what they share, and what they give back: an ordinary plan and how good it is."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, PlanError
from ..runtime.files import atomic_write
from ..runtime.plan import Plan, plan
from ..runtime.progress import Progress
from ..runtime.samplers import SAMPLERS
from ..runtime.times import GRIDS
from .fit import GUIDES, RACE_ROUNDS, ROUNDS, Fit, begin, fit, race, winner
from .learned import Coordinates, table_of
from .problem import Problem, Score

__all__ = [
    *("Candidate", "Found", "Search", "fixed_plans", "found_or_fixed", "learned_plan"),
    *("ranked_fixed", "recall", "remember"),
]

FIXED_SAMPLERS = ("ddim", "dpmpp_2s", "dpmpp_2m", "dpmpp_3s", "dpmpp_3m_exact", "unipc", "unipc_3", "ipndm")
FIXED_GRIDS = ("trailing", "linspace", "karras", "logsnr", "arctan", "ays_sdxl")
"""Between them they hold the best or nearly the best of all at every number of calls, without guidance
(benchmarks/mixture.py) and with it (benchmarks/sampler_quality.py: singlestep ones at few calls)."""

HISTORY = 10
"""Predictions a learned step may use, at most; with more the weights outnumber what 32 starts can tell."""


@dataclass(frozen=True)
class Search:
    """What every search is told."""

    problem: Problem
    calls: int
    seed: int = 0
    state: Path | None = None
    """A file the search keeps its state in, to go on after an interruption; None for none."""
    storage: str = ""
    """An optuna storage URL that many workers may share; used by the solver search."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.calls <= 50:
            raise BadInput(f"{self.calls} calls", expected="1 to 50: a search is for few calls")


@dataclass(frozen=True)
class Candidate:
    """A fixed plan and its error on the fitted starts."""

    plan: Plan
    grid: str
    rmse: float


@dataclass(frozen=True)
class Found:
    """The last event of a search."""

    plan: Plan
    score: Score
    """On the starts held out."""
    best_fixed: Score
    """The same of the best fixed plan the search knew."""
    fixed: str
    """Its sampler and grid."""
    details: Mapping[str, Any] = field(default_factory=dict)


def fixed_plans(problem: Problem, calls: int) -> Iterator[Candidate]:
    """Multistep samplers on time grids with exactly so many calls, as far as they can serve this process."""
    for grid in FIXED_GRIDS:
        for sampler in FIXED_SAMPLERS:
            if sampler not in SAMPLERS or grid not in GRIDS:
                continue
            try:
                made = plan(sampler, calls, problem.process, grid, prediction=problem.prediction)
            except PlanError:
                continue
            made = problem.shipped(made)
            rmse = problem.score(made, problem.fitted).rmse
            if len(made.calls) == calls and np.isfinite(rmse):
                yield Candidate(made, grid, rmse)


def ranked_fixed(search: Search) -> Generator[Progress, None, list[Candidate]]:
    """Try every fixed plan; returns them best first."""
    found: list[Candidate] = []
    total = len(FIXED_GRIDS) * len(FIXED_SAMPLERS)
    for candidate in fixed_plans(search.problem, search.calls):
        found.append(candidate)
        note = f"{candidate.plan.sampler} on {candidate.grid}: RMSE {candidate.rmse:.4g}"
        yield Progress("fixed plans", len(found) / total, note)
    if not found:
        raise PlanError(f"no fixed sampler makes {search.calls} calls on this process")
    return sorted(found, key=lambda candidate: candidate.rmse)


def learned_plan(
    search: Search, *, runners: int = 3, guides: tuple[float, ...] = GUIDES
) -> Iterator[Progress | Found]:
    """All times and weights free: see learned.py and fit.py.

    runners  beginnings that race for the first rounds, each a fixed plan on another grid
    """
    problem = search.problem
    ranked = yield from ranked_fixed(search)
    at = Coordinates(problem.process, search.calls, HISTORY)
    known = recall(search.state)
    kept: dict[str, Any] = {}

    def keep(**states: Any) -> None:
        kept.update(states)
        remember(search.state, kept)

    states = [Fit.from_json(data) for data in known.get("race", [])]
    states = states or [begin(problem, at, at.encode(*table)) for table in _tables(problem, ranked, runners)]
    for racing in race(problem, at, states, guides):
        states = racing
        keep(race=[state.to_json() for state in states])
        share = sum(state.round for state in states) / (RACE_ROUNDS * len(states))
        yield Progress("race", 0.3 * min(share, 1.0), _said(states))
    kept["race"] = [state.to_json() for state in states]
    state = Fit.from_json(known["fit"]) if "fit" in known else winner(states)
    for moved in fit(problem, at, state, guides):
        state = moved
        keep(fit=state.to_json())
        share = (state.stage + min(state.round / 12, 1.0)) / len(guides)
        yield Progress("fit", 0.3 + 0.4 * min(share, 1.0), _said([state]))
    kept["fit"] = state.to_json()
    # the last guide again, from the best vector each beginning met: which one leads furthest is seen at the end only.
    # Without any guide, 24 starts were learned by heart: four times the best fixed error on the mixture at 10 calls
    polished = [Fit.from_json(data) for data in known.get("polish", [])]
    for vector in list(dict.fromkeys([state.best, *(runner.best for runner in states)]))[len(polished) :]:
        for last in fit(problem, at, begin(problem, at, np.array(vector)), guides[-1:]):
            share = (len(polished) + min(last.round / ROUNDS, 1.0)) / (len(states) + 1)
            yield Progress("polish", 0.7 + 0.3 * min(share, 1.0), _said([*polished, last]))
        polished.append(last)
        keep(polish=[done.to_json() for done in polished])
    best = min(polished, key=lambda done: done.held_out)
    made = at.plan(problem, np.array(best.best))
    fitted = problem.score(made, problem.fitted).rmse
    details = {"guides": list(guides), "history": HISTORY, "fitted_rmse": fitted}
    yield found_or_fixed(search, made, ranked, details)


def _tables(problem: Problem, ranked: list[Candidate], count: int) -> list[tuple[Any, Any]]:
    """The best fixed plans that `learned` can take the steps of, each on another grid."""
    found: dict[str, tuple[Any, Any]] = {}
    for candidate in ranked:
        if candidate.grid not in found and len(found) < count:
            try:
                found[candidate.grid] = table_of(candidate.plan, problem.process)
            except PlanError:
                continue
    return list(found.values())


def _said(states: list[Fit]) -> str:
    best = min(state.held_out for state in states)
    return f"round {sum(state.round for state in states)}, held-out RMSE {best:.4g}"


def found_or_fixed(search: Search, made: Plan, ranked: list[Candidate], details: Mapping[str, Any]) -> Found:
    """The plan, or the best fixed one where the search did not beat it on the starts held out."""
    problem, best = search.problem, ranked[0]
    score = problem.score(made, problem.held_out)
    fixed = problem.score(best.plan, problem.held_out)
    if fixed.rmse < score.rmse:
        made, score = best.plan, fixed
    return Found(made, score, fixed, f"{best.plan.sampler} on {best.grid}", details)


def recall(path: Path | None) -> dict[str, Any]:
    """What `remember` wrote; nothing where nothing was written. Raises BadInput for a damaged file."""
    if path is None or not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}", fix="delete it to begin again") from None
    if not isinstance(data, dict):
        raise BadInput(f"{path} is no state of a search", fix="delete it to begin again")
    return data


def remember(path: Path | None, state: Mapping[str, Any]) -> None:
    """Keep the state of a search, whole or not at all."""
    if path is not None:
        atomic_write(path, json.dumps(state).encode())

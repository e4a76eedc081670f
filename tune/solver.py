"""A solver of its own decision at every step, searched: USF. Liu et al. 2023 <arXiv:2312.07243>.

All exponential integrators share one update, so a solver is a list of decisions: at each step the time, what is
interpolated (noise or data), from which state the step starts, how many points and which estimate of their
derivatives, and whether the state is corrected once the next prediction is known. Their search fits a predictor of
FID to sampled schedules; ours asks optuna's TPE, with the distance to the model's own long runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, FewstepError, MissingExtra
from ..runtime.grids.levels import lowest
from ..runtime.plan import Plan
from ..runtime.process import Array, Process
from ..runtime.progress import Progress
from ..runtime.samplers import Denoise, Noise, Step
from ..runtime.samplers.dpmpp import midpoint
from ..runtime.samplers.exponential import Integrator, Point, Rule, first, taylor
from .problem import Problem
from .search import Candidate, Found, Search, found_or_fixed, ranked_fixed

__all__ = ["TRIALS", "Decision", "decided", "solver_plan"]

TRIALS = 400
"""A trial costs as many network calls a start as the plan has; the paper's searches are far longer."""


@dataclass(frozen=True)
class Decision:
    """How one step is taken."""

    noise: bool = False
    """Interpolate the noise prediction; otherwise the data prediction."""
    order: int = 1
    """Points used, 1 to 3; as many as there are."""
    low: bool = False
    """With two points: the midpoint estimate, which for few steps beats the one exact for lines."""
    back: bool = False
    """Start from the state before the last one."""
    correct: bool = False
    """Repeat the step with the prediction at its end before going on."""

    def rule(self, points: int) -> Rule:
        return first if points == 1 else midpoint if points == 2 and self.low else taylor


def decided(
    denoise: Denoise,
    process: Process,
    x: Array,
    times: Array,
    noise: Noise,
    *,
    decisions: Sequence[Decision],
) -> Iterator[Step]:
    """The solver that takes these decisions, one a step; a step of infinite length is first order whatever they say."""
    data = Integrator.of(process, times)
    other = Integrator.of(process, times, noise_prediction=True)
    seen: list[tuple[Array, Array]] = []
    """Of each time so far: the state the network saw, and its prediction."""
    states = [x]

    def points(integrator: Integrator, places: Sequence[int]) -> list[Point]:
        return [integrator.point(j, *seen[j]) for j in places]

    def step(i: int, last: int) -> Array:
        """The state at times[i + 1] by decision i, with predictions up to that of time `last`."""
        choice = decisions[i]
        integrator = other if choice.noise else data
        if not integrator.finite(i, i + 1):
            return integrator.step(states[i], i + 1, points(integrator, [i]), first, noise)
        begin = i - 1 if choice.back and i > 0 and integrator.finite(i - 1, i) else i
        # the start first, then the newest; a start at alpha 0 is no point a polynomial could pass through
        known = [begin, *(j for j in range(last, -1, -1) if j != begin and np.isfinite(data.lam[j]))]
        known = known[: choice.order + (last > i)]
        return integrator.step(
            states[begin], i + 1, points(integrator, known), choice.rule(len(known)), noise
        )

    for i, t in enumerate(times[:-1]):
        seen.append((x, denoise(x, float(t))))
        if i > 0 and decisions[i - 1].correct and data.finite(i - 1, i):
            states[i] = step(i - 1, i)
        x = step(i, i)
        states.append(x)
        yield Step(i, x, seen[-1][1])


def plan_of(problem: Problem, times: Array, decisions: Sequence[Decision]) -> Plan:
    sampler = partial(decided, decisions=tuple(decisions))
    traced = Plan.trace(sampler, problem.process, times, prediction=problem.prediction, name="usf")
    return problem.shipped(traced)


def angles(process: Process, times: Array) -> Array:
    """arctan(sigma / alpha): where times lie between clean, 0, and pure noise; finite for every process."""
    return np.asarray(np.arctan2(process.sigma(times), process.alpha(times)))


def gaps_of(process: Process, times: Array) -> list[float]:
    """Times as logarithms of the gaps between their angles, the first being 0: numbers that may be anything."""
    gaps = -np.diff(angles(process, times))
    return [float(value) for value in np.log(gaps[1:] / gaps[0])]


def times_of(process: Process, gaps: Sequence[float]) -> Array:
    """The inverse of gaps_of, no time cleaner than a network is asked about."""
    sizes = np.exp(np.concatenate([[0.0], gaps]))
    top = float(angles(process, np.array([process.t_max]))[0])
    inner = top * (1 - np.cumsum(sizes)[:-1] / sizes.sum())
    times = np.asarray(process.t_of_lam(-np.log(np.tan(inner))))
    limit = lowest(process) * (1 + 1e-3 * np.arange(len(times))[::-1])
    return np.concatenate([[process.t_max], np.maximum(times, limit), [0.0]])


def solver_plan(search: Search, *, trials: int = TRIALS) -> Iterator[Progress | Found]:
    """The best decisions and times of so many trials. With a storage that several workers open, they share them."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise MissingExtra.of("optuna", "tune") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    problem, calls = search.problem, search.calls
    ranked = yield from ranked_fixed(search)
    study = _study(optuna, search)
    if not study.trials:
        for known in _known(problem, ranked):
            study.enqueue_trial(known)

    def objective(trial: Any) -> float:
        gaps = [trial.suggest_float(f"gap{i}", -7.0, 3.0) for i in range(1, calls)]
        try:
            made = plan_of(problem, times_of(problem.process, gaps), _suggested(trial, calls))
            rmse = problem.score(made, problem.fitted).rmse
        except FewstepError:
            return float("inf")
        return float(np.log(rmse)) if 0 < rmse < np.inf else float("inf")

    while (
        done := len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
    ) < trials:
        study.optimize(objective, n_trials=1, catch=())
        best = float(np.exp(study.best_value))
        yield Progress("solver", (done + 1) / trials, f"trial {done + 1}, RMSE {best:.4g}")
    params = study.best_params
    times = times_of(problem.process, [params[f"gap{i}"] for i in range(1, calls)])
    decisions = [
        Decision(**{name: params[f"{name}{i}"] for name in asdict(Decision())}) for i in range(calls)
    ]
    made = plan_of(problem, times, decisions)
    details = {"times": times.tolist(), "decisions": [asdict(decision) for decision in decisions]}
    yield found_or_fixed(search, made, ranked, details)


def _suggested(trial: Any, calls: int) -> list[Decision]:
    return [
        Decision(
            noise=trial.suggest_categorical(f"noise{i}", [False, True]),
            order=trial.suggest_int(f"order{i}", 1, 3),
            low=trial.suggest_categorical(f"low{i}", [False, True]),
            back=trial.suggest_categorical(f"back{i}", [False, True]),
            correct=trial.suggest_categorical(f"correct{i}", [False, True]),
        )
        for i in range(calls)
    ]


def _known(problem: Problem, ranked: Sequence[Candidate]) -> Iterator[dict[str, Any]]:
    """The published solvers, each on the grids that were best: where the search begins."""
    grids: dict[str, Array] = {}
    for candidate in ranked:
        grids.setdefault(candidate.grid, np.array([call.t for call in candidate.plan.calls] + [0.0]))
    solvers = {
        "DPM-Solver++(2M)": Decision(order=2, low=True),
        "DPM-Solver++(3M)": Decision(order=3),
        "UniPC": Decision(order=2, low=True, correct=True),
        "DEIS": Decision(noise=True, order=3),
    }
    for times in list(grids.values())[:3]:
        gaps = np.clip(gaps_of(problem.process, times), -7.0, 3.0)
        for decision in solvers.values():
            known: dict[str, Any] = {f"gap{i + 1}": float(gap) for i, gap in enumerate(gaps)}
            for i in range(len(times) - 1):
                known |= {f"{name}{i}": value for name, value in asdict(decision).items()}
                left = len(times) - 1 - i
                known[f"order{i}"] = min(decision.order, left)
            yield known


def _study(optuna: Any, search: Search) -> Any:
    """In the storage asked for; otherwise in a journal beside the state file, or in memory."""
    storage: Any = search.storage or None
    name = f"solver-{search.calls}"
    if not search.storage and search.state is not None:
        journal = optuna.storages.journal
        path = Path(search.state).with_suffix(".journal")
        storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(path)))
    elif search.storage and search.state is not None:
        name += f"-{Path(search.state).parent.name}"  # one storage may serve many models
    sampler = optuna.samplers.TPESampler(seed=search.seed, multivariate=True)
    try:
        return optuna.create_study(
            storage=storage, sampler=sampler, study_name=name, direction="minimize", load_if_exists=True
        )
    except Exception as error:  # whatever its database driver raises for an address it cannot open
        said = json.dumps(search.storage or str(search.state))
        raise BadInput(f"storage {said}: {error}", expected="an optuna storage, sqlite:///file.db") from None

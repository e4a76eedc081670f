"""AutoDiffusion: time steps, and which graph each call uses, by evolution. Li et al. 2023 <arXiv:2309.10438>.

Their fitness is FID; here it is the distance to the model's own long runs, which needs no pictures. Their skipped
blocks are graphs: a problem may offer several (the whole network, one with blocks left out) at a cost each, and a
candidate must keep to the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..runtime.errors import BadInput, FewstepError
from ..runtime.grids.levels import lowest
from ..runtime.plan import Plan, plan
from ..runtime.process import Array, DiscreteVP, Process
from ..runtime.process import lam as log_snr
from ..runtime.progress import Progress
from .problem import Problem
from .search import Candidate, Found, Search, found_or_fixed, ranked_fixed, recall, remember

__all__ = ["Genome", "crossover", "evolved_plan", "mutate", "pool_of"]

POPULATION, EPOCHS, MUTATIONS, CROSSOVERS = 50, 15, 25, 15
MUTATION_PROBABILITY = 0.25
"""All five are the authors' (their repository's search scripts)."""
ATTEMPTS = 100
"""To make a child that is new and within the budget, before an epoch goes on without it."""


@dataclass(frozen=True, order=True)
class Genome:
    """One candidate: falling places in the pool of times, and the graph of each call."""

    places: tuple[int, ...]
    graphs: tuple[str, ...]

    def cost(self, graphs: Mapping[str, float]) -> float:
        return sum(graphs[name] for name in self.graphs)


def pool_of(process: Process) -> Array:
    """The times a candidate chooses from, noisiest first: the trained levels, or a thousand even in log-SNR."""
    if isinstance(process, DiscreteVP):
        return np.arange(process.t_max, 0.0, -1.0)
    high, low = log_snr(process, np.array([process.t_max * (1 - 1e-3), lowest(process)]))
    pool = np.asarray(process.t_of_lam(np.linspace(float(high), float(low), 1000)))
    return np.concatenate([[process.t_max], pool])


def mutate(parent: Genome, size: int, graphs: Mapping[str, float], rng: np.random.Generator) -> Genome:
    """Each time but the first becomes any unused one, and each graph any other, with the mutation probability."""
    places = list(parent.places)
    for i in range(1, len(places)):
        if rng.random() < MUTATION_PROBABILITY:
            unused = np.setdiff1d(np.arange(1, size), places)
            places[i] = int(rng.choice(unused))
    names = list(graphs)
    chosen = [
        str(rng.choice(names)) if rng.random() < MUTATION_PROBABILITY else name for name in parent.graphs
    ]
    return Genome(tuple(sorted(places)), tuple(chosen))


def crossover(a: Genome, b: Genome, rng: np.random.Generator) -> Genome | None:
    """Each element from either parent; None where two times then are the same."""
    side = rng.random(len(a.places)) < 0.5
    places = sorted({x if first else y for x, y, first in zip(a.places, b.places, side, strict=True)})
    chosen = tuple(x if first else y for x, y, first in zip(a.graphs, b.graphs, side, strict=True))
    return Genome(tuple(places), chosen) if len(places) == len(a.places) else None


def evolved_plan(
    search: Search, *, population: int = POPULATION, epochs: int = EPOCHS
) -> Iterator[Progress | Found]:
    """Settings: `graphs`, name -> cost of a call, and `budget`, what all calls may cost; by default one graph, free."""
    problem = search.problem
    graphs: Mapping[str, float] = search.settings.get("graphs", {"denoiser": 1.0})
    budget = float(search.settings.get("budget", search.calls * max(graphs.values())))
    if budget < search.calls * min(graphs.values()):
        raise BadInput(
            f"a budget of {budget:g} for {search.calls} calls", expected="at least the cheapest graph's"
        )
    ranked = yield from ranked_fixed(search)
    pool, sampler = pool_of(problem.process), ranked[0].plan.sampler
    state = recall(search.state)
    rng = np.random.default_rng(search.seed)
    if state:
        rng.bit_generator.state = state["rng"]
    living = {Genome(tuple(p), tuple(g)): float(f) for p, g, f in state.get("living", [])}
    epoch = int(state.get("epoch", 0))
    if not state:
        for genome in _seeds(pool, ranked, search.calls, graphs, budget, population, rng):
            living[genome] = fitness(problem, sampler, pool, genome)
            yield Progress("first generation", len(living) / population / (epochs + 1), _said(living))
        remember(search.state, _saved(living, 0, rng))
    while epoch < epochs:
        parents = sorted(living, key=lambda genome: living[genome])[:population]
        living = {genome: living[genome] for genome in parents}
        for child in _children(parents, living, len(pool), graphs, budget, rng):
            living[child] = fitness(problem, sampler, pool, child)
        epoch += 1
        remember(search.state, _saved(living, epoch, rng))
        yield Progress("evolution", (epoch + 1) / (epochs + 1), f"epoch {epoch}, {_said(living)}")
    best = min(living, key=lambda genome: living[genome])
    made = plan_of(problem, sampler, pool, best)
    details = {"sampler": sampler, "times": pool[list(best.places)].tolist(), "graphs": list(best.graphs)}
    yield found_or_fixed(search, made, ranked, details)


def plan_of(problem: Problem, sampler: str, pool: Array, genome: Genome) -> Plan:
    times = np.append(pool[list(genome.places)], 0.0)
    made = plan(sampler, len(genome.places), problem.process, times, prediction=problem.prediction)
    calls = tuple(replace(call, graph=name) for call, name in zip(made.calls, genome.graphs, strict=True))
    return problem.shipped(replace(made, calls=calls))


def fitness(problem: Problem, sampler: str, pool: Array, genome: Genome) -> float:
    """RMSE on the fitted starts; less is fitter."""
    try:
        rmse = problem.score(plan_of(problem, sampler, pool, genome), problem.fitted).rmse
    except FewstepError:
        return float("inf")
    return rmse if np.isfinite(rmse) else float("inf")


def _seeds(
    pool: Array,
    ranked: list[Candidate],
    calls: int,
    graphs: Mapping[str, float],
    budget: float,
    population: int,
    rng: np.random.Generator,
) -> list[Genome]:
    """The grids of the fixed plans, on the pool, and random ones up to the population."""
    dearest, cheapest = max(graphs, key=lambda n: graphs[n]), min(graphs, key=lambda n: graphs[n])
    found: dict[Genome, None] = {}

    def put(places: Any) -> None:
        chosen = sorted({0, *(int(place) for place in places)})
        if len(chosen) == calls:
            names = [dearest] * calls
            for i in rng.permutation(calls):  # cheaper graphs at random calls until the budget is met
                if sum(graphs[name] for name in names) > budget:
                    names[i] = cheapest
            found[Genome(tuple(chosen), tuple(names))] = None

    for candidate in ranked:
        put(np.abs(pool - np.array([[call.t] for call in candidate.plan.calls])).argmin(axis=1))
    room = len(pool)
    while len(found) < min(population, _combinations(room - 1, calls - 1)):
        put(rng.choice(np.arange(1, room), calls - 1, replace=False))
    return list(found)[:population]


def _combinations(n: int, k: int) -> int:
    from math import comb

    return comb(n, k)


def _children(
    parents: list[Genome],
    living: Mapping[Genome, float],
    size: int,
    graphs: Mapping[str, float],
    budget: float,
    rng: np.random.Generator,
) -> list[Genome]:
    """New candidates within the budget: no parent, no twin."""
    born: dict[Genome, None] = {}

    def bear(wanted: int, make: Any) -> None:
        for _ in range(ATTEMPTS * wanted):
            if len(born) >= wanted:
                return
            child = make()
            if child is not None and child not in living and child.cost(graphs) <= budget + 1e-9:
                born[child] = None

    def one() -> Genome:
        return parents[int(rng.integers(len(parents)))]

    bear(MUTATIONS, lambda: mutate(one(), size, graphs, rng))
    bear(MUTATIONS + CROSSOVERS, lambda: crossover(one(), one(), rng))
    return list(born)


def _saved(living: Mapping[Genome, float], epoch: int, rng: np.random.Generator) -> dict[str, Any]:
    rows = [[list(genome.places), list(genome.graphs), fit] for genome, fit in living.items()]
    return {"epoch": epoch, "living": rows, "rng": rng.bit_generator.state}


def _said(living: Mapping[Genome, float]) -> str:
    return f"RMSE {min(living.values()):.4g}"

"""Every search by the name the command line knows it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..runtime.progress import Progress
from .ays import grid_plan
from .compensation import compensated_plan
from .evolution import evolved_plan
from .search import Found, Search, learned_plan
from .solver import solver_plan
from .v3 import measured_plan

METHODS: Mapping[str, Callable[[Search], Iterator[Progress | Found]]] = {
    "learned": learned_plan,
    "grid": grid_plan,
    "evolution": evolved_plan,
    "solver": solver_plan,
    "compensation": compensated_plan,
    "v3": measured_plan,
}

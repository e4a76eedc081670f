"""Every search by the name the command line knows it by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from ..runtime.progress import Progress
from .search import Found, Search, learned_plan

METHODS: Mapping[str, Callable[[Search], Iterator[Progress | Found]]] = {
    "learned": learned_plan,
}

"""What long work says while it runs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TypeVar

__all__ = ["Progress", "within"]

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """One event of a generator that does long work; only tools/ turns it into a bar."""

    stage: str
    """load, lower unet, gate, speed, commit, ..."""
    fraction: float | None
    """How much of the whole work is done, 0 to 1; None where nobody knows."""
    note: str = ""
    """What is being done or was found, in a few words."""


def within(
    work: Generator[Progress, None, T], begin: float, end: float, prefix: str = ""
) -> Generator[Progress, None, T]:
    """The same work as a piece of a whole, from `begin` to `end` of it. What it shows never falls, though work inside
    it may count anew.
    """
    last = begin
    while True:
        try:
            event = next(work)
        except StopIteration as stop:
            result: T = stop.value
            return result
        last = max(last, begin + (end - begin) * (event.fraction or 0.0))
        yield replace(event, stage=prefix + event.stage, fraction=last)

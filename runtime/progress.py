"""What long work says while it runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True)
class Progress:
    """One event of a generator that does long work; only tools/ turns it into a bar."""

    stage: str
    """load, lower unet, gate, speed, commit, ..."""
    fraction: float | None
    """How much of the whole work is done, 0 to 1; None where nobody knows."""
    note: str = ""
    """What is being done or was found, in a few words."""

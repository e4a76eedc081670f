"""Scores on disk, one by one as they are measured: a job that was cut off goes on where it was."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from ..runtime.files import atomic_write, output_errors

__all__ = ["Scores"]

EVERY_S = 2.0
"""Seconds of work that may be lost when the process is killed."""


class Scores:
    """Name -> score, kept in a file that is named after all they depend on."""

    def __init__(self, path: Path) -> None:
        self.path, self.done = path, _read(path)
        self._fresh, self._began, self._saved = 0, time.monotonic(), time.monotonic()

    def add(self, name: str, score: float) -> None:
        self.done[name] = score
        self._fresh += 1
        if time.monotonic() - self._saved > EVERY_S:
            self.save()

    def save(self) -> None:
        with output_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, json.dumps(self.done).encode())
        self._saved = time.monotonic()

    def note(self, name: str, number: int, count: int) -> str:
        """What is measured now, and how long the rest takes."""
        if self._fresh == 0:
            return name
        seconds = (time.monotonic() - self._began) / self._fresh * (count - number)
        left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"  # like a person would say it
        return f"{name}; about {left} left"


def _read(path: Path) -> dict[str, float]:
    """A file that cannot be read counts as none."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(isinstance(value, float) for value in found.values()):
            return found
    return {}

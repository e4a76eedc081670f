"""Every error fewstep raises on purpose.

    FewstepError                 base; `except FewstepError` catches all of them
    +-- BadInput                 something the caller gave is wrong                           exit code 2
    |   +-- CheckpointError      a model folder or file cannot be read as a model
    |   +-- BundleError          a bundle is damaged, foreign or tampered with
    |   +-- PlanError            a sampler, time grid or plan that cannot be built or read
    |   +-- NotLinear            a diffusers scheduler that no table of numbers can express
    |   +-- MissingExtra         an optional dependency is not installed
    |   +-- OutputError          the result cannot be written (permissions, disk full)
    +-- GateFailed               the export does not match the original closely enough       exit code 5
    +-- Cancelled                the caller asked a running job to stop                      exit code 130

Each says what was found, what was expected and what to do, in one line.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "BadInput",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "FewstepError",
    "GateFailed",
    "MissingExtra",
    "NotLinear",
    "OutputError",
    "PlanError",
]


class FewstepError(Exception):
    """An error with its remedy: `FewstepError("steps is 0", expected="1 to 1000", fix="pass --steps 20")`."""

    exit_code = 70

    def __init__(self, found: str, *, expected: str = "", fix: str = "") -> None:
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(found)

    def __str__(self) -> str:
        text = self.found
        if self.expected:
            text += f"; expected {self.expected}"
        if self.fix:
            text += f"; fix: {self.fix}"
        return text


class BadInput(FewstepError, ValueError):
    exit_code = 2


class CheckpointError(BadInput):
    pass


class BundleError(BadInput):
    pass


class PlanError(BadInput):
    @classmethod
    def unknown(cls, what: str, name: str, known: Iterable[str]) -> PlanError:
        """An unknown name, with the nearest known ones."""
        from difflib import get_close_matches  # only here: it costs an import

        known = list(known)
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        fix = f"did you mean {' or '.join(near)}?" if near else ""
        return cls(f"{what} {name!r}", expected=f"one of {', '.join(known)}", fix=fix)


class NotLinear(PlanError):
    pass


class MissingExtra(BadInput, ImportError):
    @classmethod
    def of(cls, library: str, extra: str) -> MissingExtra:
        return cls(f"{library} is not installed", fix=f"pip install 'fewstep[{extra}]'")


class OutputError(BadInput, OSError):
    def __str__(self) -> str:  # OSError formats its arguments its own way
        return FewstepError.__str__(self)


class GateFailed(FewstepError):
    exit_code = 5


class Cancelled(FewstepError):
    exit_code = 130

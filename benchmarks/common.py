"""What every benchmark shares: the host's name, medians with spread, and where results go."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.tools import host

RESULTS = Path(__file__).parent / "results"


def spread(samples: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(samples), "min": min(samples), "max": max(samples), "n": len(samples)}


def save(name: str, results: dict[str, Any]) -> Path:
    """Write results/NAME.json with the host's fingerprint, and say where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"host": host.fingerprint(), **results}, indent=1, default=str) + "\n")
    print(f"wrote {path}")
    return path


def from_models(name: str, *folders: str) -> Any:
    """A module of models/, from the first of `folders` there that has it; they have a `common` of their own."""
    ours = sys.modules.pop("common")
    sys.path[:0] = [str(Path(__file__).parents[1] / "models" / folder) for folder in folders]
    try:
        return importlib.import_module(name)
    finally:
        del sys.path[: len(folders)]
        sys.modules["common"] = ours

"""What every benchmark shares: the host's name, medians with spread, and where results go."""

from __future__ import annotations

import json
import statistics
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

"""Rates of this host from what was measured on it: what `fewstep bench --profile` writes and `--dry-run` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..targets.profile import Demand, Rates

__all__ = ["Call", "fit", "fit_memory"]

TRUST = 0.02
"""Weight of what was known before against one measurement: with as many measurements as classes it hardly counts, and
a class that none of them has much of keeps its ratio to what is known."""

TURNS = 4000
"""Of coordinate descent: seven unknowns settle in a few hundred."""

Call = tuple[Demand, float]
"""What one call asked for, and the seconds, or bytes, it took."""


def fit(calls: Sequence[Call], known: Rates, trust: float = TRUST) -> Rates:
    """The rates that explain the seconds best, by relative error, none negative, near those `known` where it can be."""
    before = np.array(known.seconds())
    amounts = np.array([demand.amounts() for demand, _ in calls])
    measured = np.array([seconds for _, seconds in calls])
    scale = _scales(amounts * before / measured[:, None], trust)
    return Rates.of_seconds(tuple(float(each) for each in before * scale), known)


def fit_memory(calls: Sequence[Call], known: Rates, base: float, trust: float = TRUST) -> Rates:
    """The same for bytes that parts took beside the `base` of their process, by the relative error of both together,
    which is what a device has room for or not.
    """
    before = np.array(known.bytes())
    measured = np.array([size for _, size in calls])
    rows = np.array([demand.sizes() for demand, _ in calls]) * before / measured[:, None]
    held, alive, operator, part = before * _scales(rows, trust, 1 - base / measured)
    found = {"held": held, "alive": alive, "operator_kib": operator / 1024, "part_mib": part / 2**20}
    return replace(known, **{name: float(f"{value:.4g}") for name, value in found.items()})


def _scales(rows: np.ndarray, trust: float, target: np.ndarray | None = None) -> np.ndarray:
    """Factors x >= 0 of what was known with rows @ x nearest to the target (ones), and x near 1: coordinate descent."""
    count = rows.shape[1]
    goal = np.ones(len(rows)) if target is None else target
    matrix = np.concatenate([rows, np.eye(count) * trust**0.5])
    wanted = np.concatenate([goal, np.full(count, trust**0.5)])
    square, right, x = matrix.T @ matrix, matrix.T @ wanted, np.ones(count)
    for _ in range(TURNS):
        before = x.copy()
        for j in range(count):
            x[j] = max(0.0, x[j] + (right[j] - square[j] @ x) / square[j, j])
        if np.abs(x - before).max() < 1e-9:
            break
    return x

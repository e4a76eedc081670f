"""The set of blocks that is worth least and still large enough: a 0/1 knapsack over a tree of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd

import numpy as np

__all__ = ["lightest", "lowest"]

GRAINS = 20_000
"""Steps the size is counted in, at most: sizes are rounded down to whole ones, so that a set is never too small, and
too large by less than one a block."""


def lightest(
    sizes: Mapping[str, int], scores: Mapping[str, float], inside: Mapping[str, str], least: int
) -> tuple[str, ...] | None:
    """Of all sets of blocks of at least size `least`, none inside another, the one with the smallest sum of scores.

    inside  block -> the block that holds it, "" for none; of a block and what it holds, only one can be in a set
    Returns the blocks in the order of `sizes`; None where all of them are not large enough. Dynamic programming over
    the size, as LAPTOP-Diff (Zhang et al. 2024, arXiv:2404.11098) needs it.
    """
    grain = max(gcd(least, *sizes.values()), -(-least // GRAINS), 1)
    goal = -(-least // grain)
    best = np.full(goal + 1, np.inf)  # by size, the last standing for all that are large enough
    best[0] = 0.0
    chosen: list[tuple[str, ...] | None] = [None] * (goal + 1)
    chosen[0] = ()
    held: dict[str, list[str]] = {}
    for name in sizes:
        held.setdefault(inside.get(name, ""), []).append(name)

    def with_one(name: str, best: np.ndarray, chosen: list) -> tuple[np.ndarray, list]:  # type: ignore[type-arg]
        size, score = sizes[name] // grain, scores[name]
        after, picked = best.copy(), list(chosen)
        for at in np.flatnonzero(np.isfinite(best)):
            to = min(goal, int(at) + size)
            if best[at] + score < after[to]:
                after[to], picked[to] = best[at] + score, (*chosen[at], name)
        return after, picked

    def with_any(names: Sequence[str], best: np.ndarray, chosen: list) -> tuple[np.ndarray, list]:  # type: ignore[type-arg]
        for name in names:
            whole = with_one(name, best, chosen)
            pieces = with_any(held.get(name, []), best, chosen)
            better = whole[0] < pieces[0]
            best = np.where(better, whole[0], pieces[0])
            chosen = [w if b else p for w, p, b in zip(whole[1], pieces[1], better, strict=True)]
        return best, chosen

    best, chosen = with_any(held.get("", []), best, chosen)
    found = chosen[goal]
    return None if found is None else tuple(name for name in sizes if name in found)


def lowest(
    sizes: Mapping[str, int], scores: Mapping[str, float], inside: Mapping[str, str], least: float
) -> tuple[str, ...]:
    """Blocks by rising score until their size is at least `least`: for scores that do not add up.

    A block that comes after some it holds takes their place; one whose holder is gone already is passed over.
    """
    found: list[str] = []
    for name in sorted(scores, key=lambda name: scores[name]):
        if sum(sizes[each] for each in found) >= least:
            break
        if not any(within(name, each, inside) for each in found):
            found = [each for each in found if not within(each, name, inside)] + [name]
    return tuple(found)


def within(name: str, holder: str, inside: Mapping[str, str]) -> bool:
    """Whether a block lies in another, at whatever depth."""
    while name := inside.get(name, ""):
        if name == holder:
            return True
    return False

"""Which units of all layers go, for a given saving: those that cost the least error for each weight saved."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import BadInput
from .width_groups import WidthGroup

__all__ = ["choose", "comparable"]

Array = NDArray[Any]


def comparable(scores: Mapping[str, Array]) -> dict[str, Array]:
    """Every layer's scores over their mean: for criteria whose scale is the layer's own. [count] each."""
    return {name: values / max(float(values.mean()), 1e-30) for name, values in scores.items()}


def choose(
    groups: Sequence[WidthGroup],
    scores: Mapping[str, Array],
    saved: Mapping[str, float],
    wanted: float,
    *,
    floor: float,
    round_to: int,
) -> dict[str, list[int]]:
    """Group's name -> the units kept, in order.

    scores    [count] of each group: the error of dropping a unit; errors of several add
    saved     what dropping one unit of the group saves
    wanted    how much is to be saved, in the same unit
    floor     share of each group that stays whatever is wanted
    round_to  widths end up as multiples of it, or as they were

    Errors that add make this a knapsack; units of a layer go in the order of their scores, and among the layers' next
    steps the one of least error per saving comes first: Dantzig's rule, at most one step from the optimum. Raises
    BadInput where the floors leave less to save than is wanted.
    """
    order = {group.name: np.argsort(scores[group.name], kind="stable") for group in groups}
    widths = {group.name: group.widths_kept(round_to, floor) for group in groups}
    kept = {group.name: group.count for group in groups}
    possible = sum((w[0] - w[-1]) * saved[name] for name, w in widths.items())
    if wanted > possible * (1 + 1e-9):
        raise BadInput(
            f"{wanted:,.0f} of weights or multiplications to be saved by narrower layers",
            expected=f"at most {possible:,.0f} with floor {floor:g} and widths in multiples of {round_to}",
            fix="a smaller ratio, a lower floor, more kinds, or blocks cut first",
        )

    def step(name: str, number: int) -> tuple[float, int, str, int]:
        """The best next width of a group, from widths[number] on: error per saving, how far, for the heap."""
        now = widths[name][number]
        best = (float("inf"), 0)
        for further in range(number + 1, len(widths[name])):
            then = widths[name][further]
            gone = order[name][group_count[name] - now : group_count[name] - then]
            rate = float(scores[name][gone].sum()) / ((now - then) * saved[name])
            best = min(best, (rate, further))
        return best[0], best[1], name, number

    group_count = {group.name: group.count for group in groups}
    heap = [step(name, 0) for name in widths if len(widths[name]) > 1]
    heapq.heapify(heap)
    total = 0.0
    while total < wanted * (1 - 1e-12) and heap:
        _, further, name, number = heapq.heappop(heap)
        total += (widths[name][number] - widths[name][further]) * saved[name]
        kept[name] = widths[name][further]
        if further + 1 < len(widths[name]):
            heapq.heappush(heap, step(name, further))
    return {
        name: sorted(int(unit) for unit in order[name][group_count[name] - kept[name] :]) for name in kept
    }
